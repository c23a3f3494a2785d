"""Which tokens were credited: a few sampled rollouts of a step, token by token, and how far the heads look.

`tokens/step-000010.parquet`: one row a completion token of `tracking.token_rollouts` rollouts (columns: `SCHEMA`, and
one `reward/<name>` and one `neutral/<name>` a reward). `heads.jsonl`: one object a step, `span`, `local` and `global`
as layers x heads. All of it is what the training forward saw: no forward is added. B rollouts, T completion tokens, K
rewards.
"""

import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlattn.credit.advantages import RewardTable
from rlattn.credit.apply import Sign, effective_weights
from rlattn.credit.selection import delta, top_fraction
from rlattn.grpo.port import Port
from rlattn.run_folder.jsonl import append_row
from rlattn.types import CreditRule, Signals

SCHEMA = pa.schema(
    [
        ("rollout", pa.int32()),  # its number in the step's generation batches, over all ranks
        ("group", pa.int32()),  # rollouts of one prompt share it
        ("position", pa.int32()),  # in the completion, from 0
        ("token_id", pa.int32()),
        ("token", pa.string()),
        ("trained", pa.bool_()),  # written by the policy, not by a tool
        ("reward", pa.float32()),  # weighted sum over the rewards
        ("advantage", pa.float32()),  # before its weight
        ("weight", pa.float32()),
        ("waad", pa.float32()),  # null without credit
        ("fai", pa.float32()),  # null without credit, and near the end
        ("entropy", pa.float32()),  # nats
        ("logprob", pa.float32()),
        ("anchor", pa.bool_()),  # among the rule's top fraction of FAI
        ("preplan", pa.bool_()),  # among the rule's top fraction of the change of WAAD after it
        ("prompt", pa.string()),  # at position 0 only
    ]
)
# `neutral`: the reward failed or said nothing there, and `reward` is the mean of the rest of its group
BY_REWARD = {"reward": pa.float32(), "neutral": pa.bool_()}
FRACTION = 0.4  # marks of a rule without a top_fraction
SIGNALS = ("weight", "waad", "fai")
CONTEXT = 8  # tokens before one that its text is decoded with


class TokenLog(TrainerCallback):
    """Keeps the tokens of some rollouts of steps 1, `every`, 2·`every`, … and the last one.

    Which rollouts depends on the seed and the step alone, drawn beside the training's generators. Collective at the end
    of such a step, whatever its data.
    """

    def __init__(self, run_dir: Path, *, rollouts: int, every: int, seed: int):
        self.run_dir, self.rollouts, self.every, self.seed = run_dir, rollouts, every, seed
        self.signals: dict[str, Tensor] = {}  # (B, T), of the last forward that was read
        self.heads: dict[str, Any] = {}
        self.forward: tuple[Tensor, Tensor] | None = None  # log-probabilities and entropies of the last forward
        self.kept: list[dict[str, Any]] = []
        self.micro_batches = 0
        self.fraction: float = FRACTION
        self.sign: Sign = "both"

    def due(self, step: int, last: int) -> bool:
        return step == 1 or step % self.every == 0 or step == last

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.micro_batches, self.kept = 0, []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self.due(state.global_step, state.max_steps):
            return
        kept, heads = gather_object(self.kept), gather_object([self.heads])
        if not state.is_world_process_zero:
            return
        if kept:
            write_tokens(self.run_dir / "tokens" / f"step-{state.global_step:06d}.parquet", kept)
        if all(heads):
            mean = {
                name: torch.stack([rank[name] for rank in heads]).nanmean(0) for name in ("span", "local", "global")
            }
            rounded = {name: [[round(v, 4) for v in row] for row in value.tolist()] for name, value in mean.items()}
            append_row(
                self.run_dir / "heads.jsonl", {"step": state.global_step, "layers": heads[0]["layers"], **rounded}
            )

    def read_signals(self, signals: Signals, weights_BT: Tensor, rule: CreditRule, sign: Sign) -> None:
        """What a credit rule saw and gave, of the forward that was just read; `sign`: where its weights count."""
        self.fraction, self.sign = _fraction(rule), sign
        T = weights_BT.shape[1]
        self.signals = dict(zip(SIGNALS, (weights_BT, signals.waad_BN[:, -T:], signals.fai_BN[:, -T:]), strict=True))
        if signals.span_BLH is not None and signals.local_heads is not None and signals.global_heads is not None:
            self.heads = {
                "layers": list(signals.layers),
                "span": signals.span_BLH.nanmean(0).cpu(),
                "local": signals.local_heads.float().mean(0).cpu(),
                "global": signals.global_heads.float().mean(0).cpu(),
            }

    def carried(self, port: Port, table: RewardTable, advantage_BT: Tensor, credited: bool) -> dict[str, Tensor]:
        """What of a generation batch rides TRL's buffer, which shuffles it, to the training forward."""
        B, device = len(advantage_BT), advantage_BT.device
        rollout_B = torch.arange(B, device=device) + B * port.rank
        rewards_BK = table.used_BK[rollout_B]
        total_B = (rewards_BK * table.weights_K.to(device)).nansum(dim=1)
        found = {"log/rollout": rollout_B, "log/rewards": rewards_BK, "log/reward": total_B}
        found["log/neutral"] = table.neutral_BK[rollout_B]
        if credited:
            found |= {f"log/{name}": values_BT for name, values_BT in self.signals.items()}
            found["log/advantage"] = advantage_BT
        return found

    def see(self, port: Port, inputs: dict[str, Any]) -> None:
        """A micro-batch after its training forward; `inputs` hold the advantages as they were before credit."""
        args: Any = port.args
        state = port.state
        micro, self.micro_batches = self.micro_batches, self.micro_batches + 1
        step = state.global_step + 1
        if not self.due(step, state.max_steps) or self.forward is None or "log/rollout" not in inputs:
            return
        # what each of the step's micro-batches holds: (generation batch, slice of it); TRL counts one after its loss
        per_generation, begin = args.steps_per_generation, port.micro_batches - micro
        numbers = range(begin, begin + port.accumulated)
        slices = [(number // port.window, number % per_generation) for number in numbers]
        own, different = slices[micro], [*dict.fromkeys(slices)]
        if own in slices[:micro]:  # a further iteration over rollouts that the step has seen
            return
        B, ranks = len(inputs["completion_ids"]), port.ranks
        first = (different.index(own) * ranks + port.rank) * B
        places = range(len(different) * ranks * B)
        chosen = random.Random(f"{self.seed} {step}").sample(places, min(self.rollouts, len(places)))
        signals = {name: inputs[f"log/{name}"] for name in SIGNALS} if "log/weight" in inputs else self.signals
        # a step may hold several generation batches, whose rollouts are numbered on
        earlier = (own[0] - slices[0][0]) * per_generation * B * ranks
        for place in sorted(chosen):
            if first <= place < first + B:
                self.kept.append(self._rollout(port, inputs, signals, place - first, earlier))

    def _rollout(
        self,
        port: Port,
        inputs: dict[str, Any],
        signals: dict[str, Tensor],
        row: int,
        earlier: int,
    ) -> dict[str, Any]:
        assert self.forward is not None
        one = slice(row, row + 1)
        ids_T, real_T = inputs["completion_ids"][row].cpu(), inputs["completion_mask"][row].bool().cpu()
        tool_mask = inputs.get("tool_mask")
        trained_T = real_T & (tool_mask[row].bool().cpu() if tool_mask is not None else True)
        advantage_1T = inputs.get("log/advantage", inputs["advantages"])[one]
        advantage_1T = advantage_1T.reshape(1, -1).expand(1, len(ids_T))
        number = int(inputs["log/rollout"][row]) + earlier
        columns: dict[str, Any] = {
            "rollout": number,
            "group": number // port.group_size,
            "trained": trained_T[real_T].tolist(),
            "token_id": ids_T[real_T].tolist(),
            "token": token_texts(port.tokenizer, ids_T[real_T].tolist()),
            "advantage": _floats(advantage_1T[0], real_T),
            "logprob": _floats(self.forward[0][row], real_T),
            "entropy": _floats(self.forward[1][row], real_T),
            "weight": [1.0] * int(real_T.sum()),
            "reward": float(inputs["log/reward"][row]),
            "rewards": dict(zip(port.reward_names, inputs["log/rewards"][row].tolist(), strict=True)),
            "neutral": dict(zip(port.reward_names, _row(inputs.get("log/neutral"), row))),
            "prompt": _text(port.tokenizer, inputs["prompt_ids"][row], inputs["prompt_mask"][row]),
        }
        if signals:
            columns["weight"] = _floats(effective_weights(advantage_1T, signals["weight"][one], self.sign)[0], real_T)
            waad_1T, fai_1T, mask_1T = signals["waad"][one].cpu(), signals["fai"][one].cpu(), trained_T[None]
            columns |= {"waad": _floats(waad_1T[0], real_T), "fai": _floats(fai_1T[0], real_T)}
            columns["anchor"] = top_fraction(fai_1T, mask_1T, self.fraction)[0, real_T].tolist()
            columns["preplan"] = top_fraction(delta(waad_1T, mask_1T), mask_1T, self.fraction)[0, real_T].tolist()
        return columns


def _fraction(rule: Any) -> float:
    """A rule's own `top_fraction`, where it is one: a rule of a user's may mean something else by that name."""
    fraction = getattr(rule, "top_fraction", None)
    return fraction if isinstance(fraction, float | int) and 0 < fraction <= 1 else FRACTION


def write_tokens(file: Path, rollouts: list[dict[str, Any]]) -> None:
    """One row a token, in the order of the rollouts; the file appears whole or not at all."""
    names = sorted({name for rollout in rollouts for name in rollout["rewards"]})
    by_reward = [pa.field(f"{column}/{name}", kind) for column, kind in BY_REWARD.items() for name in names]
    schema = pa.schema([*SCHEMA, *by_reward])
    tables = []
    for rollout in sorted(rollouts, key=lambda rollout: rollout["rollout"]):
        count = len(rollout["token_id"])
        columns = {
            **rollout,
            "position": list(range(count)),
            "prompt": [rollout["prompt"], *[None] * (count - 1)][:count],
            **{f"reward/{name}": rollout["rewards"].get(name) for name in names},
            **{f"neutral/{name}": rollout.get("neutral", {}).get(name) for name in names},
        }
        arrays = {field.name: _column(columns.get(field.name), count, field.type) for field in schema}
        tables.append(pa.table(arrays, schema=schema))
    file.parent.mkdir(exist_ok=True)
    beside = file.with_name(f".{file.name}.partial")
    pq.write_table(pa.concat_tables(tables), beside, compression="zstd", write_page_checksum=True)
    os.replace(beside, file)


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each token adds to those before it; a character of several tokens goes to its last one."""
    texts, start, shown = [], 0, 0
    for end in range(1, len(ids) + 1):
        before, now = _decode(tokenizer, ids[start:shown]), _decode(tokenizer, ids[start:end])
        if now.endswith("�") and end < len(ids) and end - shown < CONTEXT:
            texts.append("")
            continue
        texts.append(now[len(before) :])
        start, shown = max(start, end - CONTEXT), end
    return texts


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""


def _text(tokenizer: Any, ids_T: Tensor, mask_T: Tensor) -> str:
    return _decode(tokenizer, ids_T[mask_T.bool()].tolist())


def _row(table_BK: Tensor | None, row: int) -> list[bool]:
    """None: rollouts of a checkpoint that had no such table."""
    return [] if table_BK is None else table_BK[row].tolist()


def _floats(values_T: Tensor, real_T: Tensor) -> list[float]:
    return values_T.detach().float().cpu()[real_T].tolist()


def _column(values: Any, count: int, kind: pa.DataType) -> pa.Array:
    """A list, or one value for every token; NaN becomes null."""
    values = values if isinstance(values, list) else [values] * count
    return pa.array([None if isinstance(v, float) and v != v else v for v in values], kind)

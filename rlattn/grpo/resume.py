"""Exact resume: puts into a checkpoint what transformers and TRL leave out of it, and back where it was.

Exact means: every input of the next step is restored, so that a run that was killed ends with the parameters of one
that was not, bit for bit where its kernels are deterministic (a CPU). Restored here: the order of the prompts in later
epochs, the place inside a generation window and its rollouts (one file a rank), what waits for the next log line, the
state of rewards, lagged policies and calibrated heads. transformers restores weights, optimizer, schedule and random
numbers. Not restored: the reference policy that `sync_ref_model` moves, and a vLLM server's random numbers; in colocate
mode requests are seeded (`rlattn.grpo.second_rollouts.seed_requests`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlattn.errors import UserError, describe
from rlattn.formats.strict_json import to_json
from rlattn.grpo.credit_reader import CreditReader
from rlattn.grpo.port import Port
from rlattn.grpo.reward_hooks import RewardHooks
from rlattn.grpo.token_log import TokenLog
from rlattn.rank import say
from rlattn.run_folder.checkpoints import (
    PARTIAL,
    checkpoint_step,
    checkpoints,
    clear,
    is_write_failure,
    problem,
    rotate,
    seal,
)

GOES_ON = "Make room on the disk, or mend it; the same command then goes on."
HEADS_FILE = "heads.json"  # in a checkpoint: the calibrated head sets, layers x heads


class EpochOrder(Sampler[int]):
    """TRL's sampler, in the order that TRL gives an epoch of an unbroken run: it depends on seed and epoch only.

    TRL draws one permutation an epoch from one generator, so a resumed run replays the first epoch's. Here the earlier
    epochs' permutations are drawn again. The permutation does not depend on the number of ranks. Cost: one
    `torch.randperm` over the rows for every epoch that is over.
    """

    def __init__(self, sampler: Any, seed: int):
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.seed)
            for _ in range(self.epoch):
                torch.randperm(self.sampler.num_samples, generator=self.sampler.generator)
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class ExactResume(TrainerCallback):
    """Writes into a checkpoint what transformers and TRL leave out of it, and puts it back.

    Attributes:
        order: TRL's sampler, in an order that resumes; None for a streamed data set, which has no sampler.
    """

    def __init__(
        self, port: Port, rewards: RewardHooks, reader: CreditReader | None, token_log: TokenLog | None, keep_best: bool
    ):
        self.order: EpochOrder | None = None
        self._port, self._rewards, self._reader, self._token_log = port, rewards, reader, token_log
        self._keep_best = keep_best
        self._saving = False  # into the folder of what is not whole yet
        self._restored: dict[str, Any] | None = None

    def order_of(self, sampler: Any) -> EpochOrder:
        self.order = EpochOrder(sampler, self._port.args.seed)
        return self.order

    def folder(self, output_dir: str) -> str:
        """Where transformers writes a checkpoint: beside its place while one is being saved."""
        return os.path.join(output_dir, PARTIAL) if self._saving else output_dir

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._restored:
            self._port.restore_loss(self._restored)
        self._restored = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.order is not None:
            batches = len(kwargs["train_dataloader"])
            steps = max(1, -(-batches // args.gradient_accumulation_steps))  # transformers' own count of an epoch
            self.order.epoch, inside = divmod(state.global_step, steps)
            # Exact also where the shape of a step has changed; an epoch's last step may have fewer batches.
            self._port.count_micro_batches(self.order.epoch * batches + inside * args.gradient_accumulation_steps)

    def save(self, write: Callable[[], None]) -> None:
        """`write` and what is ours, into a checkpoint that is whole or not there; then old ones go. Collective.

        Where the disk fails, on whichever rank, training goes on with the last good checkpoint, and says so.
        Under DeepSpeed and FSDP it ends.
        """
        port = self._port
        folder, name = Path(str(port.args.output_dir)), f"checkpoint-{port.step}"
        if port.is_main:
            clear(folder)
        port.wait_for_everyone()

        def save() -> None:
            self._saving = True
            try:
                write()
                self._save_place(folder / PARTIAL / name)
            finally:
                self._saving = False

        if port.is_deepspeed or port.is_fsdp:
            try:
                save()  # collective within: a rank that fails alone cannot meet the others, so the run ends
            except Exception as error:
                if not is_write_failure(error):
                    raise
                raise UserError("output_dir", _unwritten(folder, name, describe(error)), GOES_ON) from error
            port.wait_for_everyone()  # before the seal: all ranks write
            failed = None
        else:
            failed = _failure_on_any_rank(save)
        if not failed:
            failed = _failure_on_any_rank(lambda: seal(folder, name) if port.is_main else None)
        if failed:
            say(f"warning: {_unwritten(folder, name, failed)} Look after the disk.")
        best = port.state.best_global_step  # of transformers' own evaluation, whose path still names `.partial`
        if best and (folder / f"checkpoint-{best}").is_dir():
            port.state.best_model_checkpoint = str(folder / f"checkpoint-{best}")
        if not port.is_main:
            return
        if failed:
            clear(folder)
        else:
            rotate(folder, port.step, keep_last=port.args.save_total_limit, best_step=self._best_step(folder))

    def _best_step(self, folder: Path) -> int | None:
        """The step of the checkpoint with the best held-out accuracy; of equals, the latest."""
        there, state = {checkpoint_step(path) for path in checkpoints(folder)}, self._port.state
        rows = [row for row in state.log_history if "eval_accuracy" in row and row["step"] in there]
        best = max(rows, key=lambda row: (row["eval_accuracy"], row["step"]), default=None)
        return int(best["step"]) if best and self._keep_best else state.best_global_step

    def _save_place(self, folder: Path) -> None:
        """Writes what is ours into a checkpoint. Every rank calls it, none waits for another."""
        folder.mkdir(parents=True, exist_ok=True)
        heads = self._token_log.heads if self._token_log else {}
        place = {**self._port.place(), "heads": heads, "window": window_shape(self._port)}
        torch.save(place, self._file(folder))
        if not self._port.is_main:
            return
        self._rewards.save(folder)
        reader = self._reader
        if reader and reader.attention.scope == "calibrated" and reader.heads is not None:
            local_LH, global_LH = (heads_LH.tolist() for heads_LH in reader.heads)
            (folder / HEADS_FILE).write_text(to_json({"local": local_LH, "global": global_LH}), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Reads it back. Written by another number of ranks, an unfinished window's rollouts are generated anew."""
        port = self._port
        order_gradients(port)
        self._rewards.load(folder)
        device: Any = "cpu" if port.device.type == "cpu" else port.device  # torch.load knows no "cpu:0"
        if self._reader and self._reader.attention.scope == "calibrated" and (folder / HEADS_FILE).is_file():
            sets = json.loads((folder / HEADS_FILE).read_text(encoding="utf-8"))
            local_LH, global_LH = (torch.tensor(sets[name], device=device) for name in ("local", "global"))
            self._reader.heads = local_LH, global_LH
        file = self._file(folder)
        place = torch.load(file, map_location=device, weights_only=True) if file.is_file() else None
        if place is not None and place["rollouts"] and place.get("window", window_shape(port)) != window_shape(port):
            port.count_micro_batches(port.step * port.args.gradient_accumulation_steps)
            say(f"{folder.name} lies inside a generation window of another shape: its rollouts are generated anew.")
            return
        if place is None:
            port.count_micro_batches(port.step * port.args.gradient_accumulation_steps)
            say(
                f"{folder.name} was not written by {port.ranks} rank(s): random numbers start anew, and so do "
                "the rollouts of an unfinished generation window. From here on the run is not what it would have been."
            )
            return
        if self._token_log:
            heads = place.get("heads", {})  # on the CPU there: at the next due step those of all ranks are stacked
            self._token_log.heads = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in heads.items()}
        port.restore_place(place)
        self._restored = place

    def _file(self, folder: Path) -> Path:
        return folder / f"rank-{self._port.rank}-of-{self._port.ranks}.pt"


def window_shape(port: Port) -> list[int]:
    """What the rollouts of a generation window are cut by."""
    args = port.args
    return [args.per_device_train_batch_size, args.steps_per_generation, args.num_iterations, port.group_size]


def order_gradients(port: Port) -> None:
    """Makes DDP sum gradients in the order that it would have in an unbroken run.

    DDP puts the parameters into the order of their gradients after the first backward pass of a process, and a sum over
    three or more ranks depends on that order. So a process that goes on from a checkpoint makes that pass beforehand,
    over a meaningless text; no gradient of it is kept, no random number is drawn. Collective. Not for policies that
    read images: a text alone gives their vision tower no gradient. Cost: one pass over 16 tokens.
    """
    model: Any = port.wrapped_policy
    if not isinstance(model, DistributedDataParallel) or model.find_unused_parameters:
        return
    if port.processor is not port.tokenizer:
        return
    ids_1N = torch.arange(16, device=port.device)[None]
    training = model.training
    model.train()
    with torch.random.fork_rng(devices=[port.device] if port.device.type == "cuda" else []):
        model(input_ids=ids_1N, attention_mask=torch.ones_like(ids_1N)).logits.sum().backward()
    model.zero_grad(set_to_none=True)
    model.train(training)


def _unwritten(folder: Path, name: str, why: str) -> str:
    last = next((path.name for path in reversed(checkpoints(folder)) if problem(path, hashes=False) is None), "none")
    return f"{name} could not be written ({why}); the last good one is {last}."


def _failure_on_any_rank(act: Callable[[], None]) -> str | None:
    """Runs `act`; how the disk failed it on the first rank where it did. Collective."""
    failed = None
    try:
        act()
    except Exception as error:
        if not is_write_failure(error):
            raise
        failed = describe(error)
    return next((found for found in gather_object([failed]) if found), None)

"""Glue: exact resume. Puts into a checkpoint what transformers and TRL leave out of it, and back where it was.

Exact means: every input of the next step is restored, so that a run that was killed ends with the parameters of one
that was not, bit for bit where its kernels are deterministic (a CPU). Restored here: the order of the prompts in later
epochs, the place inside a generation window and its rollouts (one file a rank), what waits for the next log line, the
state of rewards, lagged policies and calibrated heads. transformers restores weights, optimizer, schedule and random
numbers. Not restored: the reference policy that `sync_ref_model` moves, and a vLLM server's random numbers; in colocate
mode requests are seeded (`rlattn.grpo.second_rollouts.seed_requests`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlattn.errors import UserError, describe
from rlattn.grpo.reward_hooks import load_rewards, save_rewards
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

if TYPE_CHECKING:
    from rlattn.grpo.trainer import AttentionGRPOTrainer

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


class RestorePlace(TrainerCallback):
    """Tells the sampler its epoch and TRL its place in it, and puts the loss between two log lines back, which
    transformers sets to 0.
    """

    def __init__(self, trainer: AttentionGRPOTrainer):
        self.trainer = trainer
        self.logged: dict[str, Any] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for name, value in self.logged.items():
            setattr(self.trainer, name, value)
        self.logged = {}

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        order = self.trainer._order
        if order is not None:
            batches = len(kwargs["train_dataloader"])
            steps = max(1, -(-batches // args.gradient_accumulation_steps))  # transformers' own count of an epoch
            order.epoch, inside = divmod(state.global_step, steps)
            # Exact also where the shape of a step has changed; an epoch's last step may have fewer batches.
            self.trainer._step = order.epoch * batches + inside * args.gradient_accumulation_steps


def save_durably(trainer: AttentionGRPOTrainer, write: Callable[[], None]) -> None:
    """`write` and what is ours, into a checkpoint that is whole or not there; then old ones go. Collective.

    Where the disk fails, on whichever rank, training goes on with the last good checkpoint, and says so.
    Under DeepSpeed and FSDP it ends.
    """
    folder, step = Path(str(trainer.args.output_dir)), trainer.state.global_step
    name = f"checkpoint-{step}"
    if trainer.is_world_process_zero():
        clear(folder)
    trainer.accelerator.wait_for_everyone()

    def save() -> None:
        trainer._saving = True
        try:
            write()
            save_place(trainer, folder / PARTIAL / name)
        finally:
            trainer._saving = False

    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        try:
            save()  # collective within: a rank that fails alone cannot meet the others, so the run ends
        except Exception as error:
            if not is_write_failure(error):
                raise
            raise UserError("output_dir", _unwritten(folder, name, describe(error)), GOES_ON) from error
        trainer.accelerator.wait_for_everyone()  # before the seal: all ranks write
        failed = None
    else:
        failed = _failure_on_any_rank(save)
    if not failed:
        failed = _failure_on_any_rank(lambda: seal(folder, name) if trainer.is_world_process_zero() else None)
    if failed:
        say(f"warning: {_unwritten(folder, name, failed)} Look after the disk.")
    best = trainer.state.best_global_step  # of transformers' own evaluation, whose path still names `.partial`
    if best and (folder / f"checkpoint-{best}").is_dir():
        trainer.state.best_model_checkpoint = str(folder / f"checkpoint-{best}")
    if not trainer.is_world_process_zero():
        return
    if failed:
        clear(folder)
    else:
        rotate(folder, step, keep_last=trainer.args.save_total_limit, best_step=_best_step(trainer, folder))


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


def _best_step(trainer: AttentionGRPOTrainer, folder: Path) -> int | None:
    """The step of the checkpoint with the best held-out accuracy; of equals, the latest."""
    there = {checkpoint_step(path) for path in checkpoints(folder)}
    rows = [row for row in trainer.state.log_history if "eval_accuracy" in row and row["step"] in there]
    best = max(rows, key=lambda row: (row["eval_accuracy"], row["step"]), default=None)
    return int(best["step"]) if best and trainer.keep_best else trainer.state.best_global_step


def save_place(trainer: AttentionGRPOTrainer, folder: Path) -> None:
    """Writes what is ours into a checkpoint. Every rank calls it, none waits for another."""
    folder.mkdir(parents=True, exist_ok=True)
    inside = trainer._step % _window(trainer) > 0
    place = {
        "step": trainer._step,
        "rollouts": trainer._buffered_inputs if inside else None,
        "metrics": {name: [float(value) for value in values] for name, values in trainer._metrics["train"].items()},
        "loss": trainer._tr_loss,
        "last_logged": trainer._globalstep_last_logged,
        "heads": trainer.token_log.heads if trainer.token_log else {},
        "window": _shape(trainer),
    }
    torch.save(place, _file(trainer, folder))
    if not trainer.is_world_process_zero():
        return
    save_rewards(trainer, trainer._lagged, folder)
    if trainer.attention.scope == "calibrated" and trainer._heads is not None:
        local_LH, global_LH = (heads_LH.tolist() for heads_LH in trainer._heads)
        (folder / HEADS_FILE).write_text(json.dumps({"local": local_LH, "global": global_LH}), encoding="utf-8")


def load_place(trainer: AttentionGRPOTrainer, folder: Path) -> None:
    """Reads it back. Written by another number of ranks, an unfinished window's rollouts are generated anew."""
    load_rewards(trainer, trainer._lagged, folder)
    device: Any = "cpu" if trainer.args.device.type == "cpu" else trainer.args.device  # torch.load knows no "cpu:0"
    if trainer.attention.scope == "calibrated" and (folder / HEADS_FILE).is_file():
        sets = json.loads((folder / HEADS_FILE).read_text(encoding="utf-8"))
        local_LH, global_LH = (torch.tensor(sets[name], device=device) for name in ("local", "global"))
        trainer._heads = local_LH, global_LH
    file = _file(trainer, folder)
    place = torch.load(file, map_location=device, weights_only=True) if file.is_file() else None
    if place is not None and place["rollouts"] and place.get("window", _shape(trainer)) != _shape(trainer):
        trainer._step = trainer.state.global_step * trainer.args.gradient_accumulation_steps
        say(f"{folder.name} lies inside a generation window of another shape: its rollouts are generated anew.")
        return
    if place is None:
        trainer._step = trainer.state.global_step * trainer.args.gradient_accumulation_steps
        say(
            f"{folder.name} was not written by {trainer.args.world_size} rank(s): random numbers start anew, and so do "
            "the rollouts of an unfinished generation window. From here on the run is not the one it would have been."
        )
        return
    if trainer.token_log:
        heads = place.get("heads", {})  # on the CPU there: at the next due step those of all ranks are stacked
        trainer.token_log.heads = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in heads.items()}
    trainer._step, trainer._buffered_inputs = place["step"], place["rollouts"]
    for name, values in place["metrics"].items():
        trainer._metrics["train"][name].extend(values)
    trainer._place.logged = {"_tr_loss": place["loss"], "_globalstep_last_logged": place["last_logged"]}


def _window(trainer: AttentionGRPOTrainer) -> int:
    """Batches that are trained on before the next generation."""
    args: Any = trainer.args
    return int(args.steps_per_generation * trainer.num_iterations)


def _shape(trainer: AttentionGRPOTrainer) -> list[int]:
    """What the rollouts of a window are cut by."""
    args: Any = trainer.args
    return [args.per_device_train_batch_size, args.steps_per_generation, trainer.num_iterations, trainer._group_size]


def _file(trainer: AttentionGRPOTrainer, folder: Path) -> Path:
    return folder / f"rank-{trainer.args.process_index}-of-{trainer.args.world_size}.pt"

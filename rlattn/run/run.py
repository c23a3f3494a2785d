"""One run, from a recipe to a finished run folder."""

import math
import os
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch.distributed.elastic.multiprocessing.errors import record

from rlattn.errors import UserError, describe
from rlattn.grpo.port import Port
from rlattn.grpo.resume import GOES_ON
from rlattn.grpo.token_log import TokenLog
from rlattn.policy.prompts import decode, render_text
from rlattn.preflight.preflight import Cleared
from rlattn.processes.phases import Phases
from rlattn.processes.process_group import renew_store
from rlattn.processes.signals import StopSignals
from rlattn.processes.watchdog import OtherRankFailed, Watchdog
from rlattn.progress import duration
from rlattn.rank import is_main, say, world_size
from rlattn.recipe.constraints import number
from rlattn.recipe.schema import Recipe
from rlattn.report import write_report
from rlattn.report.alarms import find_alarms
from rlattn.run.build import make_trainer, prepare, tracker_environment
from rlattn.run.callbacks import Alarms, HeldOutEvaluation, MetricsFile, Progress
from rlattn.run.finish import finish
from rlattn.run.live_table import LiveTable
from rlattn.run.wandb import WandbRun, wandb_environment
from rlattn.run_folder.checkpoints import checkpoint_step, checkpoints, is_full_disk, problem
from rlattn.run_folder.folder import FAILURES, leave_run, lock_run, open_run, sound_checkpoint, start_run
from rlattn.run_folder.jsonl import append_row

TRACKER_VARIABLES = {
    "WANDB_PROJECT", "WANDB_DIR", "WANDB_TAGS", "WANDB_RUN_ID", "WANDB_RESUME", "TENSORBOARD_LOGGING_DIR",
}  # fmt: skip
GLOO_SECONDS = 0.5  # its threads, when late, are so by milliseconds


def train(recipe: Recipe, found: Cleared | None = None) -> None:
    """Runs a recipe to its end, or on from its last checkpoint. Raises UserError before any weight loads."""
    phases = Phases()
    environment = dict(os.environ)
    try:
        stopped_by = record(_watched)(recipe, found, phases)  # torchrun then ends with the first error of any rank
    except OtherRankFailed:
        sys.exit(1)
    except KeyboardInterrupt:
        kept = checkpoints(recipe.run_dir / "checkpoints")
        say(f"\nrlattn: interrupted; the same command {f'goes on from {kept[-1].name}' if kept else 'starts over'}.")
        sys.exit(130)
    except UserError:
        if is_main() and phases.trained:  # the watchdog is over, and leaves time for it
            say(f"\nwhat was logged so far: {write_report(recipe.run_dir)}")
        raise
    finally:  # a second run of this process has a folder of its own
        for name in TRACKER_VARIABLES - environment.keys():
            os.environ.pop(name, None)
    if stopped_by:
        sys.exit(128 + stopped_by)


def _watched(recipe: Recipe, found: Cleared | None, phases: Phases) -> int:
    with Watchdog(phases, recipe.resume.stall_seconds) as watchdog:
        return _told(recipe, found, watchdog)


def _told(recipe: Recipe, found: Cleared | None, watchdog: Watchdog) -> int:
    """Runs `_train` and turns errors that the user can fix into UserError."""
    try:
        return _train(recipe, found, watchdog)
    except SystemExit as error:  # `record` would take it for an end
        problem = f"code of a task, a reward or a rule ended the process: {describe(error)}."
        raise UserError("python", problem, "Raise an error there instead.") from None
    except Exception as error:
        if fault := of_the_disk(error, recipe.run_dir):
            raise fault from error
        raise


def of_the_disk(error: Exception, run: Path) -> UserError | None:
    """The user's error where the disk is full, or something in the run's folder is of the wrong kind."""
    if isinstance(error, UserError):
        return None
    if is_full_disk(error):
        return UserError("output_dir", f"the disk of {run} is full: {describe(error)}.", GOES_ON)
    name = getattr(error, "filename", None)
    if isinstance(error, OSError) and isinstance(name, str) and Path(name).is_relative_to(run):
        return UserError("output_dir", f"{name}: {error.strerror}.", "Move it away; the same command then goes on.")
    return None


def _train(recipe: Recipe, found: Cleared | None, watchdog: Watchdog) -> int:
    """The signal that stopped it; 0 at its end."""
    began = time.monotonic()
    renew_store()
    if open_run(recipe) is None:
        say(
            f"{recipe.run_dir} is complete: see its report.html. To train on, raise trainer.max_steps and add\n"
            "resume.allow_changed='[trainer.max_steps]'; to start over, name another output_dir."
        )
        return 0
    lock = lock_run(recipe.run_dir) if is_main() else None
    try:
        checkpoint = sound_checkpoint(recipe, world_size()) if is_main() else None
        start_step = checkpoint_step(checkpoint) if checkpoint else 0
        setup = prepare(recipe, found)
    except UserError:
        if lock:
            leave_run(recipe.run_dir, lock)
        raise
    if is_main():
        start_run(recipe, start_step, world_size())
    evaluation = HeldOutEvaluation(
        setup.task,
        setup.examples,
        every=recipe.trainer.get("eval_steps") if recipe.trainer.get("eval_strategy") != "no" else None,
        samples=recipe.tracking.samples,
        run_dir=recipe.run_dir,
    )
    stop = StopSignals(recipe.resume.grace_seconds)
    callbacks = [stop, MetricsFile(recipe.run_dir), evaluation]  # an evaluation may take longer than the grace time
    if is_main():
        callbacks.append(Alarms(recipe.run_dir))
    shown = (LiveTable() if sys.stderr.isatty() else Progress(evaluation)) if is_main() else None
    callbacks += [shown] if shown else []
    tracking = recipe.tracking
    token_log = (
        TokenLog(recipe.run_dir, rollouts=tracking.token_rollouts, every=tracking.token_every, seed=recipe.seed)
        if tracking.token_rollouts
        else None
    )
    os.environ |= tracker_environment(recipe)
    if is_main() and "wandb" in tracking.report_to:
        os.environ |= {k: v for k, v in wandb_environment(recipe.run_dir).items() if k not in os.environ}
    failures = partial(append_row, recipe.run_dir / FAILURES)
    trainer = make_trainer(setup, recipe.run_dir / "checkpoints", callbacks, token_log, watchdog.phases, failures)
    evaluation.port = trainer.port
    checkpoint = same_on_all_ranks(recipe.run_dir / "checkpoints", checkpoint)
    if isinstance(shown, LiveTable):
        shown.completion = lambda: decode(trainer.port.tokenizer, list(trainer.latest_completion), trainer.port.end_ids)
    if is_main() and "wandb" in tracking.report_to:
        trainer.add_callback(WandbRun(recipe))  # behind the token log
    if checkpoint:
        say(f"continuing from {checkpoint}")
    stop.listen()
    try:
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Exception as error:
        if not type(error).__module__.startswith("wandb"):
            raise
        fix = "Mend it, or set WANDB_MODE=offline: `wandb sync` uploads the run later."
        raise UserError("tracking.report_to", f"wandb: {describe(error)}.", fix) from None
    finally:
        stop.leave()
        if isinstance(shown, LiveTable):
            shown.live.stop()  # whatever happened, the terminal gets its cursor back
    if stop.stopped_by:
        saved = recipe.run_dir / "checkpoints" / f"checkpoint-{result.global_step}"
        say(
            f"\nstopped by {stop.stopped_by.name} after step {result.global_step}"
            f"{f', saved in {saved}' if saved.is_dir() else ''}; the same command goes on from the last checkpoint."
        )
        end_ranks(trainer.port)
        return stop.stopped_by
    save_model(trainer.port, recipe.run_dir / "model")
    if is_main():
        finish(setup, evaluation.latest, result, time.monotonic() - began, start_step)
    if lock:
        lock.release()
    watchdog.wait_for_rank_0()
    end_ranks(trainer.port)
    return 0


def end_ranks(port: Port) -> None:
    """Leaves the process group of several ranks, and gives its threads time to let go of their last tensors.

    DDP keeps gloo's threads alive to the end. One that is late and frees a tensor while the interpreter shuts down ends
    a run in which all is done by SIGABRT ("terminate called without an active exception").
    """
    if torch.distributed.is_initialized():
        port.end_training()
        time.sleep(GLOO_SECONDS)


def same_on_all_ranks(folder: Path, checkpoint: Path | None) -> Path | None:
    """The checkpoint that rank 0 has chosen, every byte read; here its sizes are looked at. Collective.

    Raises:
        UserError: the ranks see different folders.
    """
    name = gather_object([checkpoint and checkpoint.name])[0]
    chosen = folder / name if name else None
    if problem(chosen, hashes=False) if chosen else checkpoints(folder):
        found = f"the ranks find different checkpoints in {folder}."
        raise UserError("output_dir", found, "Use a folder all nodes see.")
    return chosen


def dry_run(recipe: Recipe, found: Cleared | None = None) -> None:
    """The rendered prompt, one step, and how long the whole run would take. Leaves nothing behind."""
    setup = prepare(recipe, found)
    first = setup.examples[0]
    say("The first held-out prompt, as the policy reads it:\n")
    say(render_text(setup.policy.tokenizer, first["prompt"], recipe.template_kwargs))
    with tempfile.TemporaryDirectory(prefix="rlattn-dry-run-") as folder:
        trainer = make_trainer(
            setup, Path(folder), [], max_steps=1, logging_steps=1, save_strategy="no", report_to="none"
        )
        steps = planned_steps(trainer.port, recipe)
        say("\nOne step …")
        result = trainer.train()
    seconds = result.metrics["train_runtime"]
    log = trainer.state.log_history[0]
    say(f"\nreward {log['reward']:.3f}, completions of {log['completions/mean_length']:.0f} tokens, {seconds:.1f} s.")
    apart = "evaluation and the supervised control" if recipe.policy.supervised_control else "evaluation"
    say(f"{steps} steps would take about {duration(seconds * steps)}, {apart} apart (the first step is the slowest).")
    for alarm in find_alarms(trainer.state.log_history):
        say(f"warning: {alarm}")
    say("Next: the same command without --dry-run.")
    end_ranks(trainer.port)


def planned_steps(port: Port, recipe: Recipe) -> int:
    """Optimizer steps of the whole run, from max_steps or from epochs over the rows."""
    steps = number(recipe, "max_steps", -1)
    if steps > 0:
        return steps
    per_step = port.args.train_batch_size * port.ranks * port.args.gradient_accumulation_steps
    return math.ceil(float(recipe.trainer.get("num_train_epochs", 3.0)) * port.rollouts_an_epoch / per_step)


def save_model(port: Port, folder: Path) -> None:
    """Full weights or adapter, tokenizer and generation config; collective, and whole or not at all."""
    beside = folder.with_name(f".{folder.name}.partial")
    if is_main():
        shutil.rmtree(beside, ignore_errors=True)
    port.wait_for_everyone()
    port.save_model(beside)
    port.wait_for_everyone()
    if is_main():
        (beside / "training_args.bin").unlink(missing_ok=True)  # a pickle of this machine's paths
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        else:
            folder.unlink(missing_ok=True)
        beside.rename(folder)

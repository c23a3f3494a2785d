"""Shared by the tests: policies and recipes small enough for a CPU, and a cache that lasts one test session."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import hypothesis
import pytest
from forked import PYTHON, SERVER, start_server

REPO = Path(__file__).parent.parent
hypothesis.settings.register_profile("any machine", deadline=None)  # a busy one is slow, not wrong
hypothesis.settings.load_profile("any machine")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"  # two test processes on two cores, and the same sums everywhere
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    os.environ["RLATTN_CACHE"] = str(shared / "cache")


# A run of seconds: a barely warm-started policy, three steps.
SMALL = (
    "policy.warm_start={steps: 18, batch_size: 16, learning_rate: 1e-2}",
    "policy.supervised_control=false",
    "task={kind: arithmetic, terms: [3, 3], eval_rows: 8}",
    "rewards={accuracy: {}, format: {weight: 0.1}, variety: {python: 'variety:Variety'}}",
    "trainer={max_steps: 3, num_generations: 4, per_device_train_batch_size: 8, max_completion_length: 64,"
    " learning_rate: 1e-3, gradient_checkpointing: false, eval_steps: 2, save_steps: 2, per_device_eval_batch_size: 8}",
)


# Files whose tests train, launch ranks, compile, build a package or start a browser, and others of 15 s and more.
SLOW = {
    "another_world_size", "answers", "attention_capture", "attention_kernels", "bench_attention", "bench_credit",
    "checkpoints", "compare", "credit_properties", "credit_training", "dialogues", "effort", "eval", "eval_deception",
    "eval_flips", "eval_probes", "eval_tasks", "gpu_smoke", "heads", "image_rollouts", "inspect", "inspect_mistakes",
    "launch", "launch_files", "ledger", "live", "long_texts", "memory", "monitored_training", "no_hangs", "open_run",
    "package", "policy_weights", "report_in_chromium", "report_size", "resume", "resume_of_rewards",
    "reward_training", "run", "safe_metrics", "seeded_requests", "self_monitor", "shaped_gradients", "stopping",
    "terminal", "tiny", "token_log", "trl_contract", "vanished_ranks", "wandb_account", "weight_sync",
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW:
            item.add_marker("slow")


def pytest_configure(config: pytest.Config) -> None:
    if SERVER not in os.environ:  # a worker of xdist, and a pytest that a test starts, share it
        folder = tempfile.TemporaryDirectory()
        server = start_server(Path(folder.name))
        config.add_cleanup(folder.cleanup)
        config.add_cleanup(lambda: server.communicate())


def rlattn(
    *arguments: str, cwd: Path, ranks: int = 0, restarts: int = 0, timeout: float = 300, forked: bool = True
) -> subprocess.CompletedProcess[str]:
    """Runs the command line as a user would, or under torchrun when `ranks` is given.

    `forked`: in a copy of a process that has imported the libraries (tests/forked.py) instead of one of its own.
    """
    if ranks:
        assert arguments[0] == "train"
        return torchrun("-m", "rlattn.train", *arguments[1:], cwd=cwd, ranks=ranks, restarts=restarts, timeout=timeout)
    command = [*(PYTHON if forked else (sys.executable,)), "-m", "rlattn.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)


def torchrun(
    *program: str, cwd: Path, ranks: int = 2, restarts: int = 0, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Runs a module or a script, with its arguments, on ranks that are copies too."""
    launcher = ["torch.distributed.run", f"--nproc-per-node={ranks}", "--master-port=0", "--standalone"]
    launcher += [f"--max-restarts={restarts}", "--no-python"]
    command = [*PYTHON, "-m", *launcher, *PYTHON, *program]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)


def without(modules: Iterable[str], code: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs code in an interpreter of its own, which must end well and without having imported any of the modules."""
    code = f"import sys\n{code}\nfound = {set(modules)} & set(sys.modules)\nassert not found, found"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result


def command_without(
    modules: Iterable[str], *arguments: str, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """The same of a command; its exit code is the last line that it prints, 0 where it has none."""
    code = f"from rlattn.cli import main\ntry: main({list(arguments)})\nexcept SystemExit as end: print(end.code or 0)"
    return without(modules, code, cwd)


def leave_ranks() -> None:
    """Ends a rank of a test's script. DDP keeps gloo's threads alive, and one that frees a tensor while the interpreter
    shuts down aborts it; what is tested is done.
    """
    import torch

    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)

"""Runs the command line in a process forked off one that has imported the slow libraries already.

Every start of `python -m rlattn.cli` spends seconds on imports. What a test asserts of signals, of the interpreter's
own end, of W&B (it makes its folder of temporary files at import) or of what is imported needs a real start.
"""

import atexit
import io
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["rlattn.run.run", "rlattn.inspection.figures", "rlattn.evaluation.answers", "pytest"])


def run_cli(arguments: list[str], cwd: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """What `python -m rlattn.cli ARGUMENTS` returns and prints."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given = multiprocessing.reduction.DupFd(out.fileno()), multiprocessing.reduction.DupFd(err.fileno())
        process = CONTEXT.Process(target=_run, args=(arguments, str(cwd), dict(os.environ), *given))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(["rlattn", *arguments], timeout)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        return subprocess.CompletedProcess(["rlattn", *arguments], process.exitcode, *texts)


def _run(arguments: list[str], cwd: str, environment: dict[str, str], out: object, err: object) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, file in ((1, out), (2, err)):
        os.dup2(file.detach(), number)  # type: ignore[attr-defined]
    sys.stdin = io.StringIO()
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(n, "w", closefd=False), line_buffering=True) for n in (1, 2))
    sys.argv = ["rlattn", *arguments]
    sys.path[:0] = [cwd, *environment["PYTHONPATH"].split(os.pathsep)]  # as `python -m` has it
    code = 0
    try:
        runpy.run_module("rlattn.cli", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

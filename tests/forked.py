"""Starts Python programs as copies of a process that has imported the slow libraries already.

`[*PYTHON, "-m", "rlattn.cli", "train", …]` does what `[sys.executable, "-m", "rlattn.cli", "train", …]` does, without
its many seconds of imports: a client that a test (or torchrun) starts, kills and waits for, and a server that forks a
copy of itself for each client and gives it the client's arguments, environment, folder, stdin, stdout and stderr.
Signals go through to the copy, and what ends the copy ends its client. The copy's parent is its client's; its terminal
is the one that its client was given and that is no other session's; what it starts with `sys.executable` is a copy too.
A program that is given more open files is started really, and what a test asserts of imports needs a real start.
"""

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

PYTHON = (sys.executable, "-S", __file__)
PRELOADED = (
    "rlattn.run.run",
    "rlattn.inspection.figures",
    "rlattn.evaluation.answers",
    "pytest",
    "torch.distributed.launcher.api",
    "deepspeed",
    "wandb",
)
SERVER = "RLATTN_TESTS_FORK_SERVER"  # its socket's path
STREAMS = 3
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def copies() -> Path:
    """An environment whose Python starts copies."""
    return Path(os.environ[SERVER]).parent / "copies"


def start_server(folder: Path) -> subprocess.Popen:
    """It ends with the process that started it, and imports when it is first asked."""
    os.environ[SERVER] = str(folder / "fork-server")
    os.environ["TRACKIO_DIR"] = str(folder / "trackio")  # Trackio reads it at import
    python = copies() / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {" ".join(PYTHON)} "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return subprocess.Popen([sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, start_new_session=True)


def main() -> None:
    if sys.argv[1:] == ["--serve"]:
        return serve()
    if _inherited():  # a copy would not have them
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ[SERVER])
        ignored = [number for number in PASSED_ON if signal.getsignal(number) == signal.SIG_IGN]
        asked = {"argv": sys.argv[1:], "cwd": os.getcwd(), "environment": dict(os.environ)}
        asked |= {"client": os.getpid(), "ignored": ignored}
        text = json.dumps(asked).encode()
        socket.send_fds(server, [len(text).to_bytes(8, "big")], list(range(STREAMS)))
        server.sendall(text)
        pid = int.from_bytes(_read(server, 8), "big")
        for number in PASSED_ON:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, _: os.kill(pid, number))
        status = int.from_bytes(_read(server, 8), "big")
    if os.WIFSIGNALED(status):
        with contextlib.suppress(OSError):  # SIGKILL's cannot be set
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def _inherited() -> list[int]:
    """The open files that this process was given beyond the three."""
    found = [int(name) for name in os.listdir("/proc/self/fd")]
    return [number for number in found if number >= STREAMS and os.path.exists(f"/proc/self/fd/{number}")]


def _read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise EOFError("the other end is gone")
        data += more
    return data


def _preload() -> None:
    import importlib

    for name in PRELOADED:
        importlib.import_module(name)
    # Its faster gloo would be compiled by the first run under DeepSpeed: minutes in a new environment.
    sys.modules["deepspeed.ops"].__compatible_ops__["deepspeed_shm_comm"] = False


def serve() -> None:
    import selectors

    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)  # closed by the end of the process that started this
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.environ[SERVER])
    listener.listen(64)
    selector.register(listener, selectors.EVENT_READ)
    running: dict[int, socket.socket] = {}
    while True:
        for key, _ in selector.select(0.02 if running else None):
            if key.fileobj == 0:
                for pid in running:
                    _kill(pid)
                return
            if key.fileobj is listener:
                _preload()
                connection, _ = listener.accept()
                streams: list[int] = []
                try:
                    data, streams, _, _ = socket.recv_fds(connection, 8, STREAMS)
                    asked = json.loads(_read(connection, int.from_bytes(data, "big")))
                    pid = os.fork()
                    if pid == 0:
                        try:
                            run(asked, streams)
                        finally:
                            os._exit(1)
                    running[pid] = connection
                    selector.register(connection, selectors.EVENT_READ, pid)
                    connection.sendall(pid.to_bytes(8, "big"))
                except (EOFError, OSError, ValueError):  # a client that was killed while it asked
                    if connection not in running.values():
                        connection.close()
                finally:
                    for stream in streams:
                        os.close(stream)
            else:  # its client was killed
                _kill(key.data)
                selector.unregister(key.fileobj)
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                connection = running.pop(pid)
                with contextlib.suppress(KeyError):
                    selector.unregister(connection)
                with contextlib.suppress(OSError):
                    connection.sendall(status.to_bytes(8, "big"))
                connection.close()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def run(asked: dict, streams: list[int]) -> None:
    """In the copy: what `python ARGV` would do, to its end."""
    import atexit
    import fcntl
    import io
    import runpy
    import termios
    import threading
    import types

    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    with contextlib.suppress(OSError):  # no terminal, or another session's
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for number in PASSED_ON:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in asked["ignored"] else default)
    media = sys.modules["wandb.sdk.data_types._private"].MEDIA_TMP  # W&B makes it at import and removes it at the end
    media._finalizer.detach()
    media.name = tempfile.mkdtemp("wandb-media")
    os.getppid = lambda: _parent(asked["client"])
    sys.executable = str(copies() / "bin" / "python")
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["cwd"])
    sys.stdin, sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(n, "r" if n == 0 else "w", closefd=False), line_buffering=True)
        for n in range(STREAMS)
    )
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    argv = [argument for argument in asked["argv"] if argument != "-u"]  # torchrun's: lines are not held back here
    how = argv[0] if argv[0] in ("-m", "-c") else "a script"
    sys.argv = argv if how == "a script" else argv[1:] if how == "-m" else ["-c", *argv[2:]]
    here = str(Path(argv[0]).parent.resolve()) if how == "a script" else os.getcwd()
    sys.path[0] = here
    sys.path[1:1] = asked["environment"].get("PYTHONPATH", "").split(os.pathsep)
    code = 0
    try:
        if how == "-m":
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        elif how == "-c":
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(argv[1], vars(sys.modules["__main__"]))  # noqa: S102
        else:
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()

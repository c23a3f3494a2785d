"""A process of its own for a reward's `score`, so that one that hangs can be killed: `rewards: {x: {timeout: 5}}`."""

import contextlib
import multiprocessing
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection

from rlattn.errors import describe
from rlattn.rewards.protocol import score_safely
from rlattn.types import Reward, Rollout

START_SECONDS = 120.0  # a reward may import much


class ScoreWorker:
    """Scores rollouts one after the other in a process of its own; one that takes too long costs only itself.

    Cost: starting the process once (and again after each that hung), then sending rollouts and scores.
    """

    def __init__(self, reward: Reward, seconds: float):
        self.reward, self.seconds = reward, seconds
        self.process: subprocess.Popen | None = None
        self.pipe: Connection | None = None

    def score(self, rollouts: Sequence[Rollout]) -> list[tuple[float | None, str]]:
        """As `score_safely` for each, with a note where it took longer than the timeout."""
        results: list[tuple[float | None, str]] = []
        while len(results) < len(rollouts):
            try:
                pipe = self._started()
            except Exception as error:
                self.stop()
                left = len(rollouts) - len(results)
                results += [(None, f"its process did not start: {describe(error)}")] * left
                break
            try:
                pipe.send(list(rollouts[len(results) :]))
                while len(results) < len(rollouts):
                    if not pipe.poll(self.seconds):
                        results.append((None, f"took longer than {self.seconds:g} s"))
                        self.stop()
                        break
                    results.append(pipe.recv())
            except (EOFError, BrokenPipeError, ConnectionResetError):
                results.append((None, "ended its process"))
                self.stop()
            except Exception as error:  # what cannot be pickled
                self.stop()
                left = len(rollouts) - len(results)
                results += [(None, f"cannot be sent to its process: {describe(error)}")] * left
        return results

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
        if self.pipe:
            self.pipe.close()
        self.process = self.pipe = None

    def _started(self) -> Connection:
        if self.pipe is None:
            # Not multiprocessing.Process: it would import the user's training script again.
            self.pipe, theirs = multiprocessing.Pipe()
            with theirs:
                command = [sys.executable, "-m", "rlattn.rewards.timeout", str(theirs.fileno())]
                self.process = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
                )  # a signal that ends the run after this step is not meant for it
            self.pipe.send(self.reward)
            if not self.pipe.poll(START_SECONDS):
                raise TimeoutError(f"nothing came from it in {START_SECONDS:g} s")
            self.pipe.recv()
        return self.pipe


def _serve(pipe: Connection) -> None:
    reward = pipe.recv()
    pipe.send("ready")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            for rollout in pipe.recv():
                pipe.send(score_safely(reward, rollout))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))

"""Rewards that hang or end their process, in a file that is imported at once: a process of their own imports it."""

import os
import time
from dataclasses import dataclass


@dataclass
class Hanging:
    timeout: float = 0.5

    def score(self, rollout):
        if rollout.completion_ids[-1] % 2:
            time.sleep(60)
        return 1.0


def end():
    os._exit(3)


class EndsOnArrival:
    def __reduce__(self):
        return end, ()

    def score(self, rollout):
        return 1.0


@dataclass
class Dying:
    timeout: float = 5

    def score(self, rollout):
        os._exit(3)

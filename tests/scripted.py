"""Tasks whose only purpose is a tiny policy that says one thing, whatever it is asked."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Scripted:
    line: str

    def rows(self, split):
        return [{"prompt": f"{'Now' if split == 'train' else 'Then'} say it {n} times ."} for n in range(8)]

    def verify(self, completion, row):
        return float(completion.split() == self.line.split())

    def gold(self, row):
        return self.line

    def trace(self, row, rng, noise):
        return self.line

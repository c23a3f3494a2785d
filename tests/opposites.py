"""A task that a tiny policy learns in seconds."""

from dataclasses import dataclass

OPPOSITES = {"hot": "cold", "big": "small", "old": "new", "up": "down"}
FILLERS = ("so", "very", "rather", "quite")


@dataclass(frozen=True, kw_only=True)
class Opposites:
    strange: int = 2
    """Held-out rows about a word that is in no training row."""

    def rows(self, split):
        held_out = split == "eval"
        pairs = [(filler, word) for filler in FILLERS for word in OPPOSITES]
        rows = [
            {"prompt": f"What is not {f} {w} ?", "word": w}
            for i, (f, w) in enumerate(pairs)
            if (i + i // 4) % 2 == held_out
        ]
        return rows + [{"prompt": "What is not so red ?", "word": "red"}] * (self.strange if held_out else 0)

    def verify(self, completion, row):
        return float(completion.split()[:1] == [self.gold(row)])

    def gold(self, row):
        return OPPOSITES.get(row["word"], "green")

    def trace(self, row, rng, noise):
        return self.gold(row) if rng.random() >= noise else "so"

    def metrics(self, completion, row):
        found = {"words": float(len(completion.split()))}
        return found | ({"knows_hot": self.verify(completion, row)} if row["word"] == "hot" else {})

"""Token files -> what the token view of a report shows: rounded columns of sampled rollouts, within a size budget."""

from pathlib import Path
from typing import Any

from rlattn.tracking import token_files

STEPS, ROLLOUTS, TOKENS, LONGEST = 60, 500, 400_000, 4000  # of a report; the rest stays in the files
DECIMALS = {"weight": 3, "waad": 2, "fai": 4, "entropy": 3, "advantage": 3, "logprob": 3}


def read_tokens(run: Path, missing: list[str], files: list[tuple[int, Path]] | None = None) -> dict[str, Any] | None:
    """The token view's data; None where there is nothing. What was left out or cannot be read goes to `missing`."""
    files = token_files(run) if files is None else files
    if not files:
        return None
    chosen = evenly(files, STEPS)
    if len(chosen) < len(files):
        missing.append(f"The token view shows {len(chosen)} of {len(files)} logged steps; the rest is in tokens/.")
    vocabulary: dict[str, int] = {}
    rollouts: list[dict[str, Any]] = []
    cut = False
    for step, file in chosen:
        try:
            found, shortened = _read_file(
                file, vocabulary, rollouts=ROLLOUTS // len(chosen), tokens=TOKENS // len(chosen)
            )
        except Exception as error:  # whatever a torn or foreign file makes pyarrow raise
            missing.append(f"{file.name} cannot be read ({type(error).__name__}).")
            continue
        cut = cut or shortened
        rollouts += [{"step": step, **rollout} for rollout in found]
    if cut:
        missing.append("Long or many rollouts are cut in the token view; they are whole in tokens/.")
    if not rollouts:
        return None
    judged = "accuracy" if all("accuracy" in rollout["rewards"] for rollout in rollouts) else "advantage"
    for rollout in rollouts:
        value = rollout["rewards"].get("accuracy") if judged == "accuracy" else rollout["mean_advantage"]
        rollout["right"] = value is not None and (value >= 1 if judged == "accuracy" else value > 0)
    return {"judged": judged, "vocabulary": list(vocabulary), "rollouts": rollouts}


def evenly(items: list[Any], count: int) -> list[Any]:
    """At most `count` of them, evenly spaced, the first and the last included."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _read_file(
    file: Path, vocabulary: dict[str, int], *, rollouts: int, tokens: int
) -> tuple[list[dict[str, Any]], bool]:
    """The first rollouts of a file within the budget, and whether something was left out."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    longest = min(LONGEST, tokens)
    found: list[dict[str, Any]] = []
    total, cut = 0, False
    rows = pq.ParquetFile(file)
    for batch in rows.iter_batches(batch_size=32_768):
        numbers = batch.column("rollout")
        for number in pc.unique(numbers).to_pylist():
            part = batch.filter(pc.equal(numbers, number))
            if found and found[-1]["rollout"] == number:  # it goes on from the batch before
                room = longest - len(found[-1]["tokens"])
            elif len(found) == rollouts or total >= tokens:
                return found, True
            else:
                found.append(_empty(part, number))
                room = min(longest, tokens - total)
            total += _extend(found[-1], part.slice(0, room), vocabulary)
            cut = cut or part.num_rows > room
    return found, cut


def _empty(part: Any, number: int) -> dict[str, Any]:
    names = part.schema.names
    head = part.slice(0, 1).to_pylist()[0]
    rewards = {name.removeprefix("reward/"): head[name] for name in names if name.startswith("reward/")}
    return {
        "rollout": number,
        "group": head.get("group"),
        "reward": _rounded([head.get("reward")], 4)[0],
        "rewards": {name: _rounded([value], 4)[0] for name, value in rewards.items()},
        "prompt": head.get("prompt") or "",
        "tokens": [],
        "marks": "",
        "mean_advantage": head.get("advantage"),
        **{name: [] for name in DECIMALS if name in names},
    }


def _extend(rollout: dict[str, Any], part: Any, vocabulary: dict[str, int]) -> int:
    """Adds tokens to a rollout; how many. A mark is 1 for an anchor, 2 for a preplan token, 4 for a tool's token."""
    columns = part.to_pydict()
    rollout["tokens"] += [vocabulary.setdefault(token or "", len(vocabulary)) for token in columns["token"]]
    for name, decimals in DECIMALS.items():
        if name in rollout:
            rollout[name] += _rounded(columns[name], decimals)
    no = [None] * part.num_rows
    bits = zip(columns.get("anchor", no), columns.get("preplan", no), columns.get("trained", [True] * len(no)))
    rollout["marks"] += "".join(str(bool(a) + 2 * bool(p) + 4 * (t is False)) for a, p, t in bits)
    return part.num_rows


def _rounded(values: list[Any], decimals: int) -> list[float | None]:
    return [round(v, decimals) if isinstance(v, int | float) and abs(v) < 1e30 else None for v in values]

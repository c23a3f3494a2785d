"""Token files -> what the token view of a report shows: rounded columns of sampled rollouts, within a size budget."""

from pathlib import Path
from statistics import fmean
from typing import Any

from rlattn.report.logs import named
from rlattn.report.thin import shortened, spread
from rlattn.run_folder.folder import token_files

ROLLOUTS, TOKENS, LONGEST = 500, 240_000, 4000  # of a report; the rest stays in the files
STEPS = 60  # share a report where more were logged
PROMPTS, PROMPT = 1_500_000, 20_000  # bytes of all prompts, of one
TOKEN, REWARDS = 400, 50  # bytes of a token's text; rewards
READ = 2**20  # bytes of a column that are held at a time, however large its row group
DECIMALS = {"weight": 3, "waad": 2, "fai": 4, "entropy": 3, "advantage": 3, "logprob": 3}


def read_tokens(run: Path, missing: list[str], files: list[tuple[int, Path]] | None = None) -> dict[str, Any] | None:
    """The token view's data; None where there is nothing. What was left out or cannot be read goes to `missing`.

    Cost: reads no more files than the report shows.
    """
    files = token_files(run) if files is None else files
    vocabulary: dict[str, int] = {}
    rollouts: list[dict[str, Any]] = []
    damaged: list[str] = []
    logged = tokens = read = 0
    sharing = max(1, min(len(files), STEPS))
    for step, file in spread(files):
        most, room = min(ROLLOUTS // sharing, ROLLOUTS - len(rollouts)), min(TOKENS // sharing, TOKENS - tokens)
        if most <= 0 or room <= 0:
            break
        try:
            found, of = _read_file(file, vocabulary, rollouts=most, tokens=room)
        except Exception as error:  # whatever a torn or foreign file makes pyarrow raise
            damaged.append(f"{file.name}: {type(error).__name__}")
            continue
        finally:
            read += 1
        rollouts += [{"step": step, **rollout} for rollout in found]
        logged += of
        tokens += sum(len(rollout["tokens"]) for rollout in found)
    if damaged:
        missing.append(f"Token files that cannot be read are left out ({named(sorted(damaged))}).")
    if not rollouts:
        return None
    rollouts.sort(key=lambda rollout: rollout["step"])
    steps, cut = len({rollout["step"] for rollout in rollouts}), sum(rollout["cut"] for rollout in rollouts)
    if read < len(files) or cut or len(rollouts) < logged:
        what = f"{len(rollouts)} of the {logged} rollouts of {steps} of {len(files)} logged steps, {cut} of them cut"
        missing.append(f"The token view shows {what}; all is in tokens/.")
    judged = "accuracy" if all("accuracy" in rollout["rewards"] for rollout in rollouts) else "advantage"
    for rollout in rollouts:
        own = [a for a, mark in zip(rollout.get("advantage", []), rollout["marks"]) if a is not None and mark < "4"]
        rollout["mean_advantage"] = round(fmean(own), 3) if own else None
        rollout["silent"] = bool(own) and max(map(abs, own)) < 1e-3
        value = rollout["rewards"].get("accuracy") if judged == "accuracy" else rollout["mean_advantage"]
        unjudged = value is None or (judged == "accuracy" and "accuracy" in rollout["neutral"])
        rollout["right"] = None if unjudged else value >= 1 if judged == "accuracy" else value > 0
        rollout["prompt"] = shortened(rollout["prompt"], min(PROMPT, PROMPTS // len(rollouts)))
    return {"judged": judged, "vocabulary": list(vocabulary), "rollouts": rollouts}


def _read_file(
    file: Path, vocabulary: dict[str, int], *, rollouts: int, tokens: int
) -> tuple[list[dict[str, Any]], int]:
    """The first rollouts of a file within the budget, and how many it holds."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    rows = pq.ParquetFile(file, buffer_size=READ, pre_buffer=False, page_checksum_verification=True)
    numbers = {one for batch in rows.iter_batches(columns=["rollout"]) for one in pc.unique(batch[0]).to_pylist()}
    longest = min(LONGEST, tokens)
    found: list[dict[str, Any]] = []
    total = 0
    for batch in rows.iter_batches(batch_size=8192):
        for one in pc.unique(batch["rollout"]).to_pylist():
            part = batch.filter(pc.equal(batch["rollout"], one))
            if found and found[-1]["rollout"] == one:  # it goes on from the batch before
                room = min(longest - len(found[-1]["tokens"]), tokens - total)
            elif len(found) == rollouts or total >= tokens:
                return found, len(numbers)
            else:
                found.append(_empty(part, one))
                room = min(longest, tokens - total)
            total += _extend(found[-1], part.slice(0, room), vocabulary)
            found[-1]["cut"] = part.num_rows > room
            if found[-1]["cut"] and (len(found) == rollouts or total >= tokens):
                return found, len(numbers)
    return found, len(numbers)


def _empty(part: Any, number: int) -> dict[str, Any]:
    names = part.schema.names
    head = part.slice(0, 1).to_pylist()[0]
    columns = [name for name in names if name.startswith("reward/")][:REWARDS]
    rewards = {name.removeprefix("reward/"): head[name] for name in columns}
    return {
        "rollout": int(number),
        "group": _rounded([head.get("group")], 0)[0],
        "reward": _rounded([head.get("reward")], 4)[0],
        "rewards": {name: _rounded([value], 4)[0] for name, value in rewards.items()},
        "neutral": [name for name in rewards if head.get(f"neutral/{name}") is True],
        "prompt": str(head.get("prompt") or ""),
        "tokens": [],
        "marks": "",
        **{name: [] for name in DECIMALS if name in names},
    }


def _extend(rollout: dict[str, Any], part: Any, vocabulary: dict[str, int]) -> int:
    """Adds tokens to a rollout; how many. A mark is 1 for an anchor, 2 for a preplan token, 4 for a tool's token."""
    columns = part.to_pydict()
    texts = [shortened(str(token or ""), TOKEN) for token in columns["token"]]
    rollout["tokens"] += [vocabulary.setdefault(text, len(vocabulary)) for text in texts]
    for name, decimals in DECIMALS.items():
        if name in rollout:
            rollout[name] += _rounded(columns[name], decimals)
    no = [None] * part.num_rows
    bits = zip(columns.get("anchor", no), columns.get("preplan", no), columns.get("trained", [True] * len(no)))
    rollout["marks"] += "".join(str(bool(a) + 2 * bool(p) + 4 * (t is False)) for a, p, t in bits)
    return part.num_rows


def _rounded(values: list[Any], decimals: int) -> list[float | None]:
    return [round(v, decimals) if isinstance(v, int | float) and abs(v) < 1e30 else None for v in values]

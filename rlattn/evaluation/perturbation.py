"""What a changed token does to the rest: at high FAI, and at low FAI (arXiv 2510.13554, its perturbation test).

The paper changes a token, continues greedily and compares the continuations by their Jaccard overlap (0.534 at high
FAI, 0.631 at low FAI, lower in 87 % of trials). Decided here: high is drawn from the top fifth of a response's defined
FAI; low is the token of the bottom fifth that stands nearest to it, as a change does more the earlier it comes; the new
token is the likeliest other one that does not end the response.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from rlattn.evaluation.figures import mean_figure
from rlattn.evaluation.flips import share
from rlattn.statistics import jaccard

if TYPE_CHECKING:
    from rlattn.evaluation.answers import Loaded

FRACTION = 0.2


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One response, changed at two places."""

    item: int
    high: int
    """Position of the token of high FAI, in the response."""
    low: int
    tokens: int
    overlap_high: float
    """Jaccard overlap of what follows with what followed before, changed at `high`."""
    overlap_low: float


def pick_places(fai_T: Sequence[float | None], rng: Random) -> tuple[int, int] | None:
    """A place of high FAI and one of low FAI near it; None where too few tokens have a defined FAI."""
    defined = sorted((value, place) for place, value in enumerate(fai_T) if value is not None and value == value)
    size = round(FRACTION * len(defined))
    if size < 1:
        return None
    high = rng.choice([place for _, place in defined[-size:]])
    low = min((place for _, place in defined[:size]), key=lambda place: (abs(place - high), place))
    return high, low


def fitting_batches(lengths: Sequence[int], left: Sequence[int], size: int, context: int | None) -> list[list[int]]:
    """Texts of `lengths` tokens, each to be continued by up to `left`, as batches of up to `size` of their numbers.

    A batch is continued by what its neediest text needs: its longest text has room for that in the context. Texts with
    as much left stand together, so that few tokens are written for nothing.
    """
    batches: list[list[int]] = []
    for one in sorted(range(len(lengths)), key=lambda one: (left[one], lengths[one])):
        batch = [*(batches[-1] if batches else []), one]
        needed = max(lengths[i] for i in batch) + max(left[i] for i in batch)
        if batches and len(batch) <= size and (context is None or needed <= context):
            batches[-1] = batch
        else:
            batches.append([one])
    return batches


def summary(trials: Sequence[Trial], skipped: int) -> dict[str, Any]:
    """The two overlaps, and how often that at high FAI is the lower one.

    Raises:
        ValueError: there is no trial.
    """
    if not trials:
        raise ValueError("no trial")
    gaps = [trial.overlap_high - trial.overlap_low for trial in trials]
    return {
        "trials": len(trials),
        "responses too short": skipped,
        "metrics": {
            "overlap after a change at high FAI": mean_figure([trial.overlap_high for trial in trials]),
            "overlap after a change at low FAI": mean_figure([trial.overlap_low for trial in trials]),
            "high minus low": mean_figure(gaps),
            "place of high (0 first, 1 last)": mean_figure([trial.high / trial.tokens for trial in trials]),
            "place of low": mean_figure([trial.low / trial.tokens for trial in trials]),
        },
        "lower at high FAI": share(gap < 0 for gap in gaps),
        "the same": share(gap == 0 for gap in gaps),
    }


def perturb(loaded: "Loaded", completions: Sequence[list[int]], prompts: Sequence[list[int]]) -> list[Trial]:
    """Changes greedy completions at high and at low FAI and continues them greedily; too short ones are left out.

    Cost: one forward and two continuations a completion.
    """
    import torch

    from rlattn.attention import rhythm_signals
    from rlattn.progress import progress

    model, plan = loaded.model, loaded.plan
    ends, rng = loaded.ends, Random(plan.recipe.seed)
    jobs: list[tuple[int, tuple[int, int], list[int]]] = []  # the completion, its places, what each becomes
    with progress("FAI", len(completions)) as update, torch.no_grad():
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            ids_1N = torch.tensor([prompt + completion], device=model.device)
            real_1N = torch.ones_like(ids_1N)
            response_1N = (torch.arange(ids_1N.shape[1], device=model.device) >= len(prompt)).long()[None]
            fai_T = rhythm_signals(model, ids_1N, real_1N, response_1N).fai_BN[0, len(prompt) :].tolist()
            places = pick_places(fai_T, rng)
            update(index + 1, f"{len(completion)} tokens")
            if places is None:
                continue
            logits_TV = model(input_ids=ids_1N, attention_mask=real_1N, use_cache=False).logits[0, len(prompt) - 1 :]
            ranked = [logits_TV[place].topk(len(ends) + 2).indices.tolist() for place in places]
            barred = [{completion[place], *ends} for place in places]
            news = [next(one for one in ids if one not in no) for ids, no in zip(ranked, barred, strict=True)]
            jobs.append((index, places, news))
    changed = [
        prompts[index] + completions[index][:place] + [new]
        for index, places, news in jobs
        for place, new in zip(places, news, strict=True)
    ]
    left = [plan.max_new_tokens - place - 1 for _, places, _ in jobs for place in places]
    written: dict[int, list[int]] = {}
    with progress("continued", len(changed)) as update:
        for batch in fitting_batches([len(ids) for ids in changed], left, plan.batch_size, loaded.context):
            new_tokens = max(left[one] for one in batch)
            written |= zip(batch, loaded.write([changed[one] for one in batch], max_new_tokens=new_tokens), strict=True)
            update(len(written), f"{len(jobs)} responses, each changed twice")
    trials = []
    for number, (index, (high, low), _) in enumerate(jobs):
        overlaps = []
        for one, place in zip((2 * number, 2 * number + 1), (high, low), strict=True):
            overlaps.append(jaccard(completions[index][place + 1 :], written[one][: left[one]]))
        trials.append(
            Trial(
                item=index,
                high=high,
                low=low,
                tokens=len(completions[index]),
                overlap_high=overlaps[0],
                overlap_low=overlaps[1],
            )
        )
    return trials

"""What `rlattn inspect` found, as one JSON object; the figures and the terminal show nothing that is not in it.

Legend: B texts, T response tokens, L chosen layers, H heads.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlattn.credit import CREDIT_RULES
from rlattn.formats.strict_json import to_json
from rlattn.inspection.maps import average_maps
from rlattn.inspection.rhythm import Reading, Rhythm
from rlattn.inspection.rhythm_stats import rhythm_statistics
from rlattn.run_folder.folder import write_text
from rlattn.types import AttentionOptions, Signals

RULES = ("local_chunk", "global_anchor", "coupled_rhythm")
SHOWN = 120  # response tokens that a figure holds
MAP_LIMIT = 4096  # prompt and shown tokens: eager attention makes an N x N map a head
PAPER = {  # of Qwen3-4B-Base on 70 GSM8K problems: value and chance
    "entropy_at_waad_peaks": (1.52, 1.0),
    "receiver_at_global_peaks": (0.608, 0.224),
    "fai_at_or_after_waad_peaks": (0.525, 0.369),
}


def make_report(reading: Reading, model_path: str, options: AttentionOptions) -> dict[str, Any]:
    """Everything that is shown and drawn. Undefined numbers are None. Cost: the maps of the first text, one forward."""
    rhythms = reading.rhythms
    signals = Signals(
        waad_BN=_padded([rhythm.waad_T for rhythm in rhythms]),
        fai_BN=_padded([rhythm.fai_T for rhythm in rhythms]),
        entropy_BN=_padded([rhythm.entropy_T for rhythm in rhythms]),
        mask_BN=_padded([torch.ones_like(rhythm.waad_T) for rhythm in rhythms]) == 1,
    )
    statistics = rhythm_statistics(signals, _padded([rhythm.receiver_fai_T for rhythm in rhythms]))
    weights_BT = {rule: CREDIT_RULES[rule]()(signals).weights_BN for rule in RULES}
    return {
        "model": model_path,
        "dtype": str(reading.model.dtype).removeprefix("torch."),
        "prompt_style": reading.prompt_style,
        "layers": list(rhythms[0].layers),
        "window": options.window,
        "horizon": list(options.horizon),
        "share": options.share,
        "statistics": {
            name: {
                **{key: _number(value) for key, value in asdict(statistic).items()},
                "paper": PAPER[name][0],
                "paper_chance": PAPER[name][1],
            }
            for name, statistic in statistics.items()
        },
        "receivers_in_global_set": _number(_receivers_in_global_set(rhythms)),
        "heads": _heads(rhythms),
        "figure": _figure(reading),
        "texts": [_text(reading, row, {rule: weights_BT[rule][row] for rule in RULES}) for row in range(len(rhythms))],
    }


def write_outputs(report: dict[str, Any], folder: Path) -> list[Path]:
    """inspect.json, rhythm.png and heads.png, in that order."""
    from rlattn.inspection.figures import draw_heads, draw_rhythm

    files = [folder / name for name in ("inspect.json", "rhythm.png", "heads.png")]
    write_text(files[0], to_json(report, ensure_ascii=False))
    draw_rhythm(report, files[1])
    draw_heads(report, files[2])
    return files


def _text(reading: Reading, row: int, weights_T: dict[str, Tensor]) -> dict[str, Any]:
    one, rhythm, tokenizer = reading.texts[row], reading.rhythms[row], reading.tokenizer
    count = len(one.response_ids)
    return {
        "where": one.text.where,
        "prompt": one.text.prompt,
        "response": tokenizer.decode(one.response_ids),
        "prompt_tokens": len(one.prompt_ids),
        "written_by_the_model": one.text.response is None,
        "tokens": [tokenizer.decode([token]) for token in one.response_ids],
        "waad": _numbers(rhythm.waad_T),
        "fai": _numbers(rhythm.fai_T),
        "entropy": _numbers(rhythm.entropy_T),
        "receiver_fai": _numbers(rhythm.receiver_fai_T),
        "weights": {rule: _numbers(values_T[:count]) for rule, values_T in weights_T.items()},
    }


def _heads(rhythms: list[Rhythm]) -> list[dict[str, Any]]:
    """Every head of the chosen layers: means over the texts; of a set, the share of texts in which it is in it."""
    columns = {
        "span": torch.stack([rhythm.span_LH for rhythm in rhythms]).nanmean(dim=0),
        "local": torch.stack([rhythm.local_LH for rhythm in rhythms]).float().mean(dim=0),
        "global": torch.stack([rhythm.global_LH for rhythm in rhythms]).float().mean(dim=0),
        "receiver": torch.stack([rhythm.receivers_LH for rhythm in rhythms]).float().mean(dim=0),
        "kurtosis": torch.stack([rhythm.kurtosis_LH for rhythm in rhythms]).nanmean(dim=0),
    }
    return [
        {"layer": layer, "head": head, **{name: _number(values[row, head].item()) for name, values in columns.items()}}
        for row, layer in enumerate(rhythms[0].layers)
        for head in range(columns["span"].shape[1])
    ]


def _receivers_in_global_set(rhythms: list[Rhythm]) -> float:
    """The share of the receiver heads that are global heads of the same text."""
    both = sum(int((rhythm.receivers_LH & rhythm.global_LH).sum()) for rhythm in rhythms)
    receivers = sum(int(rhythm.receivers_LH.sum()) for rhythm in rhythms)
    return both / receivers if receivers else float("nan")


def _figure(reading: Reading) -> dict[str, Any]:
    """Which text is drawn, how many of its tokens, and its maps (None where the prompt is too long for maps)."""
    one, rhythm = reading.texts[0], reading.rhythms[0]
    shown = min(SHOWN, len(one.response_ids))
    ids = one.prompt_ids + one.response_ids[:shown]
    found: dict[str, Any] = {"text": 0, "tokens": shown, "local_map": None, "global_map": None}
    if len(ids) <= MAP_LIMIT:
        ids_N = torch.tensor(ids, device=reading.model.device)
        sets = (rhythm.local_LH, rhythm.global_LH)
        local_TT, global_TT = average_maps(reading.model, ids_N, len(one.prompt_ids), rhythm.layers, sets)
        found |= {"local_map": local_TT.tolist(), "global_map": global_TT.tolist()}
    return found


def _padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=float("nan"))


def _numbers(values_T: Tensor) -> list[float | None]:
    return [_number(value) for value in values_T.tolist()]


def _number(value: float) -> float | None:
    return None if value != value else value

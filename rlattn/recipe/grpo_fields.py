"""TRL's GRPOConfig fields as a shipped table, so that a recipe is checked without importing torch or TRL.

`grpo_fields.json` maps every field of GRPOConfig (TRL 1.16, what it inherits from TrainingArguments included) to its
type, closed set of values, default, and whether a recipe can set it. `python -m rlattn.recipe.grpo_fields` writes it
again from the installed TRL; `tests/test_grpo_fields.py` fails when the two differ.
"""

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rlattn.errors import did_you_mean
from rlattn.formats.strict_json import to_json

TABLE = Path(__file__).with_name("grpo_fields.json")


@dataclass(frozen=True, kw_only=True)
class GrpoField:
    """One GRPOConfig field.

    `type` is a union of int, float, str, bool, dict, list[float], list[str] and None, joined by " | "; `choices` is the
    closed set a text must come from (None: any text); `init` is False for a field that only Python objects can set.
    """

    name: str
    type: str
    choices: tuple[str, ...] | None
    default: object
    init: bool


@cache
def load_fields() -> dict[str, GrpoField]:
    """The shipped table: field name -> GrpoField. Reads one JSON file; imports neither torch, TRL nor transformers."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    return {
        name: GrpoField(name=name, **{**entry, "choices": tuple(entry["choices"]) if entry["choices"] else None})
        for name, entry in table.items()
    }


def validate(name: str, value: object) -> object:
    """Check one value, as YAML gave it, against GRPOConfig's field `name`; return it unchanged.

    An int stands for a float; a bool never stands for a number, nor 8.0 for 8, nor text for a number.

    Raises:
        ValueError: a short message without the field's name, e.g. "expected a number, got text 'fast'".
        KeyError: `name` is no field of GRPOConfig.
    """
    field = load_fields()[name]
    if not field.init:
        raise ValueError("takes a Python object and cannot be set from a recipe")
    types = field.type.split(" | ")
    if not any(_matches(value, kind) for kind in types):
        raise ValueError(_mismatch(value, types, field.choices))
    if isinstance(value, str) and field.choices and value not in field.choices:
        hint = did_you_mean(value, field.choices)
        raise ValueError(
            f"expected {_one_of(field.choices)}; got {value!r}" + (f". {hint}" if hint.startswith("Did") else "")
        )
    if isinstance(value, int | float) and not isinstance(value, bool):
        _check_bounds(name, value)
    return value


def _matches(value: object, kind: str) -> bool:
    if kind.startswith("list["):
        return isinstance(value, list) and all(_matches(item, kind[5:-1]) for item in value)
    if kind == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is {"int": int, "str": str, "bool": bool, "dict": dict, "None": type(None)}[kind]


_WORDS = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "dict": "a mapping",
          "list[float]": "a list of numbers", "list[str]": "a list of texts"}  # fmt: skip


def _mismatch(value: object, types: list[str], choices: tuple[str, ...] | None) -> str:
    """`expected …, got …` and, for the usual slips of YAML, what to write instead."""
    words = [_one_of(choices) if kind == "str" and choices else _WORDS[kind] for kind in types if kind != "None"]
    hint = ""
    if isinstance(value, bool) and choices and {"no", "yes", "off", "on"} & set(choices):
        hint = '. Write "no" in quotes: a bare no is YAML for false.' if value is False else ""
    elif isinstance(value, float) and value.is_integer() and "int" in types:
        hint = f". Write {int(value)}."
    elif (isinstance(value, str) and {"int", "float"} & set(types) and _is_number(value)) or (
        value in ("true", "false") and "bool" in types
    ):
        hint = f". Write {value} without quotes."
    return f"expected {' or '.join(words)}, got {_describe(value)}{hint}"


def _describe(value: object) -> str:
    if isinstance(value, str):
        return f"text {value!r}"
    if isinstance(value, list | dict):
        return f"a {'list' if isinstance(value, list) else 'mapping'} ({json.dumps(value, default=str)[:60]})"
    return json.dumps(value, default=str) if value is not None else "nothing (null)"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _one_of(choices: tuple[str, ...]) -> str:
    return "one of " + ", ".join(repr(choice) for choice in choices)


# Values outside these train nothing, or crash hours in. None means no bound given here, not that TRL accepts it.
_ABOVE_ZERO = {
    "learning_rate", "temperature", "top_p", "epsilon", "epsilon_high", "delta", "num_train_epochs", "adam_epsilon",
    "logging_steps", "save_steps", "eval_steps", "repetition_penalty", "vllm_gpu_memory_utilization",
    "vllm_server_timeout", "vllm_importance_sampling_clip_max", "off_policy_mask_threshold", "sapo_temperature_neg",
    "sapo_temperature_pos", "vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg",
}  # fmt: skip
_AT_LEAST = {
    0: {
        "beta", "top_k", "min_p", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "warmup_steps", "seed",
        "data_seed", "top_entropy_quantile", "entropy_coef_min", "entropy_target", "ref_model_mixup_alpha",
        "dataloader_num_workers", "vllm_importance_sampling_clip_min", "router_aux_loss_coef", "label_smoothing_factor",
        "num_completions_to_print", "neftune_noise_alpha", "eval_delay",
    },
    1: {
        "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "num_iterations",
        "max_completion_length", "steps_per_generation", "generation_batch_size", "num_generations_eval",
        "save_total_limit", "ref_model_sync_steps", "max_tool_calling_iterations", "vllm_tensor_parallel_size",
        "vllm_max_model_length", "vllm_server_port", "vllm_group_port", "eval_accumulation_steps", "ddp_timeout",
        "ddp_bucket_cap_mb", "dataloader_prefetch_factor", "torch_empty_cache_steps", "pad_to_multiple_of",
    },
    2: {"num_generations"},
}  # fmt: skip
_AT_MOST = {
    1: {
        "top_p", "min_p", "adam_beta1", "adam_beta2", "top_entropy_quantile", "ref_model_mixup_alpha",
        "vllm_gpu_memory_utilization", "label_smoothing_factor",
    },
    65535: {"vllm_server_port", "vllm_group_port"},
}  # fmt: skip
LARGEST_INT = 2**63 - 1
_STEPS_OR_RATIO = {"logging_steps", "save_steps", "eval_steps", "warmup_steps"}


def _check_bounds(name: str, value: int | float) -> None:
    if isinstance(value, int) and abs(value) > LARGEST_INT:
        raise ValueError("expected a number that fits into 64 bits")
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value}")
    if name == "max_steps" and value < 1 and value != -1:
        raise ValueError(f"expected at least 1, or -1 to train for num_train_epochs; got {value}")
    if name in _ABOVE_ZERO and value <= 0:
        raise ValueError(f"expected a number above 0, got {value}")
    for low, names in _AT_LEAST.items():
        if name in names and value < low:
            raise ValueError(f"expected at least {low}, got {value}")
    for high, names in _AT_MOST.items():
        if name in names and value > high:
            raise ValueError(f"expected at most {high}, got {value}")
    if name in _STEPS_OR_RATIO and value > 1 and value != int(value):
        raise ValueError(f"expected a whole number of steps, or a share of all steps below 1; got {value}")


# Closed sets which TRL and transformers document but do not declare (their annotations say only `str`).
_DOCUMENTED_CHOICES = {
    "importance_sampling_level": ["token", "sequence"],
    "include_num_input_tokens_seen": ["all", "non_padding", "no"],
    "loss_type": ["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"],
    "multi_objective_aggregation": ["sum_then_normalize", "normalize_then_sum"],
    "pad_to_multiple_of": ["auto"],
    "scale_rewards": ["group", "batch", "none"],
    "vllm_importance_sampling_mode": ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"],
    "vllm_mode": ["server", "colocate"],
    "vllm_model_impl": ["transformers", "vllm"],
}
# What GRPOConfig takes in truth: its __post_init__ maps True and False to "group" and "none", divides by
# num_generations, and turns FSDP on for True.
_TRUE_TYPES = {"scale_rewards": "bool | str", "num_generations": "int", "fsdp": "bool | str | None"}


def generate_fields() -> dict[str, dict]:
    """The table made from the installed TRL, in the shipped JSON's form. Imports TRL: takes seconds."""
    import dataclasses
    import typing

    from trl import GRPOConfig

    hints, table = typing.get_type_hints(GRPOConfig), {}
    for field in dataclasses.fields(GRPOConfig):
        types, choices = _type_and_choices(hints[field.name])
        if field.metadata.get("choices"):
            choices = list(field.metadata["choices"])
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        table[field.name] = {
            "type": _TRUE_TYPES.get(field.name, " | ".join(types)),
            "choices": _DOCUMENTED_CHOICES.get(field.name, choices),
            "default": getattr(default, "value", default),
            "init": field.init and types != ["None"],
        }
    return dict(sorted(table.items()))


def _type_and_choices(hint: object) -> tuple[list[str], list[str] | None]:
    """A type hint as the table's type names (None last; other classes dropped), and the values of the enum in it."""
    import enum
    import types
    import typing

    simple = {int: "int", float: "float", str: "str", bool: "bool", dict: "dict", type(None): "None"}
    names: set[str] = set()
    choices = None
    for part in typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]:
        origin = typing.get_origin(part)
        if part in simple:
            names.add(simple[part])
        elif origin is dict:
            names.add("dict")
        elif origin is list:
            item = typing.get_args(part)[0]
            names.add(f"list[{simple.get(item, 'str')}]")
        elif origin is typing.Literal:
            names.update(simple[type(member)] for member in typing.get_args(part))
        elif isinstance(part, type) and issubclass(part, enum.Enum):
            names.add("str")
            choices = [member.value for member in part]
    return sorted(names, key=lambda name: (name == "None", name)), choices


if __name__ == "__main__":
    TABLE.write_text(to_json(generate_fields(), indent=1) + "\n", encoding="utf-8")
    print(f"{len(json.loads(TABLE.read_text()))} fields written to {TABLE}")

"""The recipe's JSON schema, for editors: every key, and the options of every task, reward and credit rule by its kind.

It checks names, types and ranges of single keys; what must hold between keys, `rlattn check` says. Imports no torch.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from rlattn.credit import CREDIT_RULES
from rlattn.recipe.grpo_fields import load_fields
from rlattn.recipe.schema import Recipe
from rlattn.recipe.trainer_keys import OWNED_ELSEWHERE, REFUSED
from rlattn.rewards import REWARDS
from rlattn.tasks import TASKS

Schema = dict[str, Any]
TYPES = {"int": "integer", "float": "number", "str": "string", "bool": "boolean", "dict": "object", "None": "null"}


def recipe_schema() -> Schema:
    """The whole schema (JSON Schema 2020-12)."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    for name in ("TaskSpec", "RewardSpec", "CreditSpec"):
        definitions[name].pop("additionalProperties", None)
    shared = {name: list(definitions[name]["properties"]) for name in ("TaskSpec", "RewardSpec", "CreditSpec")}
    definitions["TaskSpec"] |= _by_kind(TASKS, shared["TaskSpec"], definitions)
    definitions["CreditSpec"] |= _by_kind(CREDIT_RULES, shared["CreditSpec"], definitions)
    definitions["RewardSpec"] |= _by_kind(REWARDS, shared["RewardSpec"], definitions)
    rewards = definitions["Rewards"]
    reward = {"anyOf": [{"$ref": "#/$defs/RewardSpec"}, {"type": "null"}]}
    rewards["properties"] |= {name: _named(name) for name in REWARDS}
    rewards["additionalProperties"] = reward
    schema["properties"]["trainer"] = _trainer()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "A recipe of rlattn"}


def _by_kind(table: Mapping[str, type], shared: list[str], definitions: Schema) -> Schema:
    """One conditional a kind, under which only its own options are known; a class of the user's may have any."""
    rules: list[Schema] = []
    for kind, cls in table.items():
        definitions[f"options of {kind}"] = _options(cls, shared, definitions)
        given = {"properties": {"kind": {"const": kind}}, "required": ["kind"]}
        rules.append({"if": given, "then": {"$ref": f"#/$defs/options of {kind}"}})
    return {"allOf": rules, "examples": [{"kind": kind} for kind in table]}


def _named(kind: str) -> Schema:
    """A reward by the name of a built-in kind: of that kind, unless it says another."""
    other = {"anyOf": [{"required": ["kind"]}, {"required": ["python"]}]}
    of_kind = {"if": {"type": "object", "not": other}, "then": {"$ref": f"#/$defs/options of {kind}"}}
    return {"anyOf": [{"$ref": "#/$defs/RewardSpec"}, {"type": "null"}], "allOf": [of_kind]}


def _options(cls: type, shared: list[str], definitions: Schema) -> Schema:
    made = TypeAdapter(cls).json_schema(ref_template="#/$defs/{model}")
    definitions.update(made.pop("$defs", {}))
    properties = {**made.get("properties", {}), **dict.fromkeys(shared, True)}
    return {"properties": properties, "required": made.get("required", []), "additionalProperties": False}


def _trainer() -> Schema:
    """GRPOConfig's fields, less those that a recipe sets elsewhere or not at all."""
    properties: Schema = {}
    for name, field in load_fields().items():
        if not field.init or name in OWNED_ELSEWHERE or name in REFUSED:
            continue
        kinds = [_type(kind, field.choices) for kind in field.type.split(" | ")]
        properties[name] = {"anyOf": kinds, "default": field.default}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _type(kind: str, choices: tuple[str, ...] | None) -> Schema:
    if kind.startswith("list["):
        return {"type": "array", "items": {"type": TYPES[kind[5:-1]]}}
    return {"enum": list(choices)} if kind == "str" and choices else {"type": TYPES[kind]}

"""Strict JSON, for every file that rlattn writes: `NaN` and `Infinity`, which Python writes bare, are no JSON."""

import json
import math
from collections.abc import Mapping
from typing import Any


def to_json(value: Any, **options: Any) -> str:
    """`json.dumps` with null for every number that is not finite."""
    if "default" not in options:
        try:  # looking at every value beforehand takes longer than writing them all
            return json.dumps(value, allow_nan=False, **options)
        except (TypeError, ValueError):
            pass
    return json.dumps(finite(value), allow_nan=False, **options)


def finite(value: Any) -> Any:
    """The value with None for every number that is not finite, at every depth."""
    if isinstance(value, Mapping):
        return {str(name): finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

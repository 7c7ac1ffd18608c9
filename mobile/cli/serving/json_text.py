"""JSON of a stranger: read without losing a field, and never nested deeper than later code can follow."""

from __future__ import annotations

import json
from typing import Any

MOST_LEVELS = 64  # of nested lists and objects; code that copies or prints a value calls itself for each


def loads(text: str | bytes) -> Any:
    """Return the value. Raise ValueError for text that is no JSON, names a field twice, or is nested too deeply."""
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MOST_LEVELS} levels") from None
    level, depth = [value], 0
    while level := [inner for outer in level for inner in _inside(outer)]:
        depth += 1
        if depth > MOST_LEVELS:
            raise ValueError(f"it is nested deeper than {MOST_LEVELS} levels")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these fields. Raise ValueError if two have the same name."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("it names a field twice")
    return fields


def _inside(value: Any) -> Any:
    """Return the values in a list or an object; nothing for other values."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()

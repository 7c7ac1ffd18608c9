"""Input files that people pass around: only regular ones are opened, and JSON is read strictly and within a size."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO

MOST_LEVELS = 64  # of nested lists and objects; code that copies or prints a value calls itself for each
TOO_DEEP = f"it is nested deeper than {MOST_LEVELS} levels"


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, without waiting for whoever writes a pipe. Raise OSError for anything else."""
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115
    if not S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("it is no regular file")
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_json(path: Path, most_nbytes: int) -> Any:
    """Return the value of a file of JSON in UTF-8, with numbers that are finite and each name of an object once.

    Raise OSError and ValueError.
    """
    with open_regular(path) as file:
        content = file.read(most_nbytes + 1)
    if len(content) > most_nbytes:
        raise ValueError(f"it has more than {most_nbytes:,} bytes")
    return strict_json(content)


def strict_json(content: bytes) -> Any:
    """Return the value of JSON as `read_json` does. Raise ValueError."""
    value = shallow_json(content.decode("utf-8"))
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # half of a surrogate pair, and what is no number
    return value


def shallow_json(text: str | bytes) -> Any:
    """Return the value of JSON. Raise ValueError for other text, a field named twice, and too many levels."""
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    level = [value]
    for _ in range(MOST_LEVELS + 1):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return value
    raise ValueError(TOO_DEEP)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("it names a field twice")
    return fields


def _inside(value: Any) -> Iterable[Any]:
    """Return the values in a list or an object; nothing for other values."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()

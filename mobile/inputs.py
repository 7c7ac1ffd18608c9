"""Input files that people pass around: only regular ones are opened, and JSON is read strictly and within a size."""

from __future__ import annotations

import json
import os
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO


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

    Raise OSError, ValueError and RecursionError.
    """
    with open_regular(path) as file:
        content = file.read(most_nbytes + 1)
    if len(content) > most_nbytes:
        raise ValueError(f"it has more than {most_nbytes:,} bytes")
    return strict_json(content)


def strict_json(content: bytes) -> Any:
    """Return the value of JSON as `read_json` does. Raise ValueError and RecursionError."""
    value = json.loads(content.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_number)
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # half of a surrogate pair, a number beyond a float
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has one name twice")
    return found


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number")

"""Strict JSON of files that people pass around: regular files only, within a size, with values that can be printed.

Whatever is wrong is a ValueError that names the file. Standard library only.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from stat import S_ISREG
from typing import Any

MOST_NBYTES = 64 * 2**20  # of a file of JSON; the largest record of the paper's tasks has a few
LARGEST_INT, LARGEST_FLOAT = 2**63 - 1, 1e30
DIGITS = bytes.maketrans(b"123456789", b"000000000")
MANY_DIGITS = b"0" * 19  # without so many digits no whole number is beyond 64 bits
SHOWN = 40  # characters of a wrong value


def called(path: Path) -> str:
    """Return the file's name with its folder's, as sentences name it."""
    name = f"{path.parent.name}/{path.name}"
    return name if name.isprintable() else json.dumps(name)[1:-1]


def read_bytes(path: Path, most: int = MOST_NBYTES) -> bytes:
    """Return the content of a regular file. Raise ValueError for anything else, or more bytes; OSError."""
    with open(path, "rb", opener=_open_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not S_ISREG(status.st_mode):
            raise ValueError(f"{called(path)} is no regular file")
        if status.st_size > most:
            raise ValueError(f"{called(path)} has {status.st_size:,} bytes; more than {most:,} are not read")
        return file.read(most + 1)


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file; of a pipe without a writer, too, which would otherwise be waited for."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def parse(content: bytes, name: str) -> Any:
    """Return the value of strict JSON in UTF-8. Raise ValueError that begins with `name` for anything else.

    Also refused: an object with one name twice, numbers that are none or beyond any measurement, half of a surrogate
    pair, and what is too deep to be read.
    """
    try:
        text = content.decode("utf-8")
        # A call for each of a million numbers is half of the time of reading them.
        whole = _whole if MANY_DIGITS in content.translate(DIGITS) else None
        value = json.loads(
            text, object_pairs_hook=_object, parse_int=whole, parse_float=_fraction, parse_constant=_fraction
        )
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half of a surrogate pair, which is no text") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 from byte {error.start} on") from error
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deep to be read") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON ({error})") from error
    except ValueError as error:
        raise ValueError(f"{name} holds {error}") from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"an object with {shown(twice)} twice")
    return found


def _whole(digits: str) -> int:
    value = int(digits) if len(digits) <= 20 else LARGEST_INT + 1
    if abs(value) > LARGEST_INT:
        raise ValueError(f"the number {digits[:SHOWN]}, which is beyond 64 bits")
    return value


def _fraction(digits: str) -> float:
    value = float(digits)
    if not abs(value) <= LARGEST_FLOAT:
        raise ValueError(f"the number {digits[:SHOWN]}, which no measurement gives")
    return value


def shown(value: Any) -> str:
    """Return a value as sentences show it: of a list or an object its kind, of a long text the beginning."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = json.dumps(value[:SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."

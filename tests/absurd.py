"""Absurd changes of sound JSON, from a seed: what a stranger's file may hold in place of what was written."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from suites.record import FIRST

VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, -0.5, 1.5, 10**19, 10**400, 2**62, -(10**9), 1e29, float("inf"), float("nan")),
    *("", "x", "\ud800", "<b>", "../../x", "x" * 5000, "10", [], {}, [[]], [None], [1, 2], [[1, 2]], [[5, 3]]),
    *([[0, 10**6]], {"a": 1}, {"a": None}, {"": []}),
)


def changed(sound: Any, random: Random) -> Any:
    """Return a copy with one value anywhere in it, at any depth alike, replaced, negated, left out or given twice."""
    found = copy.deepcopy(sound)
    places = [place for place in _places(found) if place]
    depth = random.choice(sorted({len(place) for place in places}))
    *way, last = random.choice([place for place in places if len(place) == depth])
    holder = found
    for step in way:
        holder = holder[step]
    old, kind = holder[last], random.randrange(10)
    if kind == 0:
        del holder[last]
    elif kind == 1 and isinstance(holder, dict):
        holder["strange"] = old
    elif kind == 1:
        holder.append(copy.deepcopy(old))
    elif kind == 2 and type(old) in (int, float):
        holder[last] = -old - 1
    else:
        holder[last] = random.choice(VALUES)
    return found


def _places(value: Any, so_far: tuple = ()) -> Iterator[tuple]:
    yield so_far
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in pairs:
        yield from _places(inner, (*so_far, name))


def spoiled(content: bytes, random: Random) -> bytes:
    """Return bytes with a few changed, cut, moved or repeated."""
    at, length = random.randrange(len(content)), random.randrange(1, 40)
    return random.choice(
        (
            content[:at],
            content[at:],
            content[:at] + random.randbytes(random.randrange(1, 4)) + content[at + 1 :],
            content[:at] + content[at : at + length] * 3 + content[at + length :],
            b"\xef\xbb\xbf" + content,
            content.replace(b"{", b"[" * 3000, 1),
            content.replace(b"0", b"1" * 5000, 1),
        )
    )


def text(data: Any) -> bytes:
    """Return data as JSON, with numbers and halves of characters that strict JSON has not."""
    return json.dumps(data, indent=1).encode()


def sealed(body: bytes) -> bytes:
    """Return the JSON of an object with a first line that holds its right checksum, as files of a run have."""
    body = body.removeprefix(b"{\n")
    return FIRST % hashlib.sha256(body).hexdigest().encode() + body


def put(path: Path, data: Any) -> None:
    """Write data as a file of a run, whatever it is."""
    path.write_bytes(sealed(text(data) + b"\n"))

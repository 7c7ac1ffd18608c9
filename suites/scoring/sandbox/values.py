"""Messages between two processes that do not trust each other: plain values as JSON, with their lengths before them.

Plain are None, truth values, numbers (of `fractions` and `decimal`, too), text, bytes, the built-in collections of them
and the views of a dict. An instance of a subclass arrives as what it is made of, an iterator as an iterator over the
values it gave, everything else is refused: what arrives has no methods but those of the receiver's own interpreter.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from typing import Any

LENGTH = struct.Struct(">I")
MOST_GIVEN = 100_000  # by an iterator
COLLECTIONS: dict[str, Any] = {kind.__name__: kind for kind in (list, tuple, set, frozenset)}
NO_ITEMS: dict[Any, Any] = {}
VIEWS: dict[str, Any] = {
    type(view).__name__: type(view) for view in (NO_ITEMS.keys(), NO_ITEMS.values(), NO_ITEMS.items())
}


def encoded(value: Any) -> Any:
    """Return a plain value as something that JSON holds exactly. Raise TypeError for another."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return ["int", hex(value)]
    if isinstance(value, float):
        return ["float", float.hex(value)]
    if isinstance(value, complex):
        return ["complex", float.hex(value.real), float.hex(value.imag)]
    if isinstance(value, Fraction):
        return ["Fraction", hex(value.numerator), hex(value.denominator)]
    if isinstance(value, Decimal):
        return ["Decimal", Decimal.__str__(value)]
    if isinstance(value, bytes | bytearray):
        return ["bytes" if isinstance(value, bytes) else "bytearray", value.hex()]
    if isinstance(value, dict):
        return ["dict", [[encoded(key), encoded(item)] for key, item in value.items()]]
    if isinstance(value, range):
        return ["range", *(hex(number) for number in (value.start, value.stop, value.step))]
    for name, kind in {**COLLECTIONS, **VIEWS}.items():
        if isinstance(value, kind):
            return [name, [encoded(item) for item in value]]
    if isinstance(value, Iterator):
        return ["iterator", [encoded(item) for item in islice(value, MOST_GIVEN)]]
    raise TypeError(f"a value of type {type(value).__name__} is not plain")


def decoded(code: Any) -> Any:
    """Return the value that `encoded` made `code` of. Raise ValueError for anything else."""
    if code is None or isinstance(code, bool | str):
        return code
    try:
        kind, *parts = code
        if kind == "int":
            return int(parts[0], 16)
        if kind == "float":
            return float.fromhex(*parts)
        if kind == "complex":
            return complex(*map(float.fromhex, parts))
        if kind == "Fraction":
            return Fraction(int(parts[0], 16), int(parts[1], 16))
        if kind == "Decimal":
            return Decimal(str(parts[0]))
        if kind in ("bytes", "bytearray"):
            return (bytes if kind == "bytes" else bytearray).fromhex(*parts)
        if kind == "range":
            return range(*(int(part, 16) for part in parts))
        [items] = parts
        if kind == "dict":
            return {decoded(key): decoded(item) for key, item in items}
        values = [decoded(item) for item in items]
        if kind == "dict_keys":
            return dict.fromkeys(values).keys()
        if kind == "dict_values":
            return dict(enumerate(values)).values()
        if kind == "dict_items":
            return dict(values).items()
        return iter(values) if kind == "iterator" else COLLECTIONS[kind](values)
    except (TypeError, ValueError, KeyError, IndexError, ArithmeticError) as error:
        raise ValueError("no plain value was sent") from error


def send(pipe: int, message: Any) -> None:
    """Write one message, anything that JSON holds, to a pipe."""
    body = json.dumps(message).encode()
    data = memoryview(LENGTH.pack(len(body)) + body)
    while data:
        data = data[os.write(pipe, data) :]


def receive(pipe: int, most: int) -> Any:
    """Return the next message of a pipe. Raise EOFError at its end, ValueError for over `most` bytes or no JSON."""
    (length,) = LENGTH.unpack(_exactly(pipe, LENGTH.size))
    if length > most:
        raise ValueError(f"a message of {length} bytes was sent, and {most} are allowed")
    return json.loads(_exactly(pipe, length))


def _exactly(pipe: int, nbytes: int) -> bytes:
    found = bytearray()
    while len(found) < nbytes:
        part = os.read(pipe, nbytes - len(found))
        if not part:
            raise EOFError
        found += part
    return bytes(found)

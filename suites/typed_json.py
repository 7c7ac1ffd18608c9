"""JSON that people pass around, read into dataclasses: their annotations say what each field must be.

Nothing of a file is trusted: not that it is a regular file, nor its size, encoding, depth, or the type of any value.
Whatever is wrong is a ValueError that names the file, the field, and what it must be. Standard library only.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from stat import S_ISREG
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

MOST_NBYTES = 64 * 2**20  # of a file of JSON; the largest record of the paper's tasks has a few
MOST_LEVELS = 16  # of lists and objects in a value that may be any
LARGEST_INT, LARGEST_FLOAT = 2**63 - 1, 1e30
SHOWN = 40  # characters of a wrong value
Reader = Callable[[Any], Any]


@dataclass(frozen=True)
class AtLeast:
    """The least that a number may be."""

    least: int


@dataclass(frozen=True)
class Above:
    """The number that another must be above."""

    bound: int


@dataclass(frozen=True)
class Matching:
    """The regular expression that a text must match as a whole, and what to call such a text."""

    pattern: str
    called: str


@dataclass(frozen=True)
class Holding:
    """The dataclass whose fields an object must hold, beside any others; it stays a dict."""

    shape: type


@dataclass(frozen=True)
class Each:
    """What every value of an object must be."""

    kind: Any


Count = Annotated[int, AtLeast(0)]
Some = Annotated[int, AtLeast(1)]
Amount = Annotated[float, AtLeast(0)]  # of time, bytes or a rate; may be a whole number
Rate = Annotated[float, Above(0)]
Name = Annotated[str, Matching(r"[A-Za-z0-9_-]{1,64}", "a name of letters, digits, - and _")]
Sha256 = Annotated[str, Matching(r"[0-9a-f]{64}", "a SHA-256")]


class Unlike(ValueError):
    """A value that is not what it must be; `path` leads to it from the outermost value, with "." before names."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.path: list[str] = []

    def inside(self, step: str) -> Unlike:
        """Return this error, found at `step` of a larger value."""
        self.path.insert(0, step)
        return self

    @property
    def field(self) -> str:
        """Return the last name on the path; of the whole value, nothing."""
        return next((step[1:] for step in reversed(self.path) if step.startswith(".")), "")

    def __str__(self) -> str:
        return f"{''.join(self.path).removeprefix('.') or 'all of it'} {self.args[0]}"


class WrongField(ValueError):
    """A file with a field that is not what it must be; `field` is that field's own name."""

    def __init__(self, sentence: str, field: str) -> None:
        super().__init__(sentence)
        self.field = field


# --- bytes and JSON ---------------------------------------------------------------------------------


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
        value = json.loads(
            text, object_pairs_hook=_object, parse_int=_whole, parse_float=_fraction, parse_constant=_fraction
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
        raise ValueError(f"an object with {_shown(twice)} twice")
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


# --- types ------------------------------------------------------------------------------------------


def typed(value: Any, kind: Any, name: str) -> Any:
    """Return parsed JSON as `kind`: a dataclass, or any annotation made of what `_reader` knows.

    Raise WrongField, a ValueError, which names the file by `name` and says what which field must be.
    """
    try:
        return _reader(kind)(value)
    except Unlike as unlike:
        raise WrongField(f"{name}: {unlike}", unlike.field) from None


@cache
def _reader(kind: Any) -> Reader:
    """Return the function that checks a value of this annotation, and returns it with its lists as tuples."""
    origin, given = get_origin(kind), get_args(kind)
    if kind is Any:
        return _anything
    if kind in _PLAIN:
        return _PLAIN[kind]
    if origin is Annotated:
        return _narrowed(given[0], given[1])
    if origin in (Union, UnionType):
        [other] = [each for each in given if each is not NoneType]
        return _or_null(_reader(other))
    if origin is Literal:
        return _one_of(given)
    if origin is tuple and given[-1] is Ellipsis:
        return _list_of(_reader(given[0]))
    if origin is tuple:
        return _row_of([_reader(each) for each in given])
    if origin is dict:
        return _object_of(_reader(given[1]))
    if is_dataclass(kind):
        return _fields_of(kind, whole=True)
    raise TypeError(f"no value of JSON is {kind}")


def _anything(value: Any) -> Any:
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return value
    raise Unlike(f"must have at most {MOST_LEVELS} levels")


def _plain(kind: Any, what: str, holds: Callable[[Any], Any] = lambda value: True) -> Reader:
    def read(value: Any) -> Any:
        if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool) or not holds(value):
            raise Unlike(f"must be {what}, not {_shown(value)}")
        return value

    return read


_NOUNS: dict[Any, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: (int | float, "a number"),
    str: (str, "text"),
}
_PLAIN: dict[Any, Reader] = {kind: _plain(*noun) for kind, noun in _NOUNS.items()}


def _narrowed(kind: Any, by: Any) -> Reader:
    """Return the reader of a value of `kind` that is narrowed by an annotation."""
    if isinstance(by, Holding):
        hold, read = _fields_of(by.shape, whole=False), _reader(kind)
        return lambda value: read(hold(value))
    if isinstance(by, Each):
        return _object_of(_reader(by.kind))
    of, noun = _NOUNS[kind]
    if isinstance(by, Matching):
        return _plain(of, by.called, re.compile(by.pattern).fullmatch)
    if isinstance(by, AtLeast):
        return _plain(of, f"{noun} of at least {by.least}", lambda value: value >= by.least)
    return _plain(of, f"{noun} above {by.bound}", lambda value: value > by.bound)


def _or_null(read: Reader) -> Reader:
    def check(value: Any) -> Any:
        if value is None:
            return None
        try:
            return read(value)
        except Unlike as unlike:
            if not unlike.path:
                unlike.args = (unlike.args[0].replace(", not", " or null, not", 1),)
            raise

    return check


def _one_of(values: tuple[Any, ...]) -> Reader:
    def check(value: Any) -> Any:
        if not any(value == each and type(value) is type(each) for each in values):
            raise Unlike(f"must be {' or '.join(map(json.dumps, values))}, not {_shown(value)}")
        return value

    return check


def _list_of(read: Reader) -> Reader:
    def check(value: Any) -> tuple:
        _a(list, value)
        found: list[Any] = []
        try:
            for each in value:
                found.append(read(each))
        except Unlike as unlike:
            raise unlike.inside(f"[{len(found)}]") from None
        return tuple(found)

    return check


def _row_of(reads: list[Reader]) -> Reader:
    def check(value: Any) -> tuple:
        if len(_a(list, value)) != len(reads):
            raise Unlike(f"must be a list of {len(reads)}, not of {len(value)}")
        found: list[Any] = []
        try:
            for read, each in zip(reads, value, strict=True):
                found.append(read(each))
        except Unlike as unlike:
            raise unlike.inside(f"[{len(found)}]") from None
        return tuple(found)

    return check


def _object_of(read: Reader) -> Reader:
    def check(value: Any) -> dict:
        found = {}
        for name, each in _a(dict, value).items():
            try:
                found[name] = read(each)
            except Unlike as unlike:
                raise unlike.inside(f".{_short(name)}") from None
        return found

    return check


def _fields_of(kind: Any, whole: bool) -> Reader:
    """Return the reader of an object with the fields of a dataclass: it, or if not `whole` a dict with any others."""
    hints = get_type_hints(kind, include_extras=True)
    reads = {field.name: _reader(hints[field.name]) for field in fields(kind)}
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]

    def check(value: Any) -> Any:
        _a(dict, value)
        for name in needed:
            if name not in value:
                raise Unlike("is missing").inside(f".{name}")
        found, name = {}, ""
        try:
            for name, each in value.items():
                if name in reads:
                    found[name] = reads[name](each)
                elif whole:
                    raise Unlike("is unknown")
        except Unlike as unlike:
            raise unlike.inside(f".{_short(name)}") from None
        return kind(**found) if whole else value

    return check


def _a(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise Unlike(f"must be {'a list' if kind is list else 'an object'}, not {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    """Return a value as sentences show it: of a list or an object its kind, of a long text the beginning."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = json.dumps(value[:SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _short(name: str) -> str:
    """Return a field's name; a foreign one that is no plain word as sentences show a value."""
    return name if re.fullmatch(r"[\w .:%()/-]{1,60}", name, re.ASCII) else _shown(name)

"""JSON that people pass around, read into dataclasses: their annotations say what each field must be.

No type in a file is trusted, nor a sign or a depth. Whatever is wrong is a ValueError that names the file, the field,
and what it must be. `strict_json` reads the text. Standard library only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from suites.strict_json import shown

MOST_LEVELS = 16  # of lists and objects in a value that may be any
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
        return _in_bulk(given[0], _list_of(_reader(given[0])))
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
            raise Unlike(f"must be {what}, not {shown(value)}")
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
            raise Unlike(f"must be {' or '.join(map(json.dumps, values))}, not {shown(value)}")
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


def _in_bulk(kind: Any, read: Reader) -> Reader:
    """Return the reader of a list of plain values or of rows of them, which takes sound ones a column at a time.

    Records hold hundreds of thousands of rows. Where anything is not as it must be, `read` finds it and says so.
    """
    if get_origin(kind) is not tuple:
        sound = _column(kind)
        return read if sound is None else lambda value: tuple(value) if _sound(value, sound) else read(value)
    columns = [_column(each) for each in get_args(kind)]
    if None in columns:
        return read

    def check(value: Any) -> tuple:
        rows = type(value) is list and set(map(type, value)) == {list} and set(map(len, value)) == {len(columns)}
        if rows and all(sound(each) for sound, each in zip(columns, zip(*value, strict=True), strict=True) if sound):
            return tuple(map(tuple, value))
        return read(value)

    return check


def _sound(value: Any, sound: Callable[[Any], bool]) -> bool:
    return type(value) is list and bool(value) and sound(value)


def _column(kind: Any) -> Callable[[Any], bool] | None:
    """Return the test whether all of some values are certainly of a plain kind; None where there is no such test."""
    origin, given = get_origin(kind), get_args(kind)
    if origin is Annotated and isinstance(given[1], AtLeast) and given[0] in (int, float):
        types, least = _TYPES[given[0]], given[1].least
        return lambda values: set(map(type, values)) <= types and min(values) >= least
    if origin is Literal and all(type(each) is str for each in given):
        return lambda values: set(map(type, values)) == {str} and set(values) <= set(given)
    if kind in _TYPES:
        return lambda values: set(map(type, values)) <= _TYPES[kind]
    return None


_TYPES: dict[Any, set[type]] = {bool: {bool}, int: {int}, float: {int, float}, str: {str}}


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
        raise Unlike(f"must be {'a list' if kind is list else 'an object'}, not {shown(value)}")
    return value


def _short(name: str) -> str:
    """Return a field's name; a foreign one that is no plain word as sentences show a value."""
    return name if re.fullmatch(r"[\w .:%()/-]{1,60}", name, re.ASCII) else shown(name)

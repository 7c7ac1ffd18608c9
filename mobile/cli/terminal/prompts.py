"""Prompts from a file, from standard input or from the command line. They are UTF-8.

Only a line feed, alone or after a carriage return, ends a line: a text may hold U+2028, U+0085 or a form feed.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from mobile.errors import Refused, one_line

STDIN = "standard input"


def sound(text: str, source: str) -> str:
    """Return the text. Raise Refused, naming its source, if it holds bytes that are no text or half surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused(
            f"{source} is no text: its character {error.start + 1} is a byte that is not UTF-8, or half of a surrogate "
            "pair; put it right, or take it out."
        ) from error
    return text


def decode(data: bytes, source: str, line: int = 1) -> str:
    """Return UTF-8 as text, without a byte-order mark. Raise Refused with the number of the line that is not UTF-8.

    `line` is the number of the first line of `data`.
    """
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        at = line + data.count(b"\n", 0, error.start)
        raise Refused(
            f"Line {at} of {source} is not UTF-8 (byte 0x{data[error.start]:02x}); convert it, or take it out."
        ) from error


def of_command_line(given: str | None) -> str:
    """Return the prompt `given`, or for `-` or None all of stdin without its last line break. Raise Refused."""
    if given is not None and given != "-":
        with suppress(UnicodeError):  # a prompt is UTF-8, also where the locale says that words are ASCII
            given = given.encode(sys.getfilesystemencoding(), "surrogateescape").decode()
        return sound(given, "The prompt")
    if given is None and sys.stdin.isatty():
        raise Refused("Give a prompt, or - to read it from standard input.")
    return "\n".join(lines(_stdin())).removesuffix("\n")


def of_file(source: str) -> list[str]:
    """Return the prompts in a file, or in stdin for `-`. Raise Refused if it cannot be read or holds none."""
    if source == "-":
        return parse(_stdin(), STDIN)
    try:
        data = Path(source).read_bytes()
    except OSError as error:
        raise Refused(f"Cannot read the prompts in {source}: {one_line(error)}.") from error
    return parse(decode(data, source), source)


def parse(text: str, source: str) -> list[str]:
    """Return one prompt a line; JSONL if the first line is an object. Raise Refused naming the line that is wrong."""
    numbered = [(number, line) for number, line in enumerate(lines(text), 1) if line.strip()]
    if not numbered:
        raise Refused(f"{source} has no prompts; write one a line.")
    if not numbered[0][1].lstrip().startswith("{"):
        return [line for _, line in numbered]
    prompts = []
    for number, line in numbered:
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Refused(f'Line {number} of {source} is not a JSON object with a "prompt".') from error
        if not isinstance(prompt, str):
            raise Refused(f'The "prompt" in line {number} of {source} is not a text.')
        prompts.append(sound(prompt, f'The "prompt" in line {number} of {source}'))
    return prompts


def lines(text: str) -> list[str]:
    """Return the lines, without their ends."""
    return [line.removesuffix("\r") for line in text.split("\n")]


class Turns:
    """An iterator over the lines of stdin; a line that is no text is given as its refusal.

    After a KeyboardInterrupt the iteration can go on: a generator would have ended there.
    """

    def __init__(self, interactive: bool) -> None:
        self._interactive = interactive
        self._number = 0

    def __iter__(self) -> Turns:
        return self

    def __next__(self) -> str | Refused:
        try:
            return self._read()
        except Refused as refused:
            return refused

    def _read(self) -> str:
        """Return the next line without its end. Raise StopIteration at the end, and Refused if it is no text."""
        line = self._typed() if self._interactive else _bytes(sys.stdin).readline()
        if not line:
            raise StopIteration
        self._number += 1
        source = f"Line {self._number} of {STDIN}"
        text = sound(line, source) if isinstance(line, str) else decode(line, STDIN, self._number)
        return text.removesuffix("\n").removesuffix("\r")

    def _typed(self) -> str | bytes:
        """Return a line from a terminal, with its end; nothing at the end of the input."""
        try:
            return f"{input('> ')}\n"
        except EOFError:
            return ""
        except UnicodeDecodeError as error:
            return bytes(error.object)


def edit_typed_lines() -> None:
    """Make input() edit its line, if this Python can."""
    with suppress(ImportError):
        import readline  # noqa: F401


def _stdin() -> str:
    """Return all of stdin. Raise Refused if it is no text."""
    data: str | bytes = _bytes(sys.stdin).read()
    return sound(data, STDIN.capitalize()) if isinstance(data, str) else decode(data, STDIN)


def _bytes(stream: Any) -> Any:
    """Return the binary stream beneath a text stream, whose decoding may let through bytes that are no text.

    A stream without one is returned itself.
    """
    return getattr(stream, "buffer", stream)

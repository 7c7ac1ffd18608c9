"""The items that gamma is tuned on: prompts, with right answers or without, and how an answer is judged."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobile.errors import Refused, one_line
from mobile.inputs import open_regular, shallow_json

MOST_FILE_NBYTES = 2**30
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Item:
    """One prompt; `answer` is the right one, None where none is known."""

    prompt: str
    answer: str | None = None


@dataclass(frozen=True)
class ItemFile:
    """The items of one file, its name and its bytes' SHA-256."""

    name: str
    sha256: str
    items: tuple[Item, ...]


def read_items(path: Path) -> ItemFile:
    """Read JSON Lines, {"prompt": ..., "answer": ...?} each. Raise Refused, naming the line that is wrong."""
    try:
        with open_regular(path) as file:
            content = file.read(MOST_FILE_NBYTES + 1)
        if len(content) > MOST_FILE_NBYTES:
            raise ValueError(f"it has more than {MOST_FILE_NBYTES:,} bytes")
        lines = content.decode("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise Refused(f"Cannot read the items in {path} ({one_line(error)}); give a file of JSON lines.") from error
    items = tuple(_item(line, f"Line {number} of {path}") for number, line in enumerate(lines, 1) if line.strip())
    if not items:
        raise Refused(f'{path} has no items; write {{"prompt": ..., "answer": ...}} one a line.')
    return ItemFile(path.name, hashlib.sha256(content).hexdigest(), items)


def _item(line: str, where: str) -> Item:
    try:
        data = shallow_json(line)
        line.encode()  # half of a surrogate pair is no text
    except ValueError as error:
        raise Refused(f"{where} is no JSON ({one_line(error)}); write one object a line.") from error
    if not isinstance(data, dict) or not _is_text(data.get("prompt")):
        raise Refused(f'{where} is not an object with a "prompt"; write {{"prompt": ..., "answer": ...}}.')
    answer = data.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = f"{answer}"
    if answer is None:
        return Item(data["prompt"])
    if not _is_text(answer):
        raise Refused(f'The "answer" in {where[0].lower()}{where[1:]} is neither a text nor a number; leave it out.')
    return Item(data["prompt"], str(answer))


def _is_text(value: Any) -> bool:
    """Return whether it is text, and not blank."""
    try:
        return isinstance(value, str) and bool(value.strip()) and bool(value.encode())
    except UnicodeEncodeError:
        return False


def is_right(output: str, answer: str) -> bool:
    """Return whether an output gives the answer.

    A number must be the last number in the output (thousands may have commas, and 4.0 is 4). Any other answer must be
    what the output ends with, in whole words, whatever the case, the spaces and the punctuation after it.
    """
    wanted = _number(answer.strip())
    if wanted is not None:
        found = NUMBER.findall(output)
        return bool(found) and _number(found[-1]) == wanted
    ends, wanted_words = _words(output), _words(answer)
    return bool(wanted_words) and (f" {ends}").endswith(f" {wanted_words}")


def _number(text: str) -> float | None:
    """Return the number that a text is; None for any other text."""
    return float(text.replace(",", "")) if NUMBER.fullmatch(text) else None


def _words(text: str) -> str:
    """Return a text in lower case, one space between words, without what is no letter or digit at its ends."""
    return re.sub(r"^\W+|\W+$", "", " ".join(text.casefold().split()))


def outcomes(items: Sequence[Item], full: Sequence[str], outputs: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the numbers of the items that are lost, and gained, by `outputs` against full K's texts.

    Lost: full K's text is right and this one is not; gained: the reverse. Without an answer an item counts as lost if
    the texts differ at all: a text that is the same has the same answer, so the share is an upper bound of the loss.
    """
    lost, gained = [], []
    for number, (item, before, now) in enumerate(zip(items, full, outputs, strict=True)):
        if before == now:
            continue
        was = item.answer is None or is_right(before, item.answer)
        is_now = item.answer is not None and is_right(now, item.answer)
        if was and not is_now:
            lost.append(number)
        if is_now and not was:
            gained.append(number)
    return lost, gained

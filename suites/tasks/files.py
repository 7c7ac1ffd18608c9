"""The items of a task: shipped files, a folder of public ones, or the hub; how many there are, and from which bytes.

A folder holds published tasks in the layout of the public files:

    gsm8k/test.jsonl, gsm8k/train.jsonl (or train_head64.jsonl: then other shots than the hub's are drawn)
    humaneval/HumanEval.jsonl (or .jsonl.gz)
    bbh/<name>.json, each {"examples": [{"input": ..., "target": ...}, ...]}

No lm-eval and no torch here: plans are made from this.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from mobile.errors import Refused, one_line
from suites.strict_json import MOST_NBYTES, parse, read_bytes
from suites.tasks.catalogue import PUBLISHED, SHIPPED

FOLDER = Path(__file__).parent
DATA = FOLDER / "data"
FIELDS = {  # of an item, by the folder that the public files lie in; what prompts and scores are made of
    "gsm8k": ("question", "answer"),
    "humaneval": ("prompt", "entry_point", "test"),
    "bbh": ("input", "target"),
}


def locate(task: str, folder: Path | None) -> dict[str, Path]:
    """Return the local files of a task by split: shipped ones, or a published task's in `folder`; none without one.

    Raise Refused naming what was looked for and where to get it.
    """
    if task in SHIPPED:
        return {"test": DATA / f"{task}.jsonl"}
    if folder is None:
        return {}
    published = PUBLISHED[task]
    found = {}
    for split, names in published.files.items():
        there = [folder / name for name in names if (folder / name).is_file()]
        if not there:
            raise Refused(
                f"Task {task} needs {' or '.join(names)} in {folder}, and it is not there; get it from "
                f"{published.url}, or leave --data-dir out to take the task from the hub."
            )
        found[split] = there[0].absolute()
    return found


def items_of(task: str, folder: Path | None) -> int:
    """Return how many test items a task has: counted where the file is here, else as published."""
    if task in SHIPPED:
        return SHIPPED[task].items
    counts = {split: len(read(path)) for split, path in locate(task, folder).items()}
    return counts["test"] if counts else PUBLISHED[task].items


def shipped(task: str) -> list[dict]:
    """Return the items of a shipped task, in order."""
    return read(locate(task, None)["test"])


@cache
def read(path: Path) -> list[dict]:
    """Return the items of a .json (under "examples"), .jsonl or .jsonl.gz file. Raise Refused for other content."""
    try:
        content = read_bytes(path)
        if path.suffix == ".gz":
            content = _unpacked(content)
        if path.suffix == ".json":
            items = parse(content, "it")["examples"]
        else:
            lines = enumerate(content.split(b"\n"), 1)
            items = [parse(line, f"line {number}") for number, line in lines if line.strip()]
        _hold(items, FIELDS.get(path.parent.name, ()))
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        why = (
            one_line(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {one_line(error)}"
        )
        raise Refused(f"{path} is not a task's file ({why}); copy it again.") from error
    return list(items)


def _unpacked(content: bytes) -> bytes:
    """Return what a gzip file holds. Raise ValueError where that is too large for items, OSError, EOFError."""
    with gzip.open(BytesIO(content)) as file:
        found = file.read(MOST_NBYTES + 1)
    if len(found) > MOST_NBYTES:
        raise ValueError(f"it unpacks to more than {MOST_NBYTES:,} bytes")
    return found


def _hold(items: Any, names: tuple[str, ...]) -> None:
    """Raise ValueError unless there is a list of items, and each has these fields, which are text."""
    if not isinstance(items, list) or not items:
        raise ValueError("it holds no list of items")
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict):
            raise ValueError(f"item {number} is no object")
        for name in names:
            if not isinstance(item.get(name), str):
                raise ValueError(f"item {number} has no text called {name}")


def sources(task: str, folder: Path | None) -> dict[str, str]:
    """Return where the items come from: by split, the file's name and SHA-256; or the hub's repository."""
    files = locate(task, folder)
    if not files:
        return {"hub": PUBLISHED[task].hub}
    return {split: f"{path.name} sha256:{_sha256(path)}" for split, path in files.items()}


@cache
def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def remarks(tasks: list[str], folder: Path | None) -> list[str]:
    """Return what a reader of the plan must know of the data, a sentence each."""
    found = []
    for task in tasks:
        files = locate(task, folder) if task in PUBLISHED else {}
        if files.get("train", Path()).name.startswith("train_head"):
            found.append(f"{task}: shots are drawn from {files['train'].name}, so they differ from those of the hub")
    return found

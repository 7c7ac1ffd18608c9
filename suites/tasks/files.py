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
import json
from functools import cache
from pathlib import Path

from mobile.errors import Refused
from suites.tasks.catalogue import PUBLISHED, SHIPPED

FOLDER = Path(__file__).parent
DATA = FOLDER / "data"


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
    files = locate(task, folder)
    return len(read(files["test"])) if files else PUBLISHED[task].items


def shipped(task: str) -> list[dict]:
    """Return the items of a shipped task, in order."""
    return read(locate(task, None)["test"])


@cache
def read(path: Path) -> list[dict]:
    """Return the items of a .json (under "examples"), .jsonl or .jsonl.gz file. Raise Refused for other content."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        if path.suffix == ".json":
            return list(json.loads(text)["examples"])
        return [json.loads(line) for line in text.splitlines() if line]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{path} is not a task's file ({type(error).__name__}: {error}); copy it again.") from error


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

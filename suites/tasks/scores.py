"""Scores of shipped tasks again, from the text alone: what a task's YAML looks for, and the answers that are shipped.

Standard library only, so that a report can do it without what runs the suite. Published tasks are not here, nor can
verdicts on code be given again without running it.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
RUN, PASSED = ("python_functions", "humaneval"), "passed"  # tasks whose answers are run, and the verdict on a right one
PATTERN = re.compile(r"^ +regex_pattern: '(.*)'$", re.MULTILINE)


@dataclass(frozen=True)
class Key:
    """The pattern that finds a task's answers, and by item its right answer and its prompt's SHA-256."""

    pattern: re.Pattern[str]
    answers: tuple[str, ...]
    prompts: tuple[str, ...]
    source: str  # as `files.sources` names it

    def found(self, output: str) -> str | None:
        """Return the first answer in a text, as lm-eval's filter takes it; None where there is none."""
        match = self.pattern.search(output)
        return match[1].strip() if match else None


@cache
def key(task: str) -> Key | None:
    """Return how a shipped task is scored; None for a task that is not shipped, or whose answers are run."""
    definition, data = FOLDER / f"{task}.yaml", FOLDER / "data" / f"{task}.jsonl"
    if not re.fullmatch(r"\w+", task, re.ASCII) or not definition.is_file() or not data.is_file():
        return None
    pattern = PATTERN.search(definition.read_text(encoding="utf-8"))
    if pattern is None:
        return None
    content = data.read_bytes()
    items = [json.loads(line) for line in content.decode().splitlines() if line]
    return Key(
        re.compile(pattern[1].replace("''", "'")),
        tuple(item["answer"] for item in items),
        tuple(hashlib.sha256(item["prompt"].encode()).hexdigest() for item in items),
        f"{data.name} sha256:{hashlib.sha256(content).hexdigest()}",
    )

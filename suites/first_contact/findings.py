"""Findings of a first contact: a JSON line each, on the disk as soon as it is known, from several processes.

Standard library only, so that a process that tests or times a card starts with nothing else in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["measured", "began", "passed", "failed", "skipped", "note", "ended"]
MOST_DETAIL = 3000  # characters that a finding keeps of a text: its end, where an error says its name
MOST_NAME = 300
MOST_NBYTES = 4 * 10**6  # of the file of all findings


@dataclass(frozen=True)
class Finding:
    """One thing that a part found.

    "measured" has a value and its unit, and is `first` if it belongs to the page's first lines. Of a test and of a
    part, "began" comes before "passed", "failed" or "skipped". "ended" closes a part, and its value is the seconds.
    """

    part: str
    kind: Kind
    name: str
    value: float | None = None
    unit: str = ""
    detail: str = ""
    first: bool = False

    def __str__(self) -> str:
        """Return the finding in one line."""
        number = "" if self.value is None else f" {self.value:,.4g} {self.unit}".rstrip()
        detail = self.detail.strip().rpartition("\n")[2]
        return f"{self.kind} {self.part}: {self.name}{number}{f' ({detail})' if detail else ''}"


def append(path: Path, finding: Finding) -> None:
    """Add a finding to the file, in one write that a power cut does not undo; no more once the file is full."""
    fields = asdict(finding) | {"name": finding.name[:MOST_NAME], "detail": finding.detail[-MOST_DETAIL:]}
    line = json.dumps(fields).encode() + b"\n"  # NaN and the infinities are words that `read` takes back
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.fstat(file).st_size + len(line) <= MOST_NBYTES:
            os.write(file, line)
            os.fsync(file)
    finally:
        os.close(file)


def read(path: Path) -> list[Finding]:
    """Return the findings so far; without the line that a killed process left unfinished, and [] without a file."""
    return list(_read(path)) if path.is_file() else []


def _read(path: Path) -> Iterator[Finding]:
    for line in path.read_bytes().splitlines():
        try:
            yield Finding(**json.loads(line))
        except (ValueError, TypeError):
            continue


def interrupted(findings: list[Finding]) -> list[Finding]:
    """Return what began and never ended: the test, or the part, during which a process was lost."""
    over = {(one.part, one.name) for one in findings if one.kind in ("passed", "failed", "skipped", "ended")}
    return [one for one in findings if one.kind == "began" and (one.part, one.name) not in over]

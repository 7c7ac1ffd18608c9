"""One machine's results as they were submitted, checked and ready to stand beside others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from reports.data.fingerprint import VIRTUAL, label
from reports.data.results import Results
from reports.verdict import machine_identity
from suites.record import Record


@dataclass(frozen=True)
class Submitted:
    """A run out of an archive, and who sent it.

    `sha256` is of its plan and records, so that the same run has the same in any archive; `code` of the code that built
    its page, and `same_code` says whether that is the code here. `missing` are lines of the checklist that its sender
    found missing, `gate` says how it compares with what is expected of its preset here.
    """

    archive: str
    by: str
    sha256: str
    results: Results
    code: str
    same_code: bool
    missing: tuple[str, ...]
    gate: str

    @property
    def machines(self) -> tuple[str, ...]:
        """Return the machines in words, each once; machines that differ in their packages only are one."""
        return tuple(dict.fromkeys(map(machine_in_words, self.results.all_records)))

    @property
    def identities(self) -> tuple[str, ...]:
        """Return what wall times depend on, of each machine."""
        return tuple(dict.fromkeys(map(machine_identity, self.results.all_records)))

    @property
    def scopes(self) -> tuple[str, ...]:
        """Return scope and weights of the records, each once."""
        return tuple(dict.fromkeys(f"{r.scope}, {r.weights}" for r in self.results.all_records))

    @cached_property
    def cells(self) -> frozenset[str]:
        """Return the labels of all cells, equal for the same cell of two runs; measured ones on whatever device."""
        records = self.results.all_records
        return frozenset(label(r if r.scope == VIRTUAL else replace(r, hardware="this machine")) for r in records)


def machine_in_words(record: Record) -> str:
    """Return the processor, its cores, and the GPU if there is one."""
    environment = record.environment
    gpu = environment["gpu"] or {}
    known = f"{environment['cpu'] or 'unknown processor'}, {environment['cores'] or '?'} cores"
    return f"{known}, {gpu.get('name') or 'unknown GPU'}" if gpu else known


def unlike(first: Submitted, second: Submitted) -> list[str]:
    """Return in what two runs differ so that their numbers may not stand in one table; nothing where they may."""
    found = []
    if first.results.preset != second.results.preset:
        found.append(f"preset {second.results.preset}, not {first.results.preset}")
    if first.code != second.code:
        found.append(f"code {second.code[:12]}, not {first.code[:12]}")
    if set(first.scopes) != set(second.scopes):
        found.append(f"scope {'; '.join(second.scopes)}, not {'; '.join(first.scopes)}")
    if first.cells != second.cells:
        more, fewer = len(second.cells - first.cells), len(first.cells - second.cells)
        found.append(f"other cells: {more} more, {fewer} fewer")
    return found


def alike(submitted: list[Submitted]) -> list[list[Submitted]]:
    """Return the submissions in groups that may stand side by side, in the order given."""
    groups: list[list[Submitted]] = []
    for one in submitted:
        group = next((group for group in groups if not unlike(group[0], one)), None)
        if group is None:
            groups.append([one])
        else:
            group.append(one)
    return groups

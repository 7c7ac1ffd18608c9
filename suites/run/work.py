"""The protocol of a piece of work, one row for each kind of it, and how work is cut into jobs of a worker.

A piece is named, and its output found, without torch or lm-eval: only a worker imports what measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import ceil
from pathlib import Path
from typing import Any, Protocol

from suites.plan.accuracy_cells import accuracy_cell_from
from suites.plan.cells import cell_from, generation_from
from suites.plan.signal_cells import signal_cell_from
from suites.record import RunFolder
from suites.synthetic.cells import synthetic_cell_from
from suites.synthetic.reference_cells import reference_cell_from


class Work(Protocol):
    """A cell, or a live run whose trace cells replay: a frozen dataclass whose fields are JSON."""

    @property
    def kind(self) -> str:
        """Return its row in `KINDS`."""

    @property
    def id(self) -> str:
        """Return a hash of everything that could change the result."""

    @property
    def label(self) -> str:
        """Return the line that a user reads."""

    @property
    def scope(self) -> str:
        """Return whose time it takes: the virtual clock's, or this machine's."""

    @property
    def shared(self) -> tuple:
        """Return a key: pieces of one kind with equal keys can be measured with what was loaded for one of them."""

    @property
    def online(self) -> bool:
        """Return whether it may read from the hub."""

    def needs(self, run: RunFolder) -> Path | None:
        """Return the file that must be there before it, if any."""

    def output(self, run: RunFolder) -> Path:
        """Return the file that it leaves, written last: it proves the piece done."""

    def intact(self, run: RunFolder) -> bool:
        """Return whether all that it left is as it was written."""


class Measurer(Protocol):
    """A module that does work of one kind."""

    def load(self, pieces: Sequence[Any], run: RunFolder, /) -> Any:
        """Return what the pieces of one job share."""

    def measure(self, piece: Any, loaded: Any, run: RunFolder, /) -> None:
        """Do the piece and write its output. Raise whatever keeps it from being done."""


@dataclass(frozen=True)
class Kind:
    """One kind of work: how to read a piece from its JSON, what measures it, and how many pieces make a job.

    A job has `most` pieces at most (None: all that share what is loaded); a few pieces are spread over `jobs` jobs.
    A `forked` piece has a process of its own, which shares what was loaded. A job of a `mixed` kind loads one thing
    after another; its pieces share the start of a process alone, and one whose input is missing is in no such job.
    """

    read: Callable[[dict[str, Any]], Work]
    measurer: Callable[[], Measurer]
    most: int | None = None
    jobs: int = 1
    forked: bool = False
    mixed: bool = False


def _generate() -> Measurer:
    from suites.measure import generate

    return generate


def _replayed() -> Measurer:
    from suites.measure import replayed

    return replayed


def _live() -> Measurer:
    from suites.measure import live

    return live


def _timing() -> Measurer:
    from suites.synthetic import timing

    return timing


def _in_turn() -> Measurer:
    from suites.synthetic import in_turn

    return in_turn


def _reference() -> Measurer:
    from suites.synthetic import reference

    return reference


def _signals() -> Measurer:
    from suites.measure import signals

    return signals


def _accuracy() -> Measurer:
    from suites.measure import accuracy

    return accuracy


KINDS = {
    # A process takes seconds to import what answers and scores; few live runs are spread over some processors.
    "generate": Kind(generation_from, _generate, most=22, jobs=8),
    "replay": Kind(cell_from, _replayed, most=16, jobs=2, forked=True, mixed=True),  # one trace after another
    "live": Kind(cell_from, _live),  # all tasks of one attached model
    "synthetic": Kind(synthetic_cell_from, _timing),  # of one model: to make 61 GB of experts takes longer than a cell
    "in turn": Kind(synthetic_cell_from, _in_turn),  # of one model: a noisy machine hurts all of them alike
    "signals": Kind(signal_cell_from, _signals),  # all tasks of one attached model
    "accuracy": Kind(accuracy_cell_from, _accuracy),  # all rounds of a family: each looks at those before it
    "reference": Kind(reference_cell_from, _reference, most=1),  # each makes a model of its own
}


def batches(pieces: Sequence[Work], run: RunFolder) -> Iterator[list[Work]]:
    """Yield what has no output yet, cut into the pieces of one job, kind by kind.

    Pieces that share all they need are dealt out in turn, since neighbours take alike, so that jobs take alike.
    """
    missing = [piece for piece in pieces if not piece.output(run).is_file()]
    for name, kind in KINDS.items():

        def together(piece: Work, mixed: bool = kind.mixed) -> tuple:
            needed = piece.needs(run)
            return () if mixed and (needed is None or needed.is_file()) else piece.shared

        left = sorted((piece for piece in missing if piece.kind == name), key=lambda one: (together(one), one.shared))
        size = min(kind.most or len(left), ceil(len(left) / kind.jobs))
        for shared, members in groupby(left, key=together):
            alike = list(members)
            if kind.mixed or shared:
                yield from (alike[begin : begin + size] for begin in range(0, len(alike), size))
            else:
                parts = ceil(len(alike) / size)
                yield from (alike[begin::parts] for begin in range(parts))

"""A disk of this machine: rows in a file that has no name, read the way the disk link reads them, and their rates."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from mobile.errors import Refused
from mobile.ledger import Key, Ledger
from mobile.links.base import LinkEnds
from mobile.links.disk import depth_for, rates
from mobile.store import DiskStore, layout_of

ROW_NBYTES, ROWS = 12_582_912, 16  # OLMoE-1B-7B's expert; 0.2 GB of them
MOST_NBYTES = 400_000_000  # of larger rows there are fewer


@dataclass(frozen=True)
class Disk:
    """The rates of a folder's disk, decimal GB/s by reads at once, and the `depth` that the link would take.

    `direct` says whether reads go past the page cache. Where rows cannot be read there, `problem` says why, and the
    others are None or empty.
    """

    folder: str
    row_nbytes: int
    gb_per_s: dict[int, float]
    depth: int | None
    direct: bool | None
    problem: str | None

    @property
    def link_gb_per_s(self) -> float | None:
        """Return the rate at the depth that the link would take."""
        return None if self.depth is None else self.gb_per_s[self.depth]


def disk(folder: Path, row_nbytes: int = ROW_NBYTES) -> Disk:
    """Return the rates at which rows, written for this into the folder, are read; they are gone afterwards."""
    where, rows = str(folder), max(1, min(ROWS, MOST_NBYTES // row_nbytes))
    try:
        with rows_on_disk(folder, row_nbytes, rows) as ends:
            found = rates(ends)
            return Disk(where, ends.row_nbytes, found, depth_for(found), reads_directly(ends), None)
    except Refused as refused:
        return Disk(where, row_nbytes, {}, None, None, str(refused))


@contextmanager
def rows_on_disk(folder: Path, row_nbytes: int, rows: int) -> Iterator[LinkEnds]:
    """Yield the ends of a link over so many rows of a new file, to as many slots in memory.

    Rows are whole pages of random bytes, so that no file system stores less. The file has no name, and no folder is
    made for it: it lies in the nearest one that is there. Raise Refused if there is no room, or it cannot be made.
    """
    layout = layout_of({"weights": torch.empty(1, row_nbytes // 2, dtype=torch.bfloat16, device="meta")}).page_aligned()
    with warnings.catch_warnings():  # that the page cache is in the way is said by those who ask
        warnings.simplefilter("ignore", UserWarning)
        store = DiskStore(layout, 1, rows, _nearest(folder) / "measured")
    try:
        slots = store.slots(rows, torch.device("cpu"))
        slots.view(torch.int64).random_()
        store.file.write(0, slots)
        store.finish()

        def fill(key: Key, slot: int) -> None:
            store.fill(*key, slots[slot])

        yield LinkEnds(
            store=store,
            rows=(1, rows),
            slots=slots,
            row_of=_in_no_memory,
            fill=fill,
            arrived=lambda key, slot: None,
            ledger=Ledger(),
            row_nbytes=layout.nbytes,
            charged_nbytes=layout.nbytes,
            load_ns=0,
            begin_ns=0,
            read_ns=0,
            link_gb_per_s=None,
        )
    finally:
        store.close()


def reads_directly(ends: LinkEnds) -> bool:
    """Return whether reads of these rows go past the page cache."""
    return isinstance(ends.store, DiskStore) and ends.store.file.direct


def _in_no_memory(key: Key) -> NoReturn:
    raise AssertionError(f"the row {key} is on a disk")


def _nearest(folder: Path) -> Path:
    """Return the folder, or its nearest parent that is there. Raise Refused where this system has no such files."""
    if not hasattr(os, "O_TMPFILE"):
        raise Refused("A disk is measured on Linux only; this system cannot make a file without a name.")
    whole = folder.absolute()
    return next((place for place in (whole, *whole.parents) if place.exists()), whole)

"""A file of rows: every expert of a model in one page-aligned file, written once and read past the page cache.

It is a safetensors file with a tensor (experts, row elements) a layer, whose header is padded to whole pages. The
header has a checksum for each row and is written last, so that a file that was not finished is none.
"""

from __future__ import annotations

import fcntl
import json
import os
import warnings
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch

from mobile.errors import Refused, one_line
from mobile.inputs import open_regular
from mobile.store.layout import PAGE, ExpertLayout

FORMAT = "mobile-rows-1"
DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",  # packed rows
}
LONGEST_HEADER = 100_000_000  # bytes; what safetensors allows
WRITTEN_AT_ONCE = 64 * 2**20  # bytes that lie in the page cache at most while a file is written


def checksum(row: memoryview) -> int:
    """Return the CRC-32 of the sums of a row's pages, as 64-bit little-endian numbers; `row` is of whole pages.

    A flipped bit changes a sum, and a page in another's place their order. The CRC-32 of all bytes runs at 7 GB/s,
    which took up to a quarter of what a disk of 1.4 GB/s reads; this takes a twentieth at most.
    """
    return zlib.crc32(np.frombuffer(row, dtype="<u8").reshape(-1, PAGE // 8).sum(axis=1))


class RowsFile:
    """The rows of `layers` layers of `experts` experts in the file `path`, to be written or to be read.

    Layers lie in the file in the order they were written. Memory that rows are read into begins at a multiple of PAGE.
    `direct` says whether reads go past the page cache; else the system is asked to forget each row that was read.
    """

    def __init__(self, path: Path, layout: ExpertLayout, layers: int, experts: int) -> None:
        self.path, self.layout, self.experts = path, layout, experts
        self.sums = [[0] * experts for _ in range(layers)]  # checksum of each row
        self.places: list[int | None] = [None] * layers  # by layer, its place in the file
        self.direct = False
        self._checked: dict[tuple[int, int], int] = {}  # by layer and expert, when the file had last been written to
        self._header_nbytes = len(self._header(""))
        # Files that close themselves, whole or not at all, whatever is broken off around them.
        self._writing: FileIO | None = None
        self._reading: FileIO | None = None
        self._source, self._keep = "", False

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, without the header."""
        return len(self.places) * self.experts * self.layout.nbytes

    def _header(self, source: str) -> bytes:
        """Return the header: its length, then JSON, of as many bytes whatever the sums and the places are."""
        layer_nbytes = self.experts * self.layout.nbytes
        entries: dict[str, object] = {
            "__metadata__": {
                "format": FORMAT,
                "fields": json.dumps([asdict(field) for field in self.layout.fields]),
                **self._packing(),
                "source": source,
                "checksums": "".join(f"{value:08x}" for sums in self.sums for value in sums),
            }
        }
        for layer, place in enumerate(self.places):
            begin = (layer if place is None else place) * layer_nbytes
            entries[f"layers.{layer}"] = {
                "dtype": DTYPES[self.layout.dtype],
                "shape": [self.experts, self.layout.numel],
                "data_offsets": [begin, begin + layer_nbytes],
            }
        text = json.dumps(entries).encode()
        nbytes = -(-(8 + len(text)) // PAGE) * PAGE
        return (nbytes - 8).to_bytes(8, "little") + text.ljust(nbytes - 8)

    def _packing(self) -> dict[str, str]:
        """Return the header's entries on packed rows, the format and where its parts lie; none for rows as they are."""
        packing = self.layout.packing
        if packing is None:
            return {}
        parts = [[asdict(part) | {"dtype": str(part.dtype)} for part in of] for of in packing.parts]
        return {
            "rows": packing.format.name,
            "of": str(packing.dtype),
            "inputs": str(packing.inputs),
            "parts": json.dumps(parts),
        }

    # --- writing ------------------------------------------------------------------------------------

    def create(self, source: str, *, keep: bool) -> None:
        """Begin a new file, complete only after `commit`. `source` names what the rows are made from.

        Without `keep` it has no name, and goes with the process. Raise Refused if it cannot be made, the disk has no
        room, or another process is making it.
        """
        self._source, self._keep, self._header_nbytes = source, keep, len(self._header(source))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if keep:
                file = self._writing = _opened(self._partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK)
                if os.fstat(file.fileno()).st_nlink > 1:  # another file's name, too: that would be overwritten
                    raise OSError(f"{self._partial.name} is a link")
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                file = self._writing = TemporaryFile(dir=self.path.parent, buffering=0)  # noqa: SIM115
            file.truncate(0)  # one that was killed may have left some
            os.posix_fallocate(file.fileno(), 0, self._header_nbytes + self.nbytes)
            self._open(Path(f"/proc/self/fd/{file.fileno()}"))
        except BlockingIOError:
            self.discard()
            raise Refused(f"Another process is making {self.path}; wait for it, or name another folder.") from None
        except OSError as error:
            self.discard()
            size = f"{self.nbytes / 1e9:.1f} GB"
            raise Refused(
                f"{self.path} of {size} cannot be made ({one_line(error)}); name a folder with room."
            ) from error

    @property
    def _partial(self) -> Path:
        return self.path.with_name(f"{self.path.name}.partial")

    def write(self, layer: int, rows: torch.Tensor) -> None:
        """Write the rows (experts, layout.numel) of a layer. Raise Refused if the disk does not take them."""
        if self.places[layer] is None:
            self.places[layer] = sum(place is not None for place in self.places)
        data = memoryview(rows.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
        row = self.layout.nbytes
        self.sums[layer] = [checksum(data[at : at + row]) for at in range(0, len(data), row)]
        assert self._writing is not None, "create was not called"
        file, offset, at = self._writing.fileno(), self._offset(layer, 0), 0
        try:
            while at < len(data):
                at += os.pwrite(file, data[at : at + WRITTEN_AT_ONCE], offset + at)
                os.fdatasync(file)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise Refused(f"{self.path} cannot be written ({one_line(error)}); name a folder with room.") from error

    def reorder(self, order: Sequence[int]) -> None:
        """Put the layers in another order: layer i becomes the one that was at `order[i]`."""
        self._checked.clear()
        self.sums = [self.sums[number] for number in order]
        self.places = [self.places[number] for number in order]

    def commit(self) -> None:
        """Complete the file, which has its name from now on if it was to be kept. Raise Refused."""
        assert self._writing is not None, "create was not called"
        try:
            if self._keep:
                os.pwrite(self._writing.fileno(), self._header(self._source), 0)
                os.fsync(self._writing)
                self._partial.replace(self.path)
        except OSError as error:
            raise Refused(f"{self.path} cannot be completed ({one_line(error)}); name another folder.") from error
        self._writing.close()

    def discard(self) -> None:
        """Remove a file that is not complete, if there is one and no other process makes it."""
        if self._writing is None or self._writing.closed:
            return
        if self._keep:
            with suppress(OSError):
                fcntl.flock(self._writing, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it may not have been locked yet
                self._partial.unlink(missing_ok=True)
        self._writing.close()

    # --- reading ------------------------------------------------------------------------------------

    def open(self, source: str) -> bool:
        """Open a complete file made from `source`; return False if there is none, or one of other rows."""
        before = self.sums, self.places, self._header_nbytes
        try:
            with open_regular(self.path) as file:
                length = file.read(8)
                nbytes = int.from_bytes(length, "little")
                header = length + (file.read(nbytes) if nbytes <= LONGEST_HEADER else b"")
            # Everything but sums and places must be what would be written for these rows.
            found = json.loads(header[8:])
            sums = iter(zip(*[iter(found["__metadata__"]["checksums"])] * 8, strict=True))
            self.sums = [[int("".join(next(sums)), 16) for _ in each] for each in self.sums]
            layer_nbytes = self.experts * self.layout.nbytes
            self.places = [found[f"layers.{n}"]["data_offsets"][0] // layer_nbytes for n in range(len(self.places))]
            self._header_nbytes = len(header)
            if (
                self._header(source) == header
                and set(self.places) == set(range(len(self.places)))
                and self.path.stat().st_size == len(header) + self.nbytes
            ):
                self._open(self.path)
                return True
        except (OSError, ValueError, KeyError, TypeError, IndexError, StopIteration, RecursionError):
            pass
        self.sums, self.places, self._header_nbytes = before
        return False

    def _open(self, path: Path) -> None:
        """Open for reading, past the page cache if the file system can. Raise OSError."""
        try:
            self._reading = _opened(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
            self.direct = hasattr(os, "O_DIRECT")
        except OSError:
            self._reading, self.direct = _opened(path, os.O_RDONLY), False
        if not self.direct:
            warnings.warn(
                f"{self.path.parent} takes no direct reads, so rows go through the page cache, which the system is "
                "asked to forget: the disk's speed is not what is measured.",
                stacklevel=2,
            )

    def _offset(self, layer: int, expert: int) -> int:
        place = self.places[layer]
        assert place is not None, f"layer {layer} was not written"
        return self._header_nbytes + (place * self.experts + expert) * self.layout.nbytes

    def read(self, layer: int, expert: int, into: memoryview) -> None:
        """Read one row into page-aligned memory of its size. Raise Refused if it cannot be read, or is damaged.

        A row is checked when it is first read, and again once the file was written to since: to check every read took
        a tenth of the rate.
        """
        assert self._reading is not None, "the file was not opened"
        file, offset, at = self._reading.fileno(), self._offset(layer, expert), 0
        try:
            written = os.fstat(file).st_mtime_ns  # as of before the read, so that what is written meanwhile counts
            while at < len(into):
                got = os.preadv(file, [into[at:] if at else into], offset + at)
                if got == 0:
                    raise Refused(
                        f"{self.path} ends before layer {layer}, expert {expert}; delete it, and it is made again."
                    )
                at += got
        except OSError as error:
            raise Refused(f"{self.path} cannot be read ({one_line(error)}); copy it to another disk.") from error
        if self._checked.get((layer, expert)) != written:
            if checksum(into) != self.sums[layer][expert]:
                raise Refused(
                    f"{self.path} is damaged in layer {layer}, expert {expert}; delete it, and it is made again."
                )
            self._checked[layer, expert] = written
        if not self.direct:
            os.posix_fadvise(file, offset, len(into), os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Let go of the file, and remove it if it is not complete."""
        self.discard()
        if self._reading is not None:
            self._reading.close()


def _opened(path: Path, flags: int) -> FileIO:
    """Open a file with these flags of the system, unbuffered, for its owner if it is new. Raise OSError."""
    mode = "r+" if flags & os.O_RDWR else "r"
    return FileIO(path, mode, opener=lambda name, _: os.open(name, flags, 0o600))

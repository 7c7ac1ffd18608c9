"""The disk store: every expert of the model in a file of rows, for a model that is larger than memory."""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from mobile.errors import one_line
from mobile.store.layout import ExpertLayout
from mobile.store.packed import Weights, unpacked
from mobile.store.placeholder import Placeholder
from mobile.store.rows_file import RowsFile

LARGE_PAGE = 2 * 2**20  # bytes; where these begin on the processors that have them


def page_aligned_rows(rows: int, layout: ExpertLayout) -> torch.Tensor:
    """Return memory of rows (rows, layout.numel) that begins at a page, zeroed by the system when it is first used.

    Its pages are large where the system has such: the disk then writes a row to few places, not to 3,072 of 4 KiB for
    OLMoE's 12.6 MB, and direct reads ran at 4.0 GB/s instead of 1.2 to 1.8. Raise RuntimeError if memory is short.
    """
    nbytes = rows * layout.nbytes
    try:
        memory = mmap.mmap(-1, nbytes + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise RuntimeError(f"{nbytes} bytes of memory cannot be taken: {one_line(error)}") from error
    with suppress(OSError, AttributeError):  # a system without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -whole.data_ptr() % LARGE_PAGE
    return whole[begin : begin + nbytes].view(layout.dtype).view(rows, layout.numel)


def bytes_of(row: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous row on the CPU, to read into."""
    return memoryview(row.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]


class DiskStore:
    """A model's experts on disk, in the file `path`. One layer at a time is in memory while it is filled.

    With `keep` the file is used again by whoever gives the same `source`, which names what the rows are made from;
    without, it has no name, and goes with the process. `layout` is page-aligned.
    """

    def __init__(
        self, layout: ExpertLayout, layers: int, experts: int, path: Path, *, source: str = "", keep: bool = False
    ) -> None:
        self.layout = layout
        self.file = RowsFile(path, layout, layers, experts)
        self._filling: dict[int, dict[str, Weights]] = {}  # by layer, its weights as views of rows in memory
        self._rows: dict[int, torch.Tensor] = {}
        self._lock = threading.Lock()
        self._end = weakref.finalize(self, self.file.close)
        self.reads_at_once: int | None = None  # that this disk needs, once a link has measured it
        self.is_complete = keep and self.file.open(source)  # whether nothing has to be written
        if not self.is_complete:
            self.file.create(source, keep=keep)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.file.nbytes

    def weights(self, layer: int, name: str) -> Weights:
        """Return one stacked weight of a layer that is to be filled, (experts, ...), in memory until `complete`."""
        with self._lock:  # several threads fill one layer
            if layer not in self._filling:
                shape = self.file.experts, self.layout.numel
                self._rows[layer] = torch.zeros(shape, dtype=self.layout.dtype, device="cpu")
                self._filling[layer] = self.layout.views(self._rows[layer])
        return self._filling[layer][name]

    def complete(self, layer: int) -> None:
        """Write a layer whose weights were filled, and let go of their memory. Raise Refused if the disk is full."""
        self.file.write(layer, self._rows[layer])
        del self._filling[layer], self._rows[layer]

    def reorder(self, order: Sequence[int]) -> None:
        """Put the layers in another order: layer i becomes the one that was at `order[i]`."""
        self.file.reorder(order)

    def finish(self) -> None:
        """Complete the file, now that every layer is in it."""
        if not self.is_complete:
            self.file.commit()
            self.is_complete = True

    def views(self, layer: int) -> dict[str, Weights]:
        """Return all stacked weights of a layer by name, (experts, ...) each, read into memory of their own."""
        rows = page_aligned_rows(self.file.experts, self.layout)
        for expert in range(self.file.experts):
            self.fill(layer, expert, rows[expert])
        return self.layout.views(rows)

    def slots(self, count: int, device: torch.device) -> torch.Tensor:
        """Return zeroed memory of slots (count, layout.numel) that begin at pages; `device` is the CPU.

        All of it is taken now: a first read into new memory waits for the system to find and clear it.
        """
        return page_aligned_rows(count, self.layout).zero_()

    def fill(self, layer: int, expert: int, slot: torch.Tensor) -> None:
        """Read an expert's row into `slot`, (layout.numel,), page-aligned memory of the CPU. Raise Refused."""
        self.file.read(layer, expert, bytes_of(slot))

    def take(self, modules: Sequence[nn.Module]) -> None:
        """Move every module's experts into the file; the parameters stay as empty placeholders.

        Broken off anywhere, every expert is in the file or in its parameter, and `give_back` makes the modules whole.
        """
        for layer, module in enumerate(modules):
            weights = {field.name: getattr(module, field.name) for field in self.layout.fields}
            if all(weight.numel() for weight in weights.values()):
                for name, weight in weights.items():
                    self.weights(layer, name).copy_(weight.data)
                self.complete(layer)
            for weight in weights.values():
                if weight.numel():  # 2. the row is on disk before the parameter lets go of its numbers
                    with torch.inference_mode(weight.is_inference()):
                        weight.data = weight.data.new_empty(0)
                weight.__class__ = Placeholder
        self.finish()

    def give_back(self, modules: Sequence[nn.Module]) -> None:
        """Put every expert back into its module's own parameters, bit for bit. Broken off, it can be called again."""
        for layer, module in enumerate(modules):
            names = [field.name for field in self.layout.fields]
            if any(not getattr(module, name).numel() for name in names):
                views = self.views(layer)
                for name in names:
                    weight = getattr(module, name)
                    if not weight.numel():
                        with torch.inference_mode(weight.is_inference()):
                            weight.data = unpacked(views[name]).to(weight.device, copy=True).contiguous()
            for name in names:
                getattr(module, name).__class__ = nn.Parameter

    def close(self) -> None:
        """Let go of the file."""
        self._end()

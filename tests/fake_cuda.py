"""torch.cuda's streams, events and page-locking on a CPU, for what the order of launches decides.

Everything runs when it is launched. What CUDA would order is kept beside it as vector clocks: an access to watched
memory that nothing orders behind a conflicting one is a race, whatever came out this time. The host waits for nothing
that it does not ask for, so what is found in order here is in order on a card.
"""

from __future__ import annotations

import gc
import struct
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mobile.links import cuda

ALLOCATE = (torch.ops.aten.empty_like.default, torch.ops.aten.new_empty.default)  # like something, without reading it
Clock = dict["Stream", int]  # of each stream, how many of its launches are known to be over


def merge(clock: Clock, other: Clock) -> None:
    for stream, count in other.items():
        clock[stream] = max(clock.get(stream, 0), count)


class Card:
    """The runtime: `gb_per_s` is what its link carries, `refuses` an error code for blocks it will not page-lock.

    `races` says what was found; `registered` are page-locked blocks, bytes by address; `queries` decides whether an
    event that is asked about is found to be over, which nothing but luck decides on a card.
    """

    def __init__(self) -> None:
        self.gb_per_s, self.refuses, self.seconds = 25.0, 0, 0.0
        self.device = 0
        self.contexts: set[int] = set()  # of which devices the runtime's own calls were made
        self.races: list[str] = []
        self.registered: dict[int, int] = {}
        self.last_error = 0
        self.queries = Random(0)
        self.host: Clock = {}  # what the host knows to be over, and with it whatever it launches
        self.streams: dict[int, Stream] = {}  # by device, the current one
        self.made: list[Stream] = []
        self._row_nbytes: dict[int, int] = {}  # of watched memory, by the address of its storage
        self._reads: dict[tuple[int, int], Clock] = defaultdict(dict)  # by storage and row, since it was last written
        self._writes: dict[tuple[int, int], Clock] = {}

    def watch(self, rows: torch.Tensor) -> None:
        """Tell races in this memory, row by row."""
        self._row_nbytes[rows.untyped_storage().data_ptr()] = rows[0].nbytes

    def current(self, device: Any = None) -> Stream:
        index = self.device if device is None else getattr(device, "index", device) or 0
        if index not in self.streams:
            self.streams[index] = Stream(index, card=self, name=f"default stream of {index}")
        return self.streams[index]

    def launched(self, func: Any, args: tuple) -> None:
        """Something was launched on the current stream: note which rows it reads and writes, and what it races with."""
        stream = self.current()
        stream.launch()
        for argument, value in zip(func._schema.arguments, args, strict=False):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in value if isinstance(value, list | tuple) else [value]:
                if isinstance(tensor, torch.Tensor):
                    self._access(stream, tensor, f"{func} on {stream.name}", writes=writes)

    def _access(self, stream: Stream, tensor: torch.Tensor, what: str, *, writes: bool) -> None:
        base = tensor.untyped_storage().data_ptr()
        if base not in self._row_nbytes or not tensor.numel():
            return
        span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        first, last = (tensor.data_ptr() - base) // self._row_nbytes[base], tensor.data_ptr() - base
        last = (last + span * tensor.element_size() - 1) // self._row_nbytes[base]
        for row in range(first, last + 1):
            earlier: Clock = dict(self._writes.get((base, row), {}))
            if writes:
                merge(earlier, self._reads.pop((base, row), {}))
            for other, count in earlier.items():
                if stream.clock.get(other, 0) < count:
                    self.races.append(f"{what} {'writes' if writes else 'reads'} row {row}, racing with {other.name}")
            if writes:
                self._writes[base, row] = {stream: stream.clock[stream]}
            else:
                self._reads[base, row][stream] = stream.clock[stream]

    # --- the runtime's own calls ----------------------------------------------------------------------

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if self.refuses:
            self.last_error = self.refuses
            return self.refuses
        assert address not in self.registered, "registered twice"
        self.registered[address] = nbytes
        self.contexts.add(self.device)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.contexts.add(self.device)
        if self.registered.pop(address, None) is not None:
            return 0
        self.last_error = 713
        return self.last_error

    def cudaGetErrorString(self, code: int) -> str:
        return {801: "operation not supported"}.get(code, "some error")

    def is_pinned(self, block: torch.Tensor) -> bool:
        return any(start <= block.data_ptr() < start + nbytes for start, nbytes in self.registered.items())


class Stream:
    """One queue of a device."""

    card: Card

    def __init__(self, device: Any = None, card: Card | None = None, name: str = "stream") -> None:
        self.card = card or self.card
        self.device = self.card.device if device is None else getattr(device, "index", device) or 0
        self.name = name
        self.clock: Clock = {self: 0}
        self.card.made.append(self)

    def launch(self) -> None:
        merge(self.clock, self.card.host)
        self.clock[self] += 1

    def wait_event(self, event: Event) -> None:
        self.launch()
        merge(self.clock, event.clock)

    def wait_stream(self, other: Stream) -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)


class Event:
    """A place in a stream; asked about before it was recorded, it is over."""

    card: Card

    def __init__(self, enable_timing: bool = False) -> None:
        self.timed, self.clock, self.at, self.device = enable_timing, {}, 0.0, None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.card.current()
        assert self.device in (None, stream.device), "an event belongs to the device it was first recorded on"
        stream.launch()
        self.clock, self.at, self.device = dict(stream.clock), self.card.seconds, stream.device

    def synchronize(self) -> None:
        merge(self.card.host, self.clock)

    def query(self) -> bool:
        over = all(self.card.host.get(stream, 0) >= count for stream, count in self.clock.items())
        if not over and self.card.queries.random() < 0.5:
            merge(self.card.host, self.clock)
            over = True
        return over

    def elapsed_time(self, end: Event) -> float:
        assert self.timed
        assert end.timed
        assert self.device is not None, "an event that was never recorded"
        if self.device != end.device:
            raise RuntimeError("Events of two devices have no time between them")
        return struct.unpack("f", struct.pack("f", 1000 * (end.at - self.at)))[0]  # float32, as a card tells it


class Launches(TorchDispatchMode):
    """Every operator that is no view is launched on the current stream, and raises what an earlier call left behind."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        returned = func._schema.returns
        is_view = bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write
        if not is_view:
            if self.card.last_error:
                left, self.card.last_error = self.card.last_error, 0
                raise RuntimeError(f"CUDA error {left}")
            if func not in ALLOCATE:
                self.card.launched(func, args)
            if func is torch.ops.aten.copy_.default:
                self.card.seconds += args[0].nbytes / self.card.gb_per_s / 1e9
        return func(*args, **(kwargs or {}))


@pytest.fixture
def card(monkeypatch) -> Iterator[Card]:
    """A card as `torch.cuda`, while the test runs."""
    card = Card()

    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        device, before = card.device, card.current(chosen.device)
        card.device, card.streams[chosen.device] = chosen.device, chosen
        try:
            yield
        finally:
            card.device, card.streams[chosen.device] = device, before

    @contextmanager
    def device(chosen: Any) -> Iterator[None]:
        before, card.device = card.device, getattr(chosen, "index", chosen) or 0
        try:
            yield
        finally:
            card.device = before

    def synchronize(device: Any = None) -> None:
        for one in card.made:
            merge(card.host, one.clock)

    monkeypatch.setattr(Stream, "card", card, raising=False)
    monkeypatch.setattr(Event, "card", card, raising=False)
    for name, stand_in in {
        "Stream": Stream,
        "Event": Event,
        "stream": stream,
        "device": device,
        "current_stream": card.current,
        "synchronize": synchronize,
        "cudart": lambda: card,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self, device=None: card.is_pinned(self))
    monkeypatch.setattr(cuda, "WAKE_SECONDS", 0.0)  # of copies, which here are real ones
    gc.freeze()  # so that collecting looks at what a test made, and is quick
    with Launches(card):
        yield card
        gc.collect()  # whatever holds on to this card lets go of it before the next one comes
    gc.unfreeze()

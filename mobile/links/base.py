"""The interface of every link: it copies experts' rows from host memory into slots, and accounts for the time.

Residency decides what is copied when, and asks no link which kind it is. Needs no torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, Protocol

from mobile.ledger import Key, Ledger

if TYPE_CHECKING:
    import torch

    from mobile.store import Store

Arrival = Callable[[Key, int], None]


class Copy(NamedTuple):
    """A row on its way into a slot, and what it was first asked for as: "load" or "prefetch"."""

    key: Key
    slot: int
    what: str


class Processor(Protocol):
    """The processor that computes experts beside the device, one after another."""

    def after_each(self, call: Callable[[], None]) -> None:
        """Have this called after each expert, on the thread that computes or waits for the layer."""

    def join(self) -> None:
        """Wait until all that was submitted is computed. Raise what one of them raised."""


@dataclass(frozen=True)
class LinkEnds:
    """All that a link is made from: where rows lie, where they go, and what to call when one has arrived.

    `rows` are the layers and the experts of each that keys count. `fill(key, slot)` copies a row at once, `row_of(key)`
    is the row in host memory, (row elements,), and `slots` (slots, row elements) are the rows on the device,
    `row_nbytes` each. `arrived(key, slot)` is called for every copy that has ended. In computed time a copy takes
    `load_ns`, and the host `begin_ns` to begin it and `read_ns` to read a result; it is accounted for as
    `charged_nbytes`. `link_gb_per_s` (decimal) is the rate that the link is to be slowed down to, None for its own.
    `processor` computes experts while copies go on, None where the strategy has none do so.
    """

    store: Store
    rows: tuple[int, int]
    slots: torch.Tensor
    row_of: Callable[[Key], torch.Tensor]
    fill: Callable[[Key, int], None]
    arrived: Arrival
    ledger: Ledger
    row_nbytes: int
    charged_nbytes: int
    load_ns: int
    begin_ns: int
    read_ns: int
    link_gb_per_s: float | None
    processor: Processor | None = None


class Link(Protocol):
    """One host-to-device channel. Demand loads go before prefetches; a copy that has begun is not interrupted.

    `now` is nanoseconds since the link was made.
    """

    @property
    def now(self) -> int: ...
    @property
    def begun(self) -> int:
        """Number of copies begun since the ledger was cleared, those that failed left out."""
        ...

    @property
    def gb_per_s(self) -> float | None:
        """Decimal GB/s that copies were measured to take; None where that was not measured."""
        ...

    @property
    def runs_behind(self) -> bool:
        """Whether the device computes behind the host in real time, so that its last work ends after the host's."""
        ...

    def launched(self) -> None:
        """Note that all of a step was launched, on a device that runs behind."""

    def done_at(self, *, wait: bool) -> int | None:
        """Return when such a device was done with that, on the clock of `now`; None if it is not, unless `wait`."""
        ...

    def submit(self, key: Key, slot: int, *, demand: bool) -> None:
        """Queue a copy of `key` into `slot`; it begins at once if the channel is idle."""

    def promote(self, key: Key) -> None:
        """Move a queued prefetch to the demand loads, since compute waits for it. No effect if its copy has begun."""

    def cancel(self, key: Key) -> bool:
        """Take back a prefetch that is queued, or failed; False if its copy is under way or over, or never was."""
        ...

    def wait(self, key: Key) -> None:
        """Have compute go on only once `key` has arrived; count its waiting as stall. Raise what its copy raised."""

    def compute(self, ns: int, about: Key | str, host_ns: int = 0) -> int:
        """Let the device compute for `ns` while copies go on, after the host has launched it in `host_ns`.

        Return the nanoseconds until it is over where time is virtual, 0 elsewhere.
        """
        ...

    def read_result(self) -> int:
        """Have the host wait for what it launched and read it, as it does a routing or a token.

        Return the nanoseconds until the device can go on where time is virtual, 0 elsewhere.
        """
        ...

    def on_cpu(self, ns: int, about: Key) -> None:
        """Let the processor compute an expert beside the device, after those it was given before."""

    def join_cpu(self, about: Key) -> None:
        """Have compute go on only once the processor is done; count its waiting as stall, for `about`."""

    def used(self, slots: Sequence[int]) -> None:
        """Note that all that reads these slots has been launched: another copy may take them after it."""

    def join(self) -> None:
        """Begin copies asked for from now on only after the compute launched so far: loading without overlap."""

    def reset(self) -> None:
        """Let go of everything asked for; when it returns nothing writes into a slot any more."""

    def rewind(self) -> None:
        """Set `now` to zero."""

    def close(self) -> None:
        """Give back what the link holds; no other call follows."""


class CopyQueue:
    """Copies not begun: demand loads first, each kind in the order it was asked for."""

    def __init__(self) -> None:
        self.demand: deque[Copy] = deque()
        self.prefetch: deque[Copy] = deque()

    def add(self, key: Key, slot: int, *, demand: bool) -> None:
        """Append a copy to its kind."""
        if demand:
            self.demand.append(Copy(key, slot, "load"))
        else:
            self.prefetch.append(Copy(key, slot, "prefetch"))

    def next(self) -> Copy | None:
        """Take out the copy to begin next; None if there is none."""
        queue = self.demand or self.prefetch
        return queue.popleft() if queue else None

    def __iter__(self) -> Iterator[Copy]:
        return chain(self.demand, self.prefetch)

    def promote(self, key: Key) -> None:
        """See `Link.promote`."""
        for copy in self.prefetch:
            if copy.key == key:
                self.prefetch.remove(copy)
                self.demand.append(copy)
                return

    def cancel(self, key: Key) -> bool:
        """Drop a queued prefetch; False if there is none of that key."""
        for copy in self.prefetch:
            if copy.key == key:
                self.prefetch.remove(copy)
                return True
        return False

    def clear(self) -> None:
        """Drop everything."""
        self.demand.clear()
        self.prefetch.clear()

"""The ledger: the events of a run, in order, and the counters that sum them up."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from mobile import outputs

Key = tuple[int, int]  # (MoE layer ordinal, expert)


class Event(NamedTuple):
    """A thing that took time: `what` is "load", "prefetch", "compute", "cpu" or "stall"; nanoseconds.

    `about` is the expert key it was for, or a word.
    """

    what: str
    start_ns: int
    end_ns: int
    about: Key | str

    @property
    def name(self) -> str:
        """Return a name to show: "load 3.17" is layer 3, expert 17."""
        return f"{self.what} {self.about if isinstance(self.about, str) else '.'.join(map(str, self.about))}"


class Mark(NamedTuple):
    """The begin of a pass ("prefill", "full", "little", "big"), or of the fallback of an unsure token ("fallback").

    `begun` is the number of copies begun by then. Copies end in the order they begin, so it splits the list of them.
    """

    what: str
    ns: int
    begun: int


@dataclass(slots=True)
class Counters:
    """Totals since attach or the last reset. Counts are of experts, `tokens` of decoded tokens.

    Decode: `hits` were ready when asked for, `demand_loads` were waited for from the start, `late_prefetches`
    were on their way, `cpu_experts` were computed on the CPU. `streamed_loads` and `streamed_on_cpu` are prefill's (and
    those of a batch wider than the pool), which has no hit rate. `loads` counts finished copies of any kind.

    `decode_ns` is `decode_dense_ns` (attention, norms, router, shared experts, head), `decode_expert_ns` (experts on
    the device) and `decode_stall_ns`, of which `decode_cpu_stall_ns` waited for the CPU and the rest for the link. A
    real link does not time kernels: there the parts but the stall stay 0, which means unknown.
    """

    prompt_tokens: int = 0
    tokens: int = 0
    fallbacks: int = 0
    loads: int = 0
    bytes_loaded: int = 0
    hits: int = 0
    demand_loads: int = 0
    prefetch_loads: int = 0
    prefetch_useful: int = 0
    late_prefetches: int = 0
    streamed_loads: int = 0
    cpu_experts: int = 0
    streamed_on_cpu: int = 0
    stall_ns: int = 0
    cpu_stall_ns: int = 0
    prefill_ns: int = 0
    decode_ns: int = 0
    decode_bytes: int = 0
    decode_dense_ns: int = 0
    decode_expert_ns: int = 0
    decode_stall_ns: int = 0
    decode_cpu_stall_ns: int = 0

    def copy(self) -> Counters:
        """Return a copy."""
        return Counters(**self.as_dict())

    def since(self, earlier: Counters) -> Counters:
        """Return the difference to earlier counters, field by field."""
        return Counters(**{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)})

    def as_dict(self) -> dict[str, int]:
        """Return the counters by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def touches(self) -> int:
        """Return the number of experts that decode steps needed."""
        return self.hits + self.demand_loads + self.late_prefetches + self.cpu_experts


class Ledger:
    """The events and counters of one engine. The newest `limit` events are kept; counters lose nothing."""

    def __init__(self, limit: int = 200_000) -> None:
        self.counters = Counters()
        self.guesses: dict[int, tuple[int, int, int]] = {}  # by layer: experts foreseen, of them right, and needed
        self.events: deque[Event] = deque(maxlen=limit)
        self.marks: deque[Mark] = deque(maxlen=limit)
        self.keeps_events = limit > 0

    def event(self, what: str, start_ns: int, end_ns: int, about: Key | str) -> None:
        """Append an event, unless it took no time. Call it only where `keeps_events`: most replays keep none."""
        if end_ns > start_ns:
            self.events.append(Event(what, start_ns, end_ns, about))

    def mark(self, what: str, ns: int, begun: int) -> None:
        """Append a mark. Call it only where `keeps_events`."""
        self.marks.append(Mark(what, ns, begun))

    def guess(self, layer: int, foreseen: int, right: int, needed: int) -> None:
        """Count a visit of `layer` that needed so many experts, `right` of which were among the `foreseen`."""
        before = self.guesses.get(layer, (0, 0, 0))
        self.guesses[layer] = (before[0] + foreseen, before[1] + right, before[2] + needed)

    def clear(self) -> None:
        """Forget everything."""
        self.counters = Counters()
        self.guesses.clear()
        self.events.clear()
        self.marks.clear()

    def stats(self) -> dict[str, Any]:
        """Return counters as plain numbers, plus `hit_rate` (None before any decode) and times in seconds.

        The parts of the decode time are None before any decode, and on a real link.
        """
        c = self.counters
        numbers: dict[str, Any] = {k: v for k, v in c.as_dict().items() if not k.endswith("_ns")}
        numbers["hit_rate"] = c.hits / c.touches if c.touches else None
        for name in ("stall", "prefill", "decode", "decode_stall"):
            numbers[f"{name}_seconds"] = getattr(c, f"{name}_ns") / 1e9
        for name in ("decode_dense", "decode_expert", "decode_cpu_stall"):
            numbers[f"{name}_seconds"] = getattr(c, f"{name}_ns") / 1e9 if c.decode_dense_ns else None
        numbers["seconds"] = (c.prefill_ns + c.decode_ns) / 1e9
        return numbers

    def export_perfetto(self, path: str | Path) -> None:
        """Write the events as a Chrome trace (JSON), which ui.perfetto.dev opens: a row each for link, GPU and CPU.

        Raise Refused where it cannot be written.
        """
        rows = {"load": 1, "prefetch": 1, "compute": 2, "stall": 2, "cpu": 3}
        names: list[dict[str, Any]] = [
            {"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": name}}
            for tid, name in ((1, "link"), (2, "GPU"), (3, "CPU"))
        ]
        spans = [
            {
                "ph": "X",
                "pid": 1,
                "tid": rows[e.what],
                "name": e.name,
                "ts": e.start_ns / 1e3,
                "dur": (e.end_ns - e.start_ns) / 1e3,
            }
            for e in self.events
        ]
        with outputs.open_atomic(Path(path)) as file:
            file.write(json.dumps({"traceEvents": names + spans}).encode())

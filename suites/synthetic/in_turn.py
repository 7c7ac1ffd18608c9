"""Synthetic cells over a disk, timed in turn: each cell plays a script, then each the next, the other way round (ABBA).

A machine that is busy for a while slows all cells alike, and drift that is even cancels out. A script begins with cold
slots. What a turn took lies in the run folder, so that a killed run goes on with the next one.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import torch

from mobile.costs.hardware import HardwareProfile
from mobile.errors import Refused
from mobile.ledger import Counters, Ledger
from mobile.links.stream import StreamLink
from mobile.policies.strategy import resolve
from mobile.runtime.engine import Engine
from mobile.store import DiskStore
from suites.record import RunFolder, read_json, sound, write_json
from suites.strict_json import called
from suites.synthetic import models
from suites.synthetic.calibrate import calibrated
from suites.synthetic.cells import SyntheticCell
from suites.synthetic.link_use import LinkUse, copying_ns
from suites.synthetic.measurement import Measurement, record_of
from suites.synthetic.models import Synthetic
from suites.synthetic.script_player import Played, play
from suites.synthetic.timing import Loaded, attached, memory_of, scripts_for, use_of
from suites.typed_json import Count, Rate, Some, typed

PROBED_ROWS = 16  # read before each turn, and after it


@dataclass(frozen=True)
class Turn:
    """One script under one cell: what it took, and all that was counted from the prompt on.

    Copies are those of the whole turn, `copies_ns` the time in which any of them was made. `disk_gb_per_s` is what the
    disk gave right before and after it, decimal.
    """

    hardware: str
    slots: Some
    played: Played
    counters: Counters
    guesses: dict[int, tuple[int, int, int]]
    copies_ns: Count
    disk_gb_per_s: Rate
    use: LinkUse | None
    link: dict[str, Any]


@dataclass(frozen=True)
class Together(Loaded):
    """The cells of one model, which is made once for each row format that they ask for.

    `here` is the profile of this machine, or why there is none, and `failed` why a cell could not be played.
    """

    by_rows: dict[str, Synthetic] = field(default_factory=dict)
    cells: Sequence[SyntheticCell] = ()
    here: HardwareProfile | Refused | None = None
    failed: dict[str, Exception] = field(default_factory=dict)


def load(cells: Sequence[SyntheticCell], run: RunFolder) -> Together:
    """Make the model of these cells, its experts in a file of the run folder for each format, and calibrate."""
    torch.set_num_threads(1)  # a core computes, another one reads
    cell, formats = cells[0], dict.fromkeys(each.rows for each in cells)
    size: dict[str, Any] = {"layers": cell.layers, "shrink": cell.shrink, "device": "cpu", "folder": run.path}
    by_rows = {rows: models.make(cell.model.geometry, **size, rows=rows) for rows in formats}
    made = by_rows[cell.rows]
    here: HardwareProfile | Refused | None
    try:
        here = calibrated(cell, made.layout.weight_dtype, run)
    except Refused as refused:
        here = refused
    return Together(made, by_rows=by_rows, cells=cells, here=here)


def measure(cell: SyntheticCell, loaded: Together, run: RunFolder) -> None:
    """Write the record of a cell, once all cells have been played. Raise what kept this one from being played."""
    play_in_turn(loaded, run)
    if cell.id in loaded.failed:
        raise loaded.failed[cell.id]
    turns = [read_turn(run, cell.id, repeat) for repeat in range(cell.repeats)]
    made = loaded.by_rows[cell.rows]
    measured = together(turns, made.geometry.expert_nbytes, memory_of(cell, made.device))
    record_of(cell, made, scripts_for(cell, loaded), measured, loaded.here).save(cell.output(run))


def play_in_turn(loaded: Together, run: RunFolder) -> None:
    """Play every repeat that was not played yet; a cell that cannot be played is left out from then on."""
    for repeat in range(max(cell.repeats for cell in loaded.cells)):
        for cell in loaded.cells if repeat % 2 == 0 else reversed(loaded.cells):
            path = run.turn(cell.id, repeat)
            if repeat >= cell.repeats or cell.id in loaded.failed or sound(path, cell=cell.id, repeat=repeat):
                continue
            begun = time.monotonic()
            try:
                write_json(path, {"cell": cell.id, "repeat": repeat, **asdict(turn(cell, loaded, repeat))})
            except Exception as error:
                loaded.failed[cell.id] = error
            print(f"{cell.label}, repeat {repeat}: {time.monotonic() - begun:.1f} s", flush=True)


def turn(cell: SyntheticCell, loaded: Together, repeat: int) -> Turn:
    """Play one script from cold slots. Raise Refused as attach does, and for a row that cannot be read."""
    made, script = loaded.by_rows[cell.rows], scripts_for(cell, loaded)[repeat]
    with attached(cell, made) as engine:
        probe_ns(engine)  # the first reads of a while are slower
        before = probe_ns(engine)
        engine.restart()
        played = play(made, script)
        ledger, store = engine.ledger, cast(DiskStore, made.store)
        return Turn(
            hardware=engine.hardware.name,
            slots=engine.slots,
            played=played,
            counters=ledger.counters.copy(),
            guesses=dict(ledger.guesses),
            copies_ns=copying_ns(ledger.events),
            disk_gb_per_s=2 * PROBED_ROWS * engine.geometry.expert_nbytes / (before + probe_ns(engine)),
            use=use_of(engine, resolve(cell.strategy, cell.gamma)),
            link={"link_depth": store.reads_at_once, "link_direct": store.file.direct},
        )


def probe_ns(engine: Engine) -> int:
    """Return the nanoseconds in which the engine's own channel reads some rows, with nothing else to do."""
    channel, begun = cast(StreamLink, engine.link).channel, time.perf_counter_ns()
    experts = range(engine.geometry.experts)
    keys = [(0, experts[number * len(experts) // PROBED_ROWS]) for number in range(PROBED_ROWS)]
    for first in range(0, PROBED_ROWS, engine.slots):
        for slot, key in enumerate(keys[first : first + engine.slots]):
            channel.begin(key, slot)
        for slot in range(min(engine.slots, PROBED_ROWS - first)):
            channel.fence(slot)
    return time.perf_counter_ns() - begun


def together(turns: Sequence[Turn], row_nbytes: int, memory_nbytes: int | None) -> Measurement:
    """Return the turns of one cell as one measurement."""
    total = Ledger(0)
    guesses: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0])
    for one in turns:
        for name, value in one.counters.as_dict().items():
            setattr(total.counters, name, getattr(total.counters, name) + value)
        for layer, seen in one.guesses.items():
            guesses[layer] = [a + b for a, b in zip(guesses[layer], seen, strict=True)]
    copies_ns, uses = sum(one.copies_ns for one in turns), [one.use for one in turns if one.use is not None]
    use = (sum(getattr(one, name) for one in uses) for name in ("passes", "ns", "nbytes"))
    return Measurement(
        hardware=turns[0].hardware,
        sources=(),
        slots=turns[0].slots,
        memory_nbytes=memory_nbytes,
        played=[one.played for one in turns],
        stats=total.stats(),
        guesses={layer: (a, b, c) for layer, (a, b, c) in guesses.items()},
        copies_gb_per_s=total.counters.loads * row_nbytes / copies_ns if copies_ns else None,
        use=LinkUse(*use) if uses else None,
        link={
            "link_depth": [one.link["link_depth"] for one in turns],
            "link_direct": turns[0].link["link_direct"],
        },
        rates=[one.disk_gb_per_s for one in turns],
        own_rates=[one.counters.loads * row_nbytes / one.copies_ns for one in turns],
    )


def read_turn(run: RunFolder, cell: str, repeat: int) -> Turn:
    """Read one repeat of a cell. Raise ValueError for a wrong field, or another turn; OSError."""
    path = run.turn(cell, repeat)
    data = read_json(path)
    if (data.pop("cell", cell), data.pop("repeat", repeat)) != (cell, repeat):
        raise ValueError(f"{called(path)} is another turn than its name says; delete it, and it is played again")
    turn: Any = typed(data, Turn, called(path))  # but for its guesses, whose layers are still text
    counted = (*turn.counters.as_dict().values(), *turn.played.counters.as_dict().values())
    if min(counted) < 0 or not all(map(str.isdecimal, turn.guesses)):
        raise ValueError(f"{called(path)}: a counter is negative, or a guess of no layer")
    return replace(turn, guesses={int(layer): seen for layer, seen in turn.guesses.items()})

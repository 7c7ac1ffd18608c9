"""Synthetic cells, timed: one model, attached once a cell, plays the cell's scripts on the clock of its link.

With the link cuda this measures wall time on a GPU: real bytes over a real link, throttled where the cell asks for it.
The links virtual and paced run the same code anywhere; cells over a disk are timed in turn (`in_turn`), and recorded
here. Nothing here needs lm-eval.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from mobile.costs.geometry import GEOMETRIES, Geometry, slots_for
from mobile.costs.hardware import HardwareProfile, parse_nbytes, profile
from mobile.errors import Refused
from mobile.ledger import Event
from mobile.links.registry import LINKS
from mobile.machine.gpu import cuda_uuid
from mobile.policies.strategy import BigLittle, FullK, HalfK, Strategy, resolve
from mobile.residency.residency import PREFILL_BUFFERS
from mobile.runtime.engine import Engine
from suites.budget import is_memory, memory_on
from suites.environment import environment
from suites.record import Item, Record, RunFolder
from suites.synthetic import models
from suites.synthetic.calibrate import calibrated, predicted, predicted_at, prediction_fields
from suites.synthetic.cells import RECORDED, SyntheticCell
from suites.synthetic.link_use import LinkUse, fallback_use
from suites.synthetic.models import Synthetic
from suites.synthetic.routing import scripts_of
from suites.synthetic.script import Script, ScriptLength, drawn, with_rate
from suites.synthetic.script_player import Played, play
from suites.telemetry import watched

GAMMA = 0.7  # below which a recorded little pass was unsure, whatever strategy plays the script


@dataclass(frozen=True)
class Loaded:
    """A made model, for all cells of it, and its scripts so far by what they follow from."""

    made: Synthetic
    scripts: dict[tuple, list[Script]] = field(default_factory=dict)


def load(cells: Sequence[SyntheticCell], run: RunFolder) -> Loaded:
    """Make the model of these cells. Raise Refused for what cannot be made here."""
    cell = cells[0]
    if not LINKS[cell.link].needs_gpu:
        torch.set_num_threads(1)  # so that results do not depend on the machine's cores
    device = LINKS[cell.link].usual_device
    return Loaded(models.make(cell.model.geometry, layers=cell.layers, shrink=cell.shrink, device=device))


def measure(cell: SyntheticCell, loaded: Loaded, run: RunFolder) -> None:
    """Calibrate the machine unless this run has, and write the record; without a prediction where that fails."""
    here: HardwareProfile | Refused | None
    try:
        here = calibrated(cell, loaded.made.layout.dtype, run)
    except Refused as refused:
        here = refused
    record(cell, loaded, here).save(cell.output(run))


def scripts_for(cell: SyntheticCell, loaded: Loaded) -> list[Script]:
    """Return a script for each repeat, the same for every cell of the same routing, rate, tokens and seed."""
    geometry = loaded.made.geometry
    length = ScriptLength(cell.prompt_tokens, cell.warmup_tokens + cell.decode_tokens, cell.warmup_tokens)
    key = (cell.routing, length, cell.repeats, cell.seed)
    if key not in loaded.scripts:
        if cell.routing == RECORDED:
            loaded.scripts[key] = scripts_of(
                cell.model.folder,
                length,
                scripts=cell.repeats,
                layers=geometry.moe_layers,
                gamma=GAMMA,
                seed=cell.seed,
            )
        else:
            loaded.scripts[key] = [
                drawn(
                    cell.routing,
                    length,
                    layers=geometry.moe_layers,
                    experts=geometry.experts,
                    top_k=geometry.top_k,
                    seed=_seed(cell, repeat),
                )
                for repeat in range(cell.repeats)
            ]
    scripts = loaded.scripts[key]
    if cell.rate is None:
        return scripts
    return [with_rate(script, cell.rate, _seed(cell, repeat)) for repeat, script in enumerate(scripts)]


def _seed(cell: SyntheticCell, repeat: int) -> int:
    return 1000 * cell.seed + repeat


def memory_of(cell: SyntheticCell, device: torch.device) -> int | None:
    """Return the bytes that the cell's budget comes to on this device; None for one that is no memory size."""
    if not is_memory(cell.budget):
        return None
    if device.type != "cuda":
        return parse_nbytes(cell.budget)
    return memory_on(cell.budget, torch.cuda.mem_get_info(device)[1])


def memory_or_slots(
    cell: SyntheticCell, made: Synthetic, strategy: Strategy, card: HardwareProfile, memory_nbytes: int | None
) -> dict[str, Any]:
    """Return attach's `memory` or `slots` for a budget of `memory_nbytes`, or of what the strategy needs.

    Where fewer layers, or narrower ones, were made than the real model has, a memory size holds the share of the
    experts that it would hold of the real ones.
    """
    if memory_nbytes is None:
        return {"slots": strategy.min_slots(made.geometry)}
    if cell.shrink == 1 and made.geometry.moe_layers == made.real_layers:
        return {"memory": memory_nbytes}
    real = GEOMETRIES[cell.model.geometry]
    slots = slots_for(real, memory_nbytes, card.reserve_nbytes, PREFILL_BUFFERS)
    return {"slots": max(made.geometry.top_k, slots * made.geometry.moe_layers // real.moe_layers)}


@dataclass(frozen=True)
class Taken:
    """The measurement of a cell: every script played in order, what the engine counted, and how its link copied.

    `stats` are the engine's, from the first script's prompt on, and `guesses` its ledger's. `copies_gb_per_s` is the
    rate while anything was copied, `use` that of fallbacks; None without copies, or fallbacks. `link` are what a record
    says of the link beyond that. Where each script began with cold slots, `rates` are those of the link around it, and
    `own_rates` those at which its rows came, decimal GB/s; otherwise both are empty.
    """

    hardware: str
    sources: tuple[str, ...]
    slots: int
    played: list[Played]
    stats: dict[str, Any]
    guesses: Mapping[int, tuple[int, int, int]]
    copies_gb_per_s: float | None
    use: LinkUse | None
    link: dict[str, Any]
    rates: Sequence[float] = ()
    own_rates: Sequence[float] = ()


def record(cell: SyntheticCell, loaded: Loaded, here: HardwareProfile | Refused | None = None) -> Record:
    """Play every repeat, warm, and return what it took, and what the virtual clock predicts from the profile `here`.

    Where the clock cannot predict, the measurement stands and the record says why. Raise Refused for what this
    machine cannot do.
    """
    begun = time.monotonic()
    made, strategy = loaded.made, resolve(cell.strategy, cell.gamma)
    scripts = scripts_for(cell, loaded)
    with attached(cell, made) as engine:
        play(made, scripts[0].first(scripts[0].warmup + 1))  # kernels are compiled, memory is touched
        engine.restart()
        with watched(cuda_uuid(engine.device.index) if LINKS[cell.link].needs_gpu else None) as telemetry:
            played = [play(made, script) for script in scripts]
        channel = getattr(engine.link, "channel", None)  # of a link in real time; on a GPU it knows how it copies
        how = {name: getattr(channel, name, None) for name in ("native_gb_per_s", "throttled", "page_locked")}
        taken = Taken(
            hardware=engine.hardware.name,
            sources=engine.hardware.sources,
            slots=engine.slots,
            played=played,
            stats=engine.stats(),
            guesses=engine.ledger.guesses,
            copies_gb_per_s=copy_gb_per_s(engine.ledger.events, made.geometry.expert_nbytes),
            use=use_of(engine, strategy),
            link={f"link_{name}": value for name, value in how.items()},
        )
    done = record_of(cell, loaded, taken, here)
    return replace(
        done,
        environment={**done.environment, "telemetry": telemetry()},
        wall_seconds=time.monotonic() - begun,
    )


def attached(cell: SyntheticCell, made: Synthetic) -> AbstractContextManager[Engine]:
    """Serve the model inside the block as the cell asks for it. Raise Refused as attach does."""
    strategy, memory_nbytes = resolve(cell.strategy, cell.gamma), memory_of(cell, made.device)
    return made.attached(
        strategy,
        **memory_or_slots(cell, made, strategy, profile(cell.hardware), memory_nbytes),
        hardware=cell.hardware,
        link=cell.link,
        link_gb_per_s=cell.link_gb_per_s,
    )


def use_of(engine: Engine, strategy: Strategy) -> LinkUse | None:
    """Return the share of the link that fallbacks used; None for a strategy without them."""
    if not isinstance(strategy.gating, BigLittle):
        return None
    return fallback_use(engine.ledger, engine.geometry.expert_nbytes)


def record_of(cell: SyntheticCell, loaded: Loaded, taken: Taken, here: HardwareProfile | Refused | None) -> Record:
    """Return the record of what was taken, with a prediction from the profile `here`, or why there is none."""
    made, strategy, scripts = loaded.made, resolve(cell.strategy, cell.gamma), scripts_for(cell, loaded)
    geometry, measured = made.geometry, taken.copies_gb_per_s
    prediction: dict[str, Any] = {"predicted": None, "predicted_at_own_rates": None, "unpredicted": None}
    try:
        if isinstance(here, Refused):
            raise here
        if here is not None:
            prediction |= _predictions(taken, scripts, strategy, geometry, here)
    except Refused as refused:
        prediction["unpredicted"] = str(refused)
    return Record(
        id=cell.id,
        scope=cell.scope,
        weights=cell.model.weights,
        model=cell.model.name,
        geometry=geometry.name,
        task=cell.task,
        strategy=strategy.name,
        gamma=cell.gamma,
        lossless=strategy.lossless,
        hardware=taken.hardware,
        budget=cell.budget,
        slots=taken.slots,
        seed=cell.seed,
        config={
            "kind": "shape",
            "timing": "live, teacher-forced on a script",
            "swept": cell.swept,
            "control": None,
            "family": cell.model.family,
            "training_seed": None,
            "generation": None,
            "confidence_histogram": None,
            "data": [],
            "routing": scripts[0].source,
            "fallback_asked": cell.rate,
            "fallback_scripted": sum(script.fallbacks for script in scripts) / sum(s.counted for s in scripts),
            "prompt_tokens": cell.prompt_tokens,
            "warmup_tokens": cell.warmup_tokens,
            "decode_tokens": cell.decode_tokens,
            "repeats": cell.repeats,
            "items": cell.repeats,
            "timed_items": cell.repeats,
            "moe_layers": geometry.moe_layers,
            "real_moe_layers": made.real_layers,
            "shrink": cell.shrink,
            "experts": geometry.experts,
            "top_k": geometry.top_k,
            "expert_nbytes": geometry.expert_nbytes,
            "dtype": str(made.layout.dtype).removeprefix("torch."),
            "link": cell.link,
            "link_gb_per_s": cell.link_gb_per_s,
            "link_native_gb_per_s": None,
            "link_throttled": None,
            "link_page_locked": None,
            "link_measured_gb_per_s": measured,
            "fallback_use": taken.use and asdict(taken.use),
            "memory_nbytes": memory_of(cell, made.device),
            "memory_asked_nbytes": parse_nbytes(cell.budget) if is_memory(cell.budget) else None,
            "disk_gb_per_s": list(taken.rates),
            "strategy_source": strategy.source,
            "profile_sources": [] if LINKS[cell.link].real_time else list(taken.sources),
            **taken.link,
            **prediction,
        },
        environment=environment(),
        items=tuple(
            Item(
                doc=number,
                prompt_sha256=script.sha256,
                prompt=None,
                output="",
                fallback_spans=(),
                answer=None,
                correct=None,
                prompt_tokens=one.prompt_tokens,
                decode_tokens=one.counters.tokens,
                fallbacks=one.fallbacks,
                ttft_ns=one.prefill_ns,
                decode_ns=one.decode_ns,
                decode_bytes=one.decode_bytes,
            )
            for number, (script, one) in enumerate(zip(scripts, taken.played, strict=True))
        ),
        counters=taken.stats,
        ceiling_tokens_per_s=measured and geometry.on_demand_ceiling(measured),
        checks=dict(_checks(strategy, geometry.expert_nbytes, scripts, taken.played)),
        guesses=tuple((layer, *seen) for layer, seen in sorted(taken.guesses.items())),
    )


def _predictions(
    taken: Taken, scripts: list[Script], strategy: Strategy, geometry: Geometry, card: HardwareProfile
) -> dict[str, Any]:
    """Return the fields of what the virtual clock says of the scripts. Raise Refused where it can say nothing."""
    played = scripts, strategy, geometry, taken.slots, card
    if not taken.rates:
        return {"predicted": prediction_fields(card, predicted(*played))}
    return {
        "predicted": prediction_fields(card, predicted_at(taken.rates, *played)),
        "predicted_at_own_rates": prediction_fields(card, predicted_at(taken.own_rates, *played)),
    }


def copy_gb_per_s(events: Iterable[Event], row_nbytes: int) -> float | None:
    """Return decimal gigabytes per second of the copies in a ledger while any was made; None without one."""
    copies = [(event.start_ns, event.end_ns) for event in events if event.what in ("load", "prefetch")]
    return len(copies) * row_nbytes / busy_ns(copies) if copies else None


def busy_ns(spans: Iterable[tuple[int, int]]) -> int:
    """Return the nanoseconds that at least one of these (start, end) spans covers."""
    total, until = 0, 0
    for start, end in sorted(spans):
        total += max(0, end - max(start, until))
        until = max(until, end)
    return total


def _checks(
    strategy: Strategy, row_nbytes: int, scripts: list[Script], played: list[Played]
) -> Iterable[tuple[str, bool]]:
    """Yield what a script fixes and a run must show: how often it fell back, what a strategy without a cache copied."""
    outcomes: dict[str, list[bool]] = defaultdict(list)
    for script, one in zip(scripts, played, strict=True):
        outcomes["every counted token was decoded"].append(one.counters.tokens == script.counted)
        falls_back = not isinstance(strategy.gating, FullK | HalfK)
        outcomes["fell back where the script said"].append(one.fallbacks == (script.fallbacks if falls_back else 0))
        outcomes["bytes are copies times the row"].append(one.decode_bytes == one.counters.loads * row_nbytes)
        if strategy.retain == "nothing" and isinstance(strategy.gating, FullK):
            chosen = script.full[script.warmup :].size
            outcomes["copied exactly the script's experts"].append(one.counters.loads == chosen)
    return ((f"{strategy.name}: {check}", all(passed)) for check, passed in outcomes.items())

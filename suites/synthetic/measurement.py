"""The measurement of a synthetic cell, whoever timed it, and the record that is made of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from mobile.costs.cost_model import CostModel
from mobile.costs.geometry import Geometry
from mobile.costs.hardware import HardwareProfile, parse_nbytes
from mobile.errors import Refused
from mobile.kernels.packed import IN_PLACE
from mobile.ledger import Event
from mobile.links.registry import LINKS
from mobile.policies.strategy import FullK, HalfK, Strategy, resolve
from mobile.replay.replay import ReplaySetup
from suites.budget import is_memory
from suites.environment import environment
from suites.record import Item, Record
from suites.synthetic.calibrate import predicted, predicted_at, prediction_fields
from suites.synthetic.cells import SyntheticCell
from suites.synthetic.link_use import COPIES, LinkBound, LinkUse, copying_ns, fallbacks_on_clock, link_bound
from suites.synthetic.models import Synthetic
from suites.synthetic.script import Script
from suites.synthetic.script_player import Played


@dataclass(frozen=True)
class Measurement:
    """The measurement of a cell: every script played in order, what the engine counted, and how its link copied.

    `memory_nbytes` is what the cell's budget came to, None where slots were counted instead. `stats` are the engine's,
    from the first script's prompt on, and `guesses` its ledger's. `copies_gb_per_s` is the rate while anything was
    copied, `use` that of fallbacks; None without copies, or fallbacks. `link` are what a record says of the link beyond
    that. Where each script began with cold slots, `rates` are those of the link around it, and `own_rates` those at
    which its rows came, decimal GB/s; otherwise both are empty.
    """

    hardware: str
    sources: tuple[str, ...]
    slots: int
    memory_nbytes: int | None
    played: list[Played]
    stats: dict[str, Any]
    guesses: Mapping[int, tuple[int, int, int]]
    copies_gb_per_s: float | None
    use: LinkUse | None
    link: dict[str, Any]
    rates: Sequence[float] = ()
    own_rates: Sequence[float] = ()


def record_of(
    cell: SyntheticCell,
    made: Synthetic,
    scripts: list[Script],
    measured: Measurement,
    here: HardwareProfile | Refused | None,
) -> Record:
    """Return the record of a measurement, with a prediction from the profile `here`, or why there is none."""
    strategy = resolve(cell.strategy, cell.gamma)
    geometry, rate = made.geometry, measured.copies_gb_per_s
    prediction: dict[str, Any] = dict.fromkeys(
        ("predicted", "predicted_at_own_rates", "unpredicted", "link_bound"), None
    )
    try:
        if isinstance(here, Refused):
            raise here
        if here is not None:
            prediction |= _predictions(measured, scripts, strategy, geometry, here, in_place=in_place(cell))
            prediction["link_bound"] = asdict(
                _bound(measured, scripts, strategy, geometry, here, in_place=in_place(cell))
            )
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
        hardware=measured.hardware,
        budget=cell.budget,
        slots=measured.slots,
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
            "dtype": str(made.layout.weight_dtype).removeprefix("torch."),
            "rows": cell.rows,
            "link": cell.link,
            "link_gb_per_s": cell.link_gb_per_s,
            "link_native_gb_per_s": None,
            "link_throttled": None,
            "link_page_locked": None,
            "link_measured_gb_per_s": rate,
            "fallback_use": measured.use and asdict(measured.use),
            "memory_nbytes": measured.memory_nbytes,
            "memory_asked_nbytes": parse_nbytes(cell.budget) if is_memory(cell.budget) else None,
            "disk_gb_per_s": list(measured.rates),
            "strategy_source": strategy.source,
            "profile_sources": [] if LINKS[cell.link].real_time else list(measured.sources),
            **measured.link,
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
            for number, (script, one) in enumerate(zip(scripts, measured.played, strict=True))
        ),
        counters=measured.stats,
        ceiling_tokens_per_s=rate and geometry.on_demand_ceiling(rate),
        checks=dict(_checks(strategy, geometry.expert_nbytes, scripts, measured.played)),
        guesses=tuple((layer, *seen) for layer, seen in sorted(measured.guesses.items())),
    )


def _predictions(
    measured: Measurement,
    scripts: list[Script],
    strategy: Strategy,
    geometry: Geometry,
    card: HardwareProfile,
    *,
    in_place: bool,
) -> dict[str, Any]:
    """Return the fields of what the virtual clock says of the scripts. Raise Refused where it can say nothing."""
    played = scripts, strategy, geometry, measured.slots, card
    if not measured.rates:
        return {"predicted": prediction_fields(card, predicted(*played, in_place=in_place))}
    return {
        "predicted": prediction_fields(card, predicted_at(measured.rates, *played, in_place=in_place)),
        "predicted_at_own_rates": prediction_fields(card, predicted_at(measured.own_rates, *played, in_place=in_place)),
    }


def _bound(
    measured: Measurement,
    scripts: list[Script],
    strategy: Strategy,
    geometry: Geometry,
    card: HardwareProfile,
    *,
    in_place: bool,
) -> LinkBound:
    """Return the most of the link that the cell could have used, by the profile, at the rate around its scripts."""
    if measured.rates:
        card = replace(card, link_gb_per_s=fmean(measured.rates), link_latency_seconds=0.0)
    on_clock = None
    if measured.use is not None:
        layer_map = tuple((layer,) for layer in range(geometry.moe_layers))
        setup = ReplaySetup(strategy, geometry, layer_map, card, measured.slots, in_place)
        on_clock = fallbacks_on_clock(scripts, setup, cold=bool(measured.rates))
    return link_bound(strategy, CostModel(card, geometry, in_place=in_place), on_clock)


def in_place(cell: SyntheticCell) -> bool:
    """Return whether a cell's experts are multiplied as they lie in packed rows: where they are computed on the CPU."""
    return cell.rows in IN_PLACE and LINKS[cell.link].usual_device == "cpu" and cell.shrink == 1


def copy_gb_per_s(events: Iterable[Event], row_nbytes: int) -> float | None:
    """Return decimal gigabytes per second of the copies in a ledger while any was made; None without one."""
    copies = [event for event in events if event.what in COPIES]
    return len(copies) * row_nbytes / copying_ns(copies) if copies else None


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

"""Synthetic cells, timed: one model, attached once a cell, plays the cell's scripts on the clock of its link.

With the link cuda this measures wall time on a GPU: real bytes over a real link, throttled where the cell asks for it.
The links virtual and paced run the same code anywhere; cells over a disk are timed in turn (`in_turn`). Nothing here
needs lm-eval.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mobile.costs.geometry import GEOMETRIES
from mobile.costs.hardware import HardwareProfile, parse_nbytes, profile
from mobile.costs.memory import KvCache, Reserve, divide, reserve_for
from mobile.errors import Refused
from mobile.links.registry import LINKS
from mobile.machine.gpu import cuda_uuid
from mobile.policies.strategy import BigLittle, Strategy, resolve
from mobile.residency.residency import PREFILL_BUFFERS
from mobile.runtime.engine import Engine
from suites.budget import is_memory, memory_on
from suites.record import Record, RunFolder
from suites.synthetic import models
from suites.synthetic.calibrate import calibrated
from suites.synthetic.cells import RECORDED, SyntheticCell
from suites.synthetic.link_use import LinkUse, fallback_use
from suites.synthetic.measurement import Measurement, copy_gb_per_s, in_place, record_of
from suites.synthetic.models import Synthetic
from suites.synthetic.routing import scripts_of
from suites.synthetic.script import Script, ScriptLength, drawn, with_rate
from suites.synthetic.script_player import play
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
    size: dict[str, Any] = {"layers": cell.layers, "shrink": cell.shrink, "device": device}
    return Loaded(models.make(cell.model.geometry, **size, rows=cell.rows))


def measure(cell: SyntheticCell, loaded: Loaded, run: RunFolder) -> None:
    """Calibrate the machine unless this run has, and write the record; without a prediction where that fails."""
    here: HardwareProfile | Refused | None
    try:
        here = calibrated(cell, loaded.made.layout.weight_dtype, run)
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
    experts that it would hold of the real ones: beside what attach would keep back there, as `AttachOptions` has it.
    """
    if memory_nbytes is None:
        return {"slots": strategy.min_slots(made.geometry)}
    if cell.shrink == 1 and made.geometry.moe_layers == made.real_layers:
        return {"memory": memory_nbytes}
    real = GEOMETRIES[cell.model.geometry].with_rows(cell.rows)
    counted = made.device.type == "cuda" and cell.hardware == "auto"
    reserve = reserve_for(real, KvCache.of(real)) if counted else Reserve.of_profile(card.reserve_nbytes)
    slots = divide(real, memory_nbytes, reserve, PREFILL_BUFFERS).slots
    return {"slots": max(made.geometry.top_k, slots * made.geometry.moe_layers // real.moe_layers)}


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
        measured = Measurement(
            hardware=engine.hardware.name,
            sources=engine.hardware.sources,
            slots=engine.slots,
            memory_nbytes=memory_of(cell, made.device),
            played=played,
            stats=engine.stats(),
            guesses=engine.ledger.guesses,
            copies_gb_per_s=copy_gb_per_s(engine.ledger.events, made.geometry.expert_nbytes),
            use=use_of(engine, strategy),
            link={f"link_{name}": value for name, value in how.items()},
        )
    done = record_of(cell, made, scripts, measured, here)
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
        kernel="packed" if in_place(cell) else "auto",
    )


def use_of(engine: Engine, strategy: Strategy) -> LinkUse | None:
    """Return the share of the link that fallbacks used; None for a strategy without them."""
    if not isinstance(strategy.gating, BigLittle):
        return None
    return fallback_use(engine.ledger, engine.geometry.expert_nbytes)

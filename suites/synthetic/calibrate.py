"""The profile of the machine a run is timed on, measured once a run and link, and what the virtual clock predicts.

Measurements lie in the run folder, so that a resumed run goes on with the same profile. They are of the process that
times, alone on its machine, with its threads and its dtype.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import torch

from mobile.costs.geometry import Geometry
from mobile.costs.hardware import HardwareProfile, profile
from mobile.links.registry import LINKS
from mobile.machine.fit_profile import Measurements, fit, measurements_from
from mobile.machine.measure import measure, relinked
from mobile.machine.measure.copies import Pace
from mobile.machine.measure.sizes import NARROW, sizes_for
from mobile.policies.protocols import LayerMap
from mobile.policies.strategy import Strategy
from mobile.replay.fast_residency import FastResidency
from mobile.replay.replay import ReplaySetup
from mobile.replay.trace import Request, run_step
from suites.environment import environment
from suites.identity import code_hash, digest
from suites.record import RunFolder, read_json, sound, write_json
from suites.strict_json import called
from suites.synthetic.cells import SyntheticCell
from suites.synthetic.script import Script, steps_of
from suites.synthetic.script_player import Played
from suites.typed_json import Amount, Count, Holding, typed


@dataclass(frozen=True)
class _Kept:
    """Measurements as JSON has them; `fit` refuses those that no machine gives."""

    device: str
    about: str
    copies: tuple[tuple[Count, Count, Amount], ...]
    kernels: tuple[tuple[Count, Count, Amount], ...]
    cpu_kernels: tuple[tuple[Count, Count, Amount], ...]
    depths: tuple[tuple[Count, Amount], ...]
    layer: Geometry
    tflops: Amount
    cpu_tflops: Amount
    memory_nbytes: Count
    taken_nbytes: Count
    link_about: str
    taken_about: str
    notes: tuple[str, ...]
    host_launch_seconds: Amount = 0.0
    host_copy_seconds: Amount = 0.0
    host_read_seconds: Amount = 0.0


def calibrated(cell: SyntheticCell, dtype: torch.dtype, run: RunFolder) -> HardwareProfile | None:
    """Return the profile of this machine with the cell's link; None for a cell that is not predicted.

    Raise Refused for measurements that no profile fits.
    """
    if not cell.is_predicted:
        return None
    device, on_disk = torch.device(LINKS[cell.link].usual_device), LINKS[cell.link].store == "disk"
    sizes = NARROW if cell.shrink > 1 else sizes_for(device, on_disk=on_disk)
    of_machine = [cell.link, str(dtype), asdict(sizes)]
    if on_disk:
        return fit(_kept(run, of_machine, lambda: measure(device, dtype, sizes, folder=run.path)))
    link: dict[str, Any] = {"link_gb_per_s": cell.link_gb_per_s}
    if not LINKS[cell.link].needs_gpu:
        link = {"pace": pace_of(cell)}
    base = _kept(run, of_machine, lambda: measure(device, dtype, sizes))
    if LINKS[cell.link].needs_gpu and cell.link_gb_per_s is None:
        return fit(base)
    settings = [*of_machine, cell.link_gb_per_s, asdict(profile(cell.hardware))]
    return fit(_kept(run, settings, lambda: relinked(base, device, dtype, sizes, **link)))


def pace_of(cell: SyntheticCell) -> Pace:
    """Return the nanoseconds that a paced link takes for a row, as attach has them from the cell's profile."""
    card = profile(cell.hardware)
    rate = card.link_gb_per_s if cell.link_gb_per_s is None else cell.link_gb_per_s
    return lambda nbytes: round((card.link_latency_seconds + nbytes / (rate * 1e9)) * 1e9)


def _kept(run: RunFolder, settings: list[Any], make: Any) -> Measurements:
    """Return what this code measured under these settings on a machine like this, or measure it now."""
    named = digest(*settings, torch.get_num_threads(), environment()["fingerprint"], code_hash())
    path = run.calibration(named)
    if not sound(path, settings=named):
        begun = time.monotonic()
        made = make()
        print(f"calibrated in {time.monotonic() - begun:.1f} s: {made.about}", flush=True)
        write_json(path, {"settings": named, **asdict(made)})
        return made
    data = read_json(path)
    del data["settings"]
    typed(data, Annotated[dict[str, Any], Holding(_Kept)], called(path))
    return measurements_from(data)


def predicted(
    scripts: Sequence[Script],
    strategy: Strategy,
    geometry: Geometry,
    slots: int,
    card: HardwareProfile,
    *,
    in_place: bool = False,
) -> list[Played]:
    """Return the scripts, one after another from cold slots, on the virtual clock of that profile, with as many slots.

    `in_place` says that packed rows are multiplied as they are. Raise Refused for a strategy that decides by what a
    script does not hold.
    """
    layer_map = tuple((layer,) for layer in range(geometry.moe_layers))
    residency = ReplaySetup(strategy, geometry, layer_map, card, slots, in_place).residency()
    return [_replayed(script, steps_of(script, strategy), residency, layer_map) for script in scripts]


def predicted_at(
    rates: Sequence[float],
    scripts: Sequence[Script],
    strategy: Strategy,
    geometry: Geometry,
    slots: int,
    card: HardwareProfile,
    *,
    in_place: bool = False,
) -> list[Played]:
    """Return each script from cold slots on the clock of that profile, its rows coming at a rate of its own.

    `rates` are decimal GB/s of whole rows. Raise Refused as `predicted` does.
    """
    cards = (replace(card, link_gb_per_s=rate, link_latency_seconds=0.0) for rate in rates)
    return [
        predicted([script], strategy, geometry, slots, at_rate, in_place=in_place)[0]
        for at_rate, script in zip(cards, scripts, strict=True)
    ]


def _replayed(script: Script, steps: Request, residency: FastResidency, layer_map: LayerMap) -> Played:
    """Replay the passes of one script; only those of decode steps that count are in the times of decode."""
    clock, ledger = residency.link, residency.ledger
    decoded = [at for at, step in enumerate(steps) if step.kind in ("full", "little")]  # where each token begins
    first = decoded[script.warmup] if script.warmup < len(decoded) else len(steps)
    begun = prefilled = started = clock.now
    before = ledger.counters.copy()
    for at, step in enumerate(steps):
        if at == 1:
            prefilled = clock.now
        if at == first:
            started, before = clock.now, ledger.counters.copy()
        run_step(step, residency, layer_map)
    counters = ledger.counters.since(before)
    residency.end_token()
    return Played(len(script.prompt), prefilled - begun, clock.now - started, counters.bytes_loaded, counters)


def prediction_fields(card: HardwareProfile, played: list[Played]) -> dict[str, Any]:
    """Return a prediction as a record has it: the profile, and of each repeat what `Item` has when measured."""
    return {
        "profile": asdict(card),
        "ttft_ns": [one.prefill_ns for one in played],
        "decode_ns": [one.decode_ns for one in played],
        "decode_bytes": [one.decode_bytes for one in played],
    }

"""The profile of the machine a run is timed on, measured once a run and link, and what the virtual clock predicts.

Measurements lie in the run folder, so that a resumed run goes on with the same profile. They are of the process that
times, alone on its machine, with its threads and its dtype.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any, cast

import torch

from mobile.costs.hardware import HardwareProfile, profile
from mobile.links.registry import LINKS
from mobile.links.virtual import VirtualLink
from mobile.machine.fit_profile import Measurements, fit, measurements_from
from mobile.machine.measure import measure, relinked
from mobile.machine.measure.copies import Pace
from mobile.machine.measure.sizes import NARROW, sizes_for
from mobile.policies.strategy import Strategy
from suites.environment import environment
from suites.identity import code_hash, digest
from suites.record import RunFolder, read_json, sound, write_json
from suites.synthetic.cells import SyntheticCell
from suites.synthetic.models import Synthetic
from suites.synthetic.script import Script
from suites.synthetic.script_player import Played, play


def calibrated(cell: SyntheticCell, dtype: torch.dtype, run: RunFolder) -> HardwareProfile | None:
    """Return the profile of this machine with the cell's link; None for a cell that is not predicted.

    Raise Refused for measurements that no profile fits.
    """
    if not cell.is_predicted:
        return None
    device = torch.device(LINKS[cell.link].usual_device)
    sizes = NARROW if cell.shrink > 1 else sizes_for(device)
    link: dict[str, Any] = {"link_gb_per_s": cell.link_gb_per_s}
    if not LINKS[cell.link].needs_gpu:
        link = {"pace": pace_of(cell)}
    base = _kept(run, [cell.link, str(dtype), asdict(sizes)], lambda: measure(device, dtype, sizes))
    if LINKS[cell.link].needs_gpu and cell.link_gb_per_s is None:
        return fit(base)
    settings = [cell.link, str(dtype), asdict(sizes), cell.link_gb_per_s, asdict(profile(cell.hardware))]
    return fit(_kept(run, settings, lambda: relinked(base, device, dtype, sizes, **link)))


def pace_of(cell: SyntheticCell) -> Pace:
    """Return the nanoseconds that a paced link takes for a row, as attach has them from the cell's profile."""
    card = profile(cell.hardware)
    rate = card.link_gb_per_s if cell.link_gb_per_s is None else cell.link_gb_per_s
    return lambda nbytes: round((card.link_latency_seconds + nbytes / (rate * 1e9)) * 1e9)


def _kept(run: RunFolder, settings: list[Any], make: Any) -> Measurements:
    """Return what this code measured under these settings on a machine like this, or measure it now."""
    path = run.calibration(digest(*settings, torch.get_num_threads(), environment()["fingerprint"], code_hash()))
    if not sound(path):
        begun = time.monotonic()
        made = make()
        print(f"calibrated in {time.monotonic() - begun:.1f} s: {made.about}", flush=True)
        write_json(path, asdict(made))
        return made
    return measurements_from(read_json(path))


def predicted(
    made: Synthetic, strategy: Strategy, scripts: list[Script], slots: int, card: HardwareProfile
) -> list[Played]:
    """Play the same scripts in the same order, with as many slots, on the virtual clock of that profile.

    The same model and engine decide; only bytes are left where they are, since time is all that is asked for.
    """
    with made.attached(strategy, slots=slots, hardware=card, link="virtual") as engine:
        cast(VirtualLink, engine.link).deliver_to(engine.arrived)  # leaves bytes where they are
        return [play(made, script) for script in scripts]


def prediction_fields(card: HardwareProfile, played: list[Played]) -> dict[str, Any]:
    """Return a prediction as a record has it: the profile, and of the first repeats what `Item` has when measured."""
    return {
        "profile": asdict(card),
        "ttft_ns": [one.prefill_ns for one in played],
        "decode_ns": [one.decode_ns for one in played],
        "decode_bytes": [one.decode_bytes for one in played],
    }

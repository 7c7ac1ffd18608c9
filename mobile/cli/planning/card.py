"""The card of a plan: a stated one, or the one in this machine with the link of a stated one."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from mobile.costs.hardware import HardwareProfile, profile
from mobile.machine.gpu import gpus_of_driver


@dataclass(frozen=True)
class Card:
    """The profile that a plan computes with, and what of it nobody has measured or stated, None if nothing.

    `is_here` says that it is this machine's own, as `mobile.load` would take it.
    """

    hardware: HardwareProfile
    assumed: str | None
    is_here: bool = False


def card(name: str, device: str = "auto") -> Card:
    """Return the card of --hardware: a profile's, or with "auto" this machine's own where it has one.

    As in `mobile.load`, this machine's gives its name and its free memory, and the rest is the default profile's;
    without one the default profile is the card. No torch is imported: where nothing else has, the driver is asked.
    """
    stated = profile(name)
    if name != "auto" or device == "cpu":
        return Card(stated, None)
    here = _here()
    if here is None:
        return Card(stated, f"none was found here, so {stated.name} is a stated one; --hardware states another")
    called, vram_nbytes = here
    return Card(
        replace(stated, name=called, vram_nbytes=vram_nbytes),
        f"link, memory rate and launches are those of {stated.name}, not measured here; measure them with: mobile "
        "doctor --calibrate --out here.json, then --hardware here.json",
        is_here=True,
    )


def _here() -> tuple[str, int] | None:
    """Return the name and the free memory of this machine's first GPU, None if none is found."""
    if "torch" in sys.modules:
        import torch

        return (torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None
    found = [gpu for gpu in gpus_of_driver() if gpu.memory_free_nbytes is not None]
    return (found[0].name, found[0].memory_free_nbytes or 0) if found else None

"""The plan of an attach: all that is decided before the model is touched. No weight is read for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME

from mobile.costs.geometry import Geometry, project, slots_for
from mobile.costs.hardware import HardwareProfile, parse_nbytes, profile
from mobile.errors import Refused, shortened
from mobile.kernels import Kernel, kernel_named, loop, packed
from mobile.links.registry import LINKS, link_kind
from mobile.live_model import compat
from mobile.policies.limits import refuse_disk, refuse_future, refuse_halving, refuse_slots
from mobile.policies.strategy import Strategy, resolve
from mobile.policies.tuned import check_model
from mobile.residency.residency import PREFILL_BUFFERS
from mobile.store import ExpertLayout


@dataclass(frozen=True)
class AttachOptions:
    """The keywords that `mobile.load` and `mobile.attach` share.

    - `strategy`: a name that `mobile.strategies()` lists, several joined by "+", or a Strategy. `gamma` replaces its
      confidence threshold: a number, or a file of `mobile tune`, which names the signal as well.
    - `memory`: device memory, in bytes or like "8GiB", dense weights and reserve included; or `slots`: how many experts
      the device holds. With neither, the memory of the card, or of the profile where time is virtual. On a GPU
      `memory` also caps what this process may allocate there.
    - `link`: "cuda" (real time; needs the model on a GPU), "disk" (real time; experts are read from a file), "virtual"
      (computed time), "paced" (real sleeping, to test threads), or "auto": disk where `store` is one, cuda on a GPU,
      else virtual.
    - `store`: where the experts lie, "memory", "disk" (a folder in the cache), or a folder for the file of their rows.
    - `link_gb_per_s`: slow the link down to so many decimal GB/s; a real link is slowed by really copying more.
    - `hardware`: a profile, its name, or a .json file of one, which `mobile doctor --calibrate` fits to this machine.
      Budgets and virtual time are taken from it.
    - `geometry`: the name of a real model; compute virtual time and bytes as if the model were that one.
    - `kernel`: "loop" (the reference, and "auto"), "grouped", "triton", or "packed" (int8 and int4-cpu rows in place,
      on the CPU, in bfloat16), see `mobile.kernels`.
    - `rows`: how experts lie in the store and in slots, and what is copied: "as-is", "int8" (a scale an output), "int4"
      (groups of 32 inputs) or "int4-cpu" (the same numbers in the order of this processor's product, whose kernel is
      "packed"). Other packed experts are decoded when they are computed, so tokens are those of a model with the
      decoded weights; biases stay as they are.
    """

    strategy: str | Strategy = "mobile"
    memory: int | str | None = None
    slots: int | None = None
    hardware: str | HardwareProfile = "auto"
    link: str = "auto"
    link_gb_per_s: float | None = None
    gamma: float | str | os.PathLike[str] | None = None
    geometry: str | None = None
    kernel: str = "auto"
    store: str | os.PathLike[str] | None = None
    rows: str = "as-is"


@dataclass(frozen=True)
class AttachPlan:
    """One decided attach.

    `native` are the model's own sizes, `charged` those that time and bytes are computed for: the same ones, or a larger
    model's, whose layers `layer_map` lists for each layer of the live model. `budget_nbytes` is the device memory asked
    for, None where slots were counted instead. `link` is never "auto". `folder` is where the experts' file goes, None
    where they lie in memory. `layout` is that of a row in the store and in a slot.
    """

    strategy: Strategy
    native: Geometry
    charged: Geometry
    layer_map: tuple[tuple[int, ...], ...]
    slots: int
    budget_nbytes: int | None
    hardware: HardwareProfile
    link: str
    link_gb_per_s: float | None
    kernel: Kernel
    layout: ExpertLayout
    folder: Path | None = None


def plan_attach(
    model: Any,
    layers: Sequence[compat.MoeLayer],
    layout: ExpertLayout,
    device: torch.device,
    options: AttachOptions,
) -> AttachPlan:
    """Decide everything, or raise Refused. `model` may lie on the meta device; `device` is where it will compute.

    `layout` is that of the experts as the model has them, or as a checkpoint packs them.
    """
    strategy = resolve(options.strategy, options.gamma)
    folder = folder_of(options)
    refuse_future(strategy)
    link, hardware = _link_and_hardware(options, device)
    layout = compat.packed_layout(layout, layers, options.rows)
    if folder is not None:
        layout = layout.page_aligned()
    native = compat.geometry_of(model, layers, layout)
    check_model(options.gamma, native)
    charged, layer_map = project(native, options.geometry, options.rows)
    slots, budget_nbytes = _slots_and_budget(options, strategy, charged, hardware)
    refuse_halving(strategy, native)
    kernel = kernel_named(options.kernel, device, layout.weight_dtype, layout.rows)
    if folder is not None:
        refuse_disk(strategy)
    if strategy.on_cpu is not None and kernel not in (loop, packed):
        raise Refused(
            f"Strategy {strategy.name} computes experts on the CPU, and only the kernel loop can; leave it so."
        )
    return AttachPlan(
        strategy=strategy,
        native=native,
        charged=charged,
        layer_map=layer_map,
        slots=slots,
        budget_nbytes=budget_nbytes,
        hardware=hardware,
        link=link,
        link_gb_per_s=options.link_gb_per_s,
        kernel=kernel,
        layout=layout,
        folder=folder,
    )


def folder_of(options: AttachOptions) -> Path | None:
    """Return the folder that a file of experts is to lie in; None if they lie in memory. Raise Refused."""
    store, link = options.store, options.link
    reads = link in LINKS and LINKS[link].store == "disk"
    if store is None or store == "memory":
        if reads and store == "memory":
            raise Refused(f"Link {link} reads experts from a disk; leave store out, or give a folder.")
        return Path(HF_HOME) / "mobile" if reads else None
    if not reads and link != "auto":
        raise Refused(
            f"Link {link} copies experts from memory, and store is {os.fspath(store)!r}; leave one of them out."
        )
    try:
        folder = Path(HF_HOME) / "mobile" if store == "disk" else Path(store).absolute()
        if b"\0" in os.fsencode(folder):
            raise ValueError("a name without a null character")
    except (TypeError, ValueError) as error:
        raise Refused(f"The store {shortened(ascii(store))} is no folder; name one, or leave store out.") from error
    return folder


def _slots_and_budget(
    options: AttachOptions, strategy: Strategy, charged: Geometry, hardware: HardwareProfile
) -> tuple[int, int | None]:
    """Return how many slots there will be, and the bytes of `memory`, None if it was not given.

    Raise Refused if the strategy cannot run with them.
    """
    slots, memory = options.slots, options.memory
    if slots is not None and memory is not None:
        raise Refused("Give memory or slots, not both.")
    # 1. Count slots: as given, one for each expert where the strategy keeps all, or as many as the memory holds.
    budget_nbytes = None if memory is None else parse_nbytes(memory)
    keeps_all = strategy.retain == "everything"
    if slots is None and keeps_all and memory is None:
        slots = charged.total_experts
    if slots is None and memory is None and folder_of(options) is not None:
        raise Refused("Experts on disk leave memory to be divided: give memory, like 8GiB, or slots.")
    if slots is None:
        budget = hardware.vram_nbytes if budget_nbytes is None else budget_nbytes
        slots = slots_for(charged, budget, hardware.reserve_nbytes, PREFILL_BUFFERS)
    # 2. Refuse too few.
    refuse_slots(strategy, charged, slots)
    return min(slots, charged.total_experts), budget_nbytes


def _link_and_hardware(options: AttachOptions, device: torch.device) -> tuple[str, HardwareProfile]:
    """Return the link's name, and the profile that budgets and virtual time are taken from."""
    rate, asked = options.link_gb_per_s, options.hardware
    hardware = asked if isinstance(asked, HardwareProfile) else profile(asked)
    link = LINKS["disk"] if folder_of(options) else link_kind(options.link, device.type)
    if link.device_type not in (None, device.type):
        if link.needs_gpu:
            raise Refused(f"Link {link.name} needs the model on a GPU; move it there, or choose virtual.")
        raise Refused(f"Link {link.name} copies to the CPU, and the model is on {device}; choose cuda or virtual.")
    if options.geometry is not None and link.real_time:
        raise Refused(f"Geometry {options.geometry} can be charged in virtual time only; choose the link virtual.")
    if rate is not None and link.store == "disk":
        raise Refused("A disk is as fast as it is; leave link_gb_per_s out.")
    if rate is not None:
        if not rate > 0:
            raise Refused(f"A link of {rate:g} GB/s moves nothing; give a positive number.")
        hardware = replace(hardware, link_gb_per_s=rate)
    if device.type == "cuda" and asked == "auto":
        name, vram_nbytes = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[1]
        hardware = replace(hardware, name=name, vram_nbytes=vram_nbytes)
    return link.name, hardware

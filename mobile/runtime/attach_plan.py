"""The plan of an attach: all that is decided before the model is touched. No weight is read for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME

from mobile.costs.geometry import Geometry, project
from mobile.costs.hardware import HardwareProfile, parse_nbytes, profile
from mobile.costs.memory import CONTEXT_NBYTES, Division, KvCache, Reserve, divide, reserve_for
from mobile.errors import Refused, shortened
from mobile.kernels import Kernel, kernel_named, loop, packed
from mobile.links.registry import LINKS, link_kind
from mobile.live_model import compat
from mobile.policies.limits import refuse_disk, refuse_future, refuse_halving, refuse_slots
from mobile.policies.strategy import Strategy, resolve
from mobile.policies.tuned import check_model
from mobile.residency.residency import PREFILL_BUFFERS
from mobile.runtime.device_memory import CardMemory, card_memory
from mobile.runtime.kv_cache import default_tokens, kv_cache
from mobile.store import ExpertLayout


@dataclass(frozen=True)
class AttachOptions:
    """The keywords that `mobile.load` and `mobile.attach` share.

    - `strategy`: a name that `mobile.strategies()` lists, several joined by "+", or a Strategy. `gamma` replaces its
      confidence threshold: a number, or a file of `mobile tune`, which names the signal as well.
    - `memory`: device memory, in bytes or like "8GiB", dense weights and reserve included; or `slots`: how many experts
      the device holds. With neither, all that can be had of the card now, or the memory of the profile where time is
      virtual. On a GPU `memory` counts the CUDA context, so that it is about what nvidia-smi shows of this process, and
      also caps what it may allocate there, beside tensors that are not this model's. More than can be had is refused,
      unless it is the card's nominal size, which counts as all of it.
    - `context_tokens`: the tokens of a sequence, prompt and answer, that a budget keeps room for: a KV cache and a
      workspace (`mobile.costs.memory`). A longer one runs, and takes more. None counts, on a GPU whose `hardware` is
      "auto", `CONTEXT_TOKENS` or all that the model can read, and with a profile keeps its `reserve_nbytes` as it is.
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
    context_tokens: int | None = None


@dataclass(frozen=True)
class AttachPlan:
    """One decided attach.

    `native` are the model's own sizes, `charged` those that time and bytes are computed for: the same ones, or a larger
    model's, whose layers `layer_map` lists for each layer of the live model. `budget_nbytes` is the device memory asked
    for, None where slots were counted instead; `cap`, the share of a card that the allocator may take then. `division`
    are the parts of the budget, asked for or not, None where slots were counted. `link` is never "auto". `folder` is
    where the experts' file goes, None where they lie in memory. `layout` is that of a row in the store and in a slot.
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
    cap: float | None = None
    division: Division | None = None


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
    slots = _stated_slots(options, strategy, charged)
    division = budget_nbytes = cap = None
    if slots is None:
        card = card_memory(device, model) if device.type == "cuda" and options.geometry is None else None
        asked = None if options.memory is None else parse_nbytes(options.memory)
        budget = _budget(asked, options, hardware, card, device)
        reserve = _reserve(model, layers, charged, options, hardware, card)
        division = divide(charged, budget, reserve, PREFILL_BUFFERS)
        slots = division.slots
        budget_nbytes = None if asked is None else budget
        cap = None if card is None or asked is None else card.cap(budget)
    refuse_slots(strategy, charged, slots)
    slots = min(slots, charged.total_experts)
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
        cap=cap,
        division=division,
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


def _stated_slots(options: AttachOptions, strategy: Strategy, charged: Geometry) -> int | None:
    """Return the slots, as given, or all where the strategy keeps all; None where memory is to be divided.

    Raise Refused where options say two things.
    """
    if options.slots is not None and options.memory is not None:
        raise Refused("Give memory or slots, not both.")
    slots = options.slots
    if slots is None and strategy.retain == "everything" and options.memory is None:
        slots = charged.total_experts
    if slots is None and options.memory is None and folder_of(options) is not None:
        raise Refused("Experts on disk leave memory to be divided: give memory, like 8GiB, or slots.")
    if options.slots is not None and options.context_tokens is not None:
        raise Refused("With slots no memory is divided; leave context_tokens out, or give memory.")
    return slots


def _budget(
    asked: int | None,
    options: AttachOptions,
    hardware: HardwareProfile,
    card: CardMemory | None,
    device: torch.device,
) -> int:
    """Return the bytes of memory to divide. Raise Refused for more than can be had of a card."""
    if card is None or (asked is None and options.hardware != "auto"):
        return hardware.vram_nbytes if asked is None else asked
    return card.budget(asked, device)


def _reserve(
    model: Any,
    layers: Sequence[compat.MoeLayer],
    charged: Geometry,
    options: AttachOptions,
    hardware: HardwareProfile,
    card: CardMemory | None,
) -> Reserve:
    """Return the reserve of a budget: for stated tokens, on a card by default, or else a profile's. Raise Refused."""
    tokens = options.context_tokens
    if tokens is None and (card is None or options.hardware != "auto"):
        return Reserve.of_profile(hardware.reserve_nbytes)
    tokens = default_tokens(model.config) if tokens is None else tokens
    cache = kv_cache(model, layers) if options.geometry is None else KvCache.of(charged)
    on_processor = folder_of(options) is not None
    context = card.context_nbytes if card is not None else 0 if on_processor else CONTEXT_NBYTES
    return reserve_for(charged, cache, tokens, context)


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

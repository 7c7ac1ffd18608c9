"""Attach and detach: a strategy behind a live model, and the stock model again."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from mobile.costs.cost_model import CostModel
from mobile.costs.geometry import Geometry, project, slots_for
from mobile.costs.hardware import HardwareProfile, parse_nbytes, profile
from mobile.errors import Refused
from mobile.kernels import Kernel, kernel_named, loop
from mobile.links.base import Link, VirtualLink
from mobile.live_model import caller_modes, compat
from mobile.live_model.guards import guard
from mobile.live_model.overrides import Overrides
from mobile.policies.strategy import BigLittle, HalfK, Strategy, resolve
from mobile.residency.residency import PREFILL_BUFFERS
from mobile.runtime import quasi_hidden_state, selftest
from mobile.runtime.decoding import Decoder
from mobile.runtime.engine import Engine
from mobile.runtime.experts import bind, bound
from mobile.runtime.forward_pass import ForwardPass
from mobile.store.layout import ExpertLayout
from mobile.store.memory import HostStore
from mobile.suggest import offer

LINKS = ("auto", "cuda", "virtual", "paced")


@caller_modes.in_plain_modes
def attach(
    model: Any,
    strategy: str | Strategy = "mobile",
    *,
    memory: int | str | None = None,
    slots: int | None = None,
    hardware: str | HardwareProfile = "auto",
    link: str = "auto",
    link_gb_per_s: float | None = None,
    gamma: float | None = None,
    geometry: str | None = None,
    kernel: str = "auto",
    poison: bool = False,
) -> Any:
    """Offload a live Transformers MoE: its experts move to the host store, a few slots serve them.

    Returns the same object; `generate()` and everything around it work as before, and `model.mobile` has the
    stats. Slots lie on the device where the model is. `model` may also be what an adapter, a compiler or a class of
    the caller's puts around a Transformers model.

    - `memory` (bytes or "8GiB", dense weights and reserve included) or `slots`; with neither, the memory of the card,
      or of the profile where time is virtual. On a GPU `memory` also caps what this process may allocate there.
    - `link`: "cuda" (real time; needs the model on a GPU), "virtual" (computed time), "paced" (real sleeping, to test
      threads), or "auto": cuda on a GPU, else virtual.
    - `link_gb_per_s` slows the link down to a consumer one; a real link is slowed by really copying more.
    - `hardware`: a profile, its name, or a .json file of one, which `mobile doctor --calibrate` fits to this machine.
    - `geometry` charges virtual time and bytes as if the model were that real one.
    - `kernel`: "loop" (the reference, and "auto"), "grouped" or "triton", see `mobile.kernels` and `mobile.gemv`.
    - `poison` fills empty slots with NaN, for tests.

    Raises Refused, with nothing changed, for whatever cannot work. Whatever else breaks it off (Ctrl-C, memory) leaves
    the model as it was; a second interrupt, while that is undone, leaves one that `detach` puts right.
    """
    compat.check_version()
    inner = compat.model_inside(model)
    if hasattr(inner, "mobile") or hasattr(model, "mobile"):
        raise Refused("This model is already attached; call mobile.detach(model) first.")
    if any(map(bound, inner.modules())):
        raise Refused("Experts in it are attached with another model that holds them; call mobile.detach on that one.")
    compat.check_weights(inner)
    layers = compat.moe_layers(inner)
    layout = compat.common_layout(layers)
    settled = plan_attach(
        inner,
        layers,
        layout,
        compat.device_of(layers),
        strategy,
        memory=memory,
        slots=slots,
        hardware=hardware,
        link=link,
        link_gb_per_s=link_gb_per_s,
        gamma=gamma,
        geometry=geometry,
        kernel=kernel,
    )
    install(inner, layers, HostStore(layout, len(layers), layers[0].count), settled, poison=poison, around=model)
    return model


@dataclass(frozen=True)
class AttachPlan:
    """What attach decided before it touched anything."""

    strategy: Strategy
    own: Geometry
    charged: Geometry
    layer_map: tuple[tuple[int, ...], ...]
    slots: int
    budget_nbytes: int | None
    card: HardwareProfile
    link: str
    link_gb_per_s: float | None
    kernel: Kernel


def plan_attach(
    model: Any,
    layers: Sequence[compat.MoeLayer],
    layout: ExpertLayout,
    device: torch.device,
    strategy: str | Strategy,
    *,
    memory: int | str | None,
    slots: int | None,
    hardware: str | HardwareProfile,
    link: str,
    link_gb_per_s: float | None,
    gamma: float | None,
    geometry: str | None,
    kernel: str,
) -> AttachPlan:
    """Decide everything, or raise Refused. `model` may lie on the meta device: no weight is read."""
    chosen = resolve(strategy, gamma)
    if chosen.needs_future:
        raise Refused(f"Strategy {chosen.name} needs to know the future; record a trace, and replay it.")
    link, card = _link_and_card(link, hardware, link_gb_per_s, geometry, device)
    own = compat.geometry_of(model, layers, layout)
    charged, layer_map = project(own, geometry)
    if slots is not None and memory is not None:
        raise Refused("Give memory or slots, not both.")
    if slots is None and chosen.retain == "everything" and memory is None:
        slots = charged.total_experts
    if slots is None:
        budget = card.vram_nbytes if memory is None else parse_nbytes(memory)
        slots = slots_for(charged, budget, card.reserve_nbytes, PREFILL_BUFFERS)
    if slots < charged.top_k:
        raise Refused(
            f"{slots} slots cannot hold one token's {charged.top_k} experts; give at least {charged.top_k} slots."
        )
    if chosen.retain == "everything" and slots < charged.total_experts:
        raise Refused(
            f"Strategy {chosen.name} keeps all {charged.total_experts} experts on the device; {slots} slots are too "
            "few."
        )
    if isinstance(chosen.gating, HalfK | BigLittle) and own.top_k < 2:
        raise Refused(f"{own.name} runs one expert a token, which cannot be halved; use a strategy that runs all.")
    computes = kernel_named(kernel, device, layout.dtype)
    if chosen.on_cpu is not None and computes is not loop:
        raise Refused(f"Strategy {chosen.name} computes experts on the CPU, and only the kernel loop can; leave it so.")
    return AttachPlan(
        chosen,
        own,
        charged,
        layer_map,
        min(slots, charged.total_experts),
        None if memory is None else budget,
        card,
        link,
        link_gb_per_s,
        computes,
    )


@caller_modes.in_plain_modes
def install(
    model: Any,
    layers: Sequence[compat.MoeLayer],
    store: HostStore,
    settled: AttachPlan,
    *,
    poison: bool = False,
    around: Any = None,
) -> Any:
    """Attach as settled. The store is empty, or holds the experts where the modules have none any more.

    `around` is what the caller holds, if that is something around the model.
    """
    around = model if around is None else around
    modules, device = [layer.experts for layer in layers], compat.device_of(layers)
    held = all(weight.numel() for module in modules for weight in module.parameters())
    engine = Engine(
        settled.strategy,
        layers,
        settled.own.little_k,
        settled.charged,
        settled.layer_map,
        settled.slots,
        settled.card,
        store,
        settled.kernel,
        poison,
    )
    overrides, decoder, gradients = Overrides(), Decoder(model, engine), torch.is_grad_enabled()
    engine.leave = partial(_leave, engine, overrides)
    try:
        overrides.put(model, "mobile", engine)  # first of all: whatever breaks off the rest, detach can undo it
        if getattr(around, "mobile", None) is not engine:
            overrides.put(around, "mobile", engine)
        guard(around, modules, overrides)
        selftest.check_order(model, layers, overrides)
        decoder.install(overrides)
        for number, module in enumerate(modules):
            bind(module, engine, number, overrides)
        store.take(modules)
        if device.type == "cuda" and settled.budget_nbytes is not None:
            weakref.finalize(engine, _lift_cap, device)  # should the model be deleted without detach
            total = torch.cuda.mem_get_info(device)[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, settled.budget_nbytes / total), device)
        engine.allocate()
        engine.connect(lambda engine, cost: _link(settled, engine, cost))
        _prove(engine, decoder, overrides)
    except BaseException:
        torch.set_grad_enabled(gradients)  # PyTorch's own lines that do it are lines where Ctrl-C may come
        _end(engine, give_back=held)
        raise
    return model


def _prove(engine: Engine, decoder: Decoder, overrides: Overrides) -> None:
    """Run what shows that the strategy works on this model, or that learns what it needs; then start anew.

    Raises Refused if it does not work.
    """
    strategy, device = engine.strategy, engine.device

    def prefill(ids: torch.Tensor) -> None:
        ids = ids.to(device)
        with engine.passing(ForwardPass("prefill", torch.ones_like(ids, dtype=torch.bool))):
            decoder.stock(input_ids=ids, use_cache=False)

    with selftest.undisturbed(decoder.model):
        if isinstance(strategy.gating, BigLittle):
            selftest.check_confidence(decoder.model)
        if isinstance(strategy.gating, HalfK | BigLittle):
            selftest.check_routers(decoder.stock, engine)
        if isinstance(strategy.gating, BigLittle):
            engine.undoable = selftest.rolls_back(decoder.model, decoder.stock, engine)
        if strategy.quasi:
            learnt = quasi_hidden_state.learn(
                decoder.model, engine.layers, engine.store, prefill, lambda: engine.running, overrides
            )
            learnt.listen(overrides)
            engine.quasi = learnt
    engine.restart()


@caller_modes.in_plain_modes
def detach(model: Any) -> Any:
    """The stock model again, bit for bit; returns it.

    Raises Refused if it is not attached, or if its device has no room for all experts; it stays attached then. If
    something breaks it off, the model refuses to run until it is called again, which goes on where it stopped.
    """
    engine = getattr(model, "mobile", None) or getattr(compat.model_inside(model), "mobile", None)
    if not isinstance(engine, Engine):
        raise Refused("This model is not attached, so there is nothing to detach.")
    if engine.device.type == "cuda" and not engine.leaving:
        unused = torch.cuda.memory_reserved(engine.device) - torch.cuda.memory_allocated(engine.device)
        room = torch.cuda.mem_get_info(engine.device)[0] + unused + engine.slot_rows.nbytes
        if engine.store.nbytes > room:
            raise Refused(
                f"Detaching puts {engine.store.nbytes / 2**30:.1f} GiB of experts on {engine.device}, which has "
                f"{room / 2**30:.1f} GiB free; delete the model instead."
            )
    with engine.lock:
        _end(engine, give_back=True)
    return model


def _end(engine: Engine, *, give_back: bool) -> None:
    """Make the model the stock one again. Broken off anywhere, it can be called again, and goes on."""
    engine.leaving = True
    engine.close()
    _lift_cap(engine.device)  # the experts may not fit below it
    if give_back:
        engine.store.give_back([layer.experts for layer in engine.layers])
    engine.leave()


def _leave(engine: Engine, overrides: Overrides) -> None:
    """Let go of the model, whose experts stay where they are; may be called again. `model.mobile` is the last to go."""
    engine.close()
    _lift_cap(engine.device)
    overrides.undo()


def _lift_cap(device: torch.device) -> None:
    """Let this process allocate all of the device again."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _link_and_card(
    link: str, hardware: str | HardwareProfile, link_gb_per_s: float | None, geometry: str | None, device: torch.device
) -> tuple[str, HardwareProfile]:
    """The link's kind, and the profile that budgets and virtual time are taken from."""
    card = hardware if isinstance(hardware, HardwareProfile) else profile(hardware)
    if link not in LINKS:
        raise Refused(f"Link {link!r} is not available; {offer(link, LINKS, 'choose auto, cuda, virtual or paced')}.")
    if link == "auto":
        link = "cuda" if device.type == "cuda" else "virtual"
    if link == "cuda" and device.type != "cuda":
        raise Refused("Link cuda needs the model on a GPU; move it there, or choose virtual.")
    if link == "paced" and device.type != "cpu":
        raise Refused(f"Link paced copies to the CPU, and the model is on {device}; choose cuda or virtual.")
    if geometry is not None and link != "virtual":
        raise Refused(f"Geometry {geometry} can be charged in virtual time only; choose the link virtual.")
    if link_gb_per_s is not None:
        if not link_gb_per_s > 0:
            raise Refused(f"A link of {link_gb_per_s:g} GB/s moves nothing; give a positive number.")
        card = replace(card, link_gb_per_s=link_gb_per_s)
    if device.type == "cuda" and hardware == "auto":
        card = replace(card, name=torch.cuda.get_device_name(device), vram_nbytes=torch.cuda.mem_get_info(device)[1])
    return link, card


def _link(settled: AttachPlan, engine: Engine, cost: CostModel) -> Link:
    row_nbytes = engine.store.layout.nbytes
    if settled.link == "virtual":

        def arrived(key: tuple[int, int], slot: int) -> None:
            engine.fill(key, slot)
            engine.arrived(key, slot)

        return VirtualLink(cost.load_ns, engine.geometry.expert_nbytes, engine.ledger, arrived)
    from mobile.links.stream import PacedChannel, StreamLink

    if settled.link == "paced":
        return StreamLink(PacedChannel(engine.fill, cost.load_ns), row_nbytes, engine.ledger, engine.arrived)
    from mobile.links.cuda import CudaChannel

    channel = CudaChannel(engine.store, engine.slot_rows, engine.row, settled.link_gb_per_s)
    return StreamLink(channel, row_nbytes, engine.ledger, engine.arrived)

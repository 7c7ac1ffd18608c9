"""Attach and detach: a strategy behind a live model, and the stock model again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import torch

from mobile.costs.hardware import HardwareProfile
from mobile.errors import Refused
from mobile.links.registry import LINKS
from mobile.live_model import caller_modes, compat
from mobile.live_model.guards import guard
from mobile.policies.strategy import BigLittle, HalfK, Strategy
from mobile.runtime import quasi_hidden_state, selftest
from mobile.runtime.attach_plan import AttachOptions, AttachPlan, plan_attach
from mobile.runtime.decoding import Decoder
from mobile.runtime.device_memory import forget_frames, refusing
from mobile.runtime.engine import Engine, Findings
from mobile.runtime.experts import bind, bound
from mobile.runtime.forward_pass import ForwardPass
from mobile.store import DiskStore, ExpertLayout, HostStore, Store, repack


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
    gamma: float | str | os.PathLike[str] | None = None,
    geometry: str | None = None,
    kernel: str = "auto",
    store: str | os.PathLike[str] | None = None,
    rows: str = "as-is",
    context_tokens: int | None = None,
    poison: bool = False,
) -> Any:
    """Offload a live Transformers MoE: its experts move to the host store, a few slots serve them.

    Return the same object; `generate()` and everything around it work as before, and `model.mobile` has the stats.
    Slots lie on the device where the model is. `model` may also be what an adapter, a compiler or a class of the
    caller's puts around a Transformers model. The other arguments are explained at
    `mobile.runtime.attach_plan.AttachOptions`; `poison` fills empty slots with NaN, for tests.

    With `rows` other than "as-is" the experts are kept as they were beside their packed rows, in memory or in a second
    file, since `detach` gives back a model bit for bit: fewer bytes are moved and more fit into the slots, but only
    `mobile.load`, which never holds the originals, needs less to keep them all.

    Raise Refused, with nothing changed, for whatever cannot work, or runs out of memory. Whatever else breaks it off
    (Ctrl-C) leaves the model as it was; a second interrupt, while that is undone, leaves one that `detach` puts right.
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
    options = AttachOptions(
        strategy=strategy,
        memory=memory,
        slots=slots,
        hardware=hardware,
        link=link,
        link_gb_per_s=link_gb_per_s,
        gamma=gamma,
        geometry=geometry,
        kernel=kernel,
        store=store,
        rows=rows,
        context_tokens=context_tokens,
    )
    plan = plan_attach(inner, layers, layout, compat.device_of(layers), options)
    with refusing("Making room for the experts in host memory", "close other programs, or give a store on a disk"):
        made = _store(plan, plan.layout, layers)
        originals = None
        if plan.layout.packing != layout.packing:
            try:
                originals = _store(plan, layout, layers)
            except BaseException:
                made.close()
                raise
    install(inner, layers, made, plan, originals=originals, poison=poison, around=model)
    return model


def _store(plan: AttachPlan, layout: ExpertLayout, layers: Sequence[compat.MoeLayer]) -> Store:
    """Return an empty store for a live model's experts; on disk a file without a name, for nobody else can know it."""
    if plan.folder is None:
        return HostStore(layout, len(layers), layers[0].count)
    path = plan.folder / f"attached-{os.getpid()}-{uuid4().hex[:8]}.safetensors"
    return DiskStore(layout.page_aligned(), len(layers), layers[0].count, path)


@caller_modes.in_plain_modes
def install(
    model: Any,
    layers: Sequence[compat.MoeLayer],
    store: Store,
    plan: AttachPlan,
    *,
    originals: Store | None = None,
    poison: bool = False,
    around: Any = None,
) -> Any:
    """Attach as planned. The store is empty, or holds the experts where the modules have none any more.

    With `originals`, both are empty: the experts go there as they are, and packed into the store.
    `around` is the object that the caller holds, where that is something around the model.
    """
    around = model if around is None else around
    modules = [layer.experts for layer in layers]
    held = all(weight.numel() for module in modules for weight in module.parameters())
    engine = Engine(plan, layers, store, originals=originals, poison=poison)
    overrides, decoder, gradients = engine.overrides, Decoder(model, engine), torch.is_grad_enabled()
    try:
        with refusing("Attaching the model", "give fewer slots or less memory, or end what else uses it"):
            overrides.put(model, "mobile", engine)  # first of all: whatever breaks off the rest, detach can undo it
            if getattr(around, "mobile", None) is not engine:
                overrides.put(around, "mobile", engine)
            guard(around, modules, overrides)
            selftest.check_order(model, layers, overrides)
            decoder.install(overrides)
            for number, module in enumerate(modules):
                bind(module, engine, number, overrides)
            engine.originals.take(modules)
            if originals is not None:
                repack(originals, store, len(layers))
            engine.allocate()
            engine.connect(LINKS[plan.link].connect)
            engine.start(_self_test(engine, decoder))
    except BaseException as error:
        torch.set_grad_enabled(gradients)  # PyTorch's own lines that do it are lines where Ctrl-C may come
        forget_frames(error)
        engine.uninstall(give_back=held)
        raise
    return model


def _self_test(engine: Engine, decoder: Decoder) -> Findings:
    """Run the passes that show that the strategy works on this model, or that learn what it needs.

    Raise Refused if it does not work.
    """
    strategy, device = engine.strategy, engine.device

    def prefill(ids: torch.Tensor) -> None:
        ids = ids.to(device)
        with engine.passing(ForwardPass("prefill", torch.ones_like(ids, dtype=torch.bool))):
            decoder.stock(input_ids=ids, use_cache=False)

    undoable: frozenset[type] = frozenset()
    quasi = None
    with selftest.undisturbed(decoder.model), selftest.on_ids_alone():
        if isinstance(strategy.gating, BigLittle):
            selftest.check_confidence(decoder.model)
        if isinstance(strategy.gating, HalfK | BigLittle):
            selftest.check_routers(decoder.stock, engine)
        if isinstance(strategy.gating, BigLittle):
            selftest.check_signal(decoder.stock, engine, strategy.gating)
            undoable = selftest.rolls_back(decoder.model, decoder.stock, engine)
        routers = selftest.learn_routers(decoder.model, decoder.stock, engine) if strategy.knows_cache else None
        if strategy.quasi:
            quasi = quasi_hidden_state.learn(
                decoder.model, engine.layers, engine.store, prefill, lambda: engine.running, engine.overrides
            )
            quasi.listen(engine.overrides)
    return Findings(undoable, quasi, routers)


@caller_modes.in_plain_modes
def detach(model: Any) -> Any:
    """Make it the stock model again, bit for bit; return it.

    A model that `mobile.load` read into packed rows gets the weights that it was computed with: those of its
    checkpoint, quantised and decoded. They take as much memory as its experts would as they are.

    Raise Refused if it is not attached, or if its device has no room for all experts; it stays attached then. If
    something breaks it off, or the room is gone meanwhile, the model refuses to run until it is called again, which
    goes on where it stopped.
    """
    engine = getattr(model, "mobile", None) or getattr(compat.model_inside(model), "mobile", None)
    if not isinstance(engine, Engine):
        raise Refused("This model is not attached, so there is nothing to detach.")
    if engine.device.type == "cuda" and not engine.leaving:
        unused = torch.cuda.memory_reserved(engine.device) - torch.cuda.memory_allocated(engine.device)
        room = torch.cuda.mem_get_info(engine.device)[0] + unused + engine.slot_rows.nbytes
        nbytes = len(engine.layers) * engine.experts * engine.store.layout.weights_nbytes
        if nbytes > room:
            raise Refused(
                f"Detaching puts {nbytes / 2**30:.1f} GiB of experts on {engine.device}, which has "
                f"{room / 2**30:.1f} GiB free; delete the model instead."
            )
    again = "make room there and call mobile.detach(model) again, which goes on"
    with engine.lock, refusing("Putting the experts back into the model", again):
        engine.uninstall(give_back=True)
    return model

"""Attach and detach: a strategy behind a live model, and the stock model again."""

from __future__ import annotations

from typing import Any

from mobile import compat, selftest
from mobile.decoding import Decoder
from mobile.engine import Engine
from mobile.experts import bind, unbind
from mobile.geometry import dress, slots_for
from mobile.hardware import HardwareProfile, parse_nbytes, profile
from mobile.refusal import Refused
from mobile.residency import STAGING
from mobile.strategy import BigLittle, FullK, Strategy, resolve


def attach(
    model: Any,
    strategy: str | Strategy = "mobile",
    *,
    memory: int | str | None = None,
    slots: int | None = None,
    hardware: str | HardwareProfile = "auto",
    link: str = "auto",
    gamma: float | None = None,
    geometry: str | None = None,
    poison: bool = False,
) -> Any:
    """Offload a live Transformers MoE: its experts move to the host store, a few slots serve them.

    Returns the same object; `generate()` and everything around it work as before, and `model.mobile` has the
    stats. Give `memory` (bytes or "8GiB", dense weights and reserve included) or `slots`; with neither, the
    profile's memory. `geometry` charges time and bytes as if the model were that real one. `poison` fills empty
    slots with NaN, for tests. Raises Refused, with nothing changed, for whatever cannot work.
    """
    compat.check_version()
    if hasattr(model, "mobile"):
        raise Refused("This model is already attached; call mobile.detach(model) first.")
    chosen = resolve(strategy, gamma)
    hardware = hardware if isinstance(hardware, HardwareProfile) else profile(hardware)
    if link not in ("auto", "virtual"):
        raise Refused(f"Link {link!r} is not available; choose auto or virtual.")
    layers = compat.moe_layers(model)
    own = compat.geometry_of(model, layers)
    worn, stands_for = dress(own, geometry)
    if slots is not None and memory is not None:
        raise Refused("Give memory or slots, not both.")
    if slots is None and chosen.retain == "everything" and memory is None:
        slots = worn.keys
    if slots is None:
        nbytes = hardware.vram_nbytes if memory is None else parse_nbytes(memory)
        slots = slots_for(worn, nbytes, hardware.reserve_nbytes, STAGING)
    if slots < worn.top_k:
        raise Refused(f"{slots} slots cannot hold one token's {worn.top_k} experts; give at least {worn.top_k} slots.")
    if chosen.retain == "everything" and slots < worn.keys:
        raise Refused(f"Strategy {chosen.name} keeps all {worn.keys} experts on the device; {slots} slots are too few.")
    if any(not p.is_floating_point() or p.device.type == "meta" for p in model.parameters()):
        raise Refused("The model's weights are quantised or not loaded; load them in a floating-point dtype first.")
    if not isinstance(chosen.gating, FullK):
        selftest.check_routers(model, layers, own.little_k)
    engine = Engine(chosen, layers, own.little_k, worn, stands_for, min(slots, worn.keys), hardware, poison)
    decoder = Decoder(model, engine)

    def leave() -> None:
        decoder.remove()
        for layer in layers:
            unbind(layer.experts)
        engine.store.give_back()

    engine.take_experts()
    for number, layer in enumerate(layers):
        bind(layer.experts, engine, number)
    decoder.install()
    engine.leave, model.mobile = leave, engine
    if isinstance(chosen.gating, BigLittle):
        try:
            engine.rolls_back = selftest.rolls_back(decoder.stock, engine)
        except BaseException:
            detach(model)
            raise
        engine.restart()
    return model


def detach(model: Any) -> Any:
    """The stock model again, bit for bit; returns it. Raises Refused if it is not attached."""
    engine = getattr(model, "mobile", None)
    if not isinstance(engine, Engine):
        raise Refused("This model is not attached, so there is nothing to detach.")
    engine.leave()
    del model.mobile
    return model

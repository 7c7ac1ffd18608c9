"""Reasons why a strategy cannot run a model with so many slots, found from sizes alone. No torch.

`mobile.load`, `mobile.attach` and `mobile plan` refuse by them, in the same words.
"""

from __future__ import annotations

from mobile.costs.geometry import Geometry
from mobile.errors import Refused
from mobile.policies.strategy import BigLittle, HalfK, Strategy


def refuse_future(strategy: Strategy) -> None:
    """Raise Refused for a strategy that needs to know the future, which only a replay does."""
    if strategy.needs_future:
        raise Refused(f"Strategy {strategy.name} needs to know the future; record a trace, and replay it.")


def refuse_slots(strategy: Strategy, geometry: Geometry, slots: int) -> None:
    """Raise Refused for too few slots: a token's experts must be in slots at once, and some strategies keep all."""
    if slots < geometry.top_k:
        raise Refused(
            f"{slots} slots cannot hold one token's {geometry.top_k} experts; give at least {geometry.top_k} slots."
        )
    if strategy.retain == "everything" and slots < geometry.total_experts:
        raise Refused(
            f"Strategy {strategy.name} keeps all {geometry.total_experts} experts on the device; {slots} slots are too "
            "few."
        )


def refuse_halving(strategy: Strategy, geometry: Geometry) -> None:
    """Raise Refused for a strategy that runs half of the top-k where that is one expert."""
    if isinstance(strategy.gating, HalfK | BigLittle) and geometry.top_k < 2:
        raise Refused(f"{geometry.name} runs one expert a token, which cannot be halved; use a strategy that runs all.")


def refuse_disk(strategy: Strategy) -> None:
    """Raise Refused for a strategy that cannot have its experts on a disk."""
    if strategy.on_cpu is not None:
        raise Refused(
            f"Strategy {strategy.name} computes experts where they lie, which a disk cannot; keep them in memory."
        )

"""The experts function registered with Transformers, one for all model families, so that no model code is copied."""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mobile.live_model.overrides import Overrides

NAME = "mobile"


class RunsExperts(Protocol):
    """An engine, or a stand-in for one, that computes for offloaded experts modules."""

    def run_experts(
        self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor: ...


@torch.compiler.disable  # what is decided for each layer anew cannot be traced
def offloaded_experts(module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Compute routed experts by the engine bound to the module.

    hidden (tokens, H), index and weights (tokens, K) -> (tokens, H).
    """
    engine, layer = module._mobile_binding
    return engine.run_experts(layer, hidden, index, weights)


ALL_EXPERTS_FUNCTIONS.register(NAME, offloaded_experts)


def bind(module: Any, engine: RunsExperts, layer: int, overrides: Overrides) -> None:
    """Route the module's forward through the engine.

    The module gets a configuration object of its own, since models built from one share it.
    """
    config = copy.copy(module.config)
    config._experts_implementation = NAME
    overrides.put(module, "_mobile_binding", (engine, layer))
    overrides.put(module, "config", config)


def bound(module: Any) -> bool:
    """Return whether an engine runs the module's experts."""
    return "_mobile_binding" in vars(module)

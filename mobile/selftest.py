"""Checks at attach: that routers obey a smaller top-k, and that rollback leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mobile import rollback
from mobile.compat import MoeLayer
from mobile.engine import Engine
from mobile.passes import Pass
from mobile.refusal import Refused
from mobile.trace import Kind


def _ids(device: torch.device, *ids: int) -> torch.Tensor:
    return torch.tensor([ids], device=device)


def check_routers(model: nn.Module, layers: list[MoeLayer], little_k: int) -> None:
    """Run one token and ask every router again for `little_k` experts.

    Raises Refused if one does not oblige: halving its choice would need a rule this version does not have.
    """
    calls: dict[nn.Module, tuple] = {}

    def heard(router: nn.Module, args: tuple, kwargs: dict, _output: object) -> None:
        calls[router] = (args, kwargs)

    hooks = [layer.router.register_forward_hook(heard, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad():
            model(input_ids=_ids(next(model.parameters()).device, 0, 1), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for layer in layers:
        full = layer.router.top_k
        try:
            layer.router.top_k = little_k
            with torch.no_grad():
                width = layer.route(*calls[layer.router]).shape[-1]
        finally:
            layer.router.top_k = full
        if width != little_k:
            raise Refused(
                f"{type(layer.router).__name__} always chooses {width} experts, so no token can run with {little_k}; "
                "use a strategy that runs all of them."
            )


@torch.no_grad()
def rolls_back(stock: Callable[..., Any], engine: Engine) -> bool:
    """Whether a little step undone and a big step taken equal, bit for bit, the big step on an untouched cache.

    `stock` is the model's own forward, its experts already served by `engine`.
    """
    device = next(engine.layers[0].router.parameters()).device
    prompt, token = _ids(device, 0, 1, 2), _ids(device, 1)

    def forward(kind: Kind, ids: torch.Tensor, cache: Any) -> Any:
        with engine.passing(Pass(kind, torch.ones_like(ids, dtype=torch.bool))):
            return stock(input_ids=ids, past_key_values=cache, use_cache=True)

    cache = forward("prefill", prompt, None).past_key_values
    if not rollback.supported(cache):
        return False
    untouched = copy.deepcopy(cache)
    undo = rollback.before_step(cache)
    with engine.little_k():
        forward("little", token, cache)
    undo()
    again = forward("full", token, cache)
    return torch.equal(again.logits, forward("full", token, untouched).logits)

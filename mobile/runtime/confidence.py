"""Confidence in a little pass, by any signal of `mobile.policies.signals`: (rows,), each from 0 to 1.

No row's value depends on the other rows of its batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch

from mobile.errors import Refused
from mobile.live_model.compat import MoeLayer
from mobile.runtime.forward_pass import ForwardPass, Selection


def replay_routers(layers: Sequence[MoeLayer], little: ForwardPass) -> list[Selection]:
    """Return by layer the ids and weights (rows, K) that its router gives at K on the little pass's router input.

    Raise Refused for a router that gives no weights.
    """
    try:
        return [layer.choice(*little.router_inputs[number]) for number, layer in enumerate(layers)]
    except Refused as error:
        raise Refused(
            f"{type(layers[0].router).__name__} gives no weights with its choice, which coverage is made of; judge "
            "tokens by another signal."
        ) from error


def confidence(
    signal: str, logits: torch.Tensor, little: ForwardPass, replayed: Sequence[Selection] = ()
) -> torch.Tensor:
    """Return the signal of a little pass of one token a row, (rows,), given the logits (rows, V) of its output.

    It lies on the device, or in host memory where it is made of what the pass has read. `replayed` is what
    `replay_routers` gives, for a signal that needs it.
    """
    if signal == "coverage":
        return _coverage(little, replayed)
    if signal == "random":
        return _random(little)
    probabilities = logits.float().softmax(-1)
    if signal == "margin":
        first, second = probabilities.topk(2, -1).values.unbind(-1)
        return first - second
    if signal == "entropy":
        return (1 - torch.special.entr(probabilities).sum(-1) / math.log(logits.shape[-1])).clamp(0, 1)
    highest = probabilities.amax(-1)
    return highest * _coverage(little, replayed) if signal == "product" else highest


def _coverage(little: ForwardPass, replayed: Sequence[Selection]) -> torch.Tensor:
    """Return the share of the K experts' router weight on the heaviest of them, as many as the little pass ran."""
    shares = []
    for (ran, _), (_, weights) in zip(little.selections, replayed, strict=True):
        weights = weights.float()
        whole = weights.sum(-1)
        share = weights.topk(ran.shape[1], -1).values.sum(-1) / whole
        shares.append(share.where(whole > 0, torch.ones_like(share)))  # no weight: nothing is left out
    return torch.stack(shares).mean(0).clamp(0, 1)


def _random(little: ForwardPass) -> torch.Tensor:
    """Return a number for each row that is uniform from 0 to 1: a hash of the experts that the row ran, by layer.

    So a row gives it alone and in any batch, here and on any machine that routes it alike.
    """
    rows = zip(*little.selected, strict=True)
    ran = [[expert for layer in row for expert in sorted(layer)] for row in rows]
    hashed = [hashlib.blake2b(repr(row).encode(), digest_size=4).digest() for row in ran]
    return torch.tensor([(int.from_bytes(each) >> 8) / 2**24 for each in hashed])  # exact in float32

"""The expert kernel: the reference loop, equal bit for bit to Transformers' eager experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn


class Groups(NamedTuple):
    """Routed (token, expert) pairs sorted by expert, and within one expert by rank, then token, as eager has them.

    `experts` ascending, `counts` pairs of each; `tokens` and `ranks` (pairs,) int64.
    """

    experts: list[int]
    counts: list[int]
    tokens: torch.Tensor
    ranks: torch.Tensor


def group(index: torch.Tensor, experts: int) -> Groups:
    """Group index (tokens, K); entries equal to `experts` are nobody's and are left out."""
    by_rank = index.T.reshape(-1)
    order = torch.argsort(by_rank, stable=True)
    counts = torch.bincount(by_rank, minlength=experts + 1)[:experts].tolist()
    active = [expert for expert, count in enumerate(counts) if count]
    order = order[: sum(counts)]
    return Groups(active, [counts[e] for e in active], order % index.shape[0], order // index.shape[0])


def loop(
    module: Any, hidden: torch.Tensor, weights: torch.Tensor, groups: Groups,
    slots: Iterable[tuple[int, int]], views: Mapping[str, torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """Sum of weighted expert outputs, (tokens, H), in ascending expert order.

    hidden (tokens, H), weights (tokens, K); `slots` yields (expert, slot) in ascending order, each slot's weights
    valid until the next is asked for; `views` are the slots' weights by name.
    """
    result = torch.zeros_like(hidden)
    start = 0
    for (_, slot), count in zip(slots, groups.counts, strict=True):
        tokens, ranks = groups.tokens[start : start + count], groups.ranks[start : start + count]
        start += count
        inner = module._apply_gate(nn.functional.linear(hidden[tokens], views["gate_up_proj"][slot]))
        outer = nn.functional.linear(inner, views["down_proj"][slot]) * weights[tokens, ranks, None]
        result.index_add_(0, tokens, outer.to(result.dtype))
    return result

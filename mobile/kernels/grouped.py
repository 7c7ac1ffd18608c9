"""The grouped kernel: one grouped matrix product a wave, its groups the slots themselves."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn

from mobile.kernels.loop import Groups, Views, activate, normed, up_name
from mobile.kernels.sum_dtype import sum_dtype
from mobile.residency.residency import Wave
from mobile.store import plain


def grouped(
    module: Any,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    groups: Groups,
    waves: Iterable[Wave],
    views: Views,
    _host: Views | None = None,
) -> torch.Tensor:
    """Compute one grouped product a wave, its groups the slots themselves. For arguments see `Kernel`.

    Equal to `loop` up to rounding: within 1e-5 of the largest output in fp32, 2e-2 in bf16. On a CPU contributions are
    summed as the loop sums them, and elsewhere by rank and in fp32, since a GPU's `index_add_` has no fixed order.
    """
    # 1. Compute each pair's output, in the order of `groups`.
    outer = hidden.new_zeros(len(groups.tokens), hidden.shape[1])
    for wave in waves:
        for window in _windows(wave):
            _compute(module, hidden, groups, window, views, outer)
    # 2. Weigh and sum them.
    scales = weights[groups.tokens, groups.ranks, None]
    if hidden.device.type == "cpu":
        result = torch.zeros_like(hidden, dtype=sum_dtype(module, hidden.dtype, weights.dtype))
        return result.index_add_(0, groups.tokens, (outer * scales).to(result.dtype)).to(hidden.dtype)
    parts = torch.zeros(*weights.shape, hidden.shape[1], dtype=torch.float32, device=hidden.device)
    parts[groups.tokens, groups.ranks] = outer.float() * scales.float()
    return parts.sum(1).to(hidden.dtype)


def _compute(
    module: Any, hidden: torch.Tensor, groups: Groups, window: Wave, views: Views, outer: torch.Tensor
) -> None:
    """Write the outputs of a window's pairs into `outer` (pairs, H), unweighted."""
    # 1. Gather the pairs by slot: which they are, and for each slot the number at which its own end.
    first, last, device = window[0][1], window[-1][1], hidden.device
    ends, end = [0] * (last - first + 1), 0
    for position, slot in window:
        end += groups.counts[position]
        ends[slot - first] = end
    for number in range(1, len(ends)):  # a slot that this wave does not use is an empty group
        ends[number] = max(ends[number], ends[number - 1])
    offs = torch.tensor(ends, dtype=torch.int32, device=device)
    chosen = _pairs(groups, [position for position, _ in window], device)
    if module.has_bias:
        of_pair = [slot for position, slot in window for _ in range(groups.counts[position])]
        slots = torch.tensor(of_pair, device=device)

    # 2. Multiply.
    def project(x: torch.Tensor, name: str) -> torch.Tensor:
        weight = plain(views[name])[first : last + 1]
        y = nn.functional.grouped_mm(x, weight if module.is_transposed else weight.transpose(1, 2), offs=offs)
        return y + plain(views[f"{name}_bias"])[slots] if module.has_bias else y

    inner = activate(module, project(hidden[groups.tokens[chosen]], up_name(module)))
    outer[chosen] = normed(module, project(inner, "down_proj"))


def _pairs(groups: Groups, positions: list[int], device: torch.device) -> slice | torch.Tensor:
    """Return where the pairs of the experts at these positions are: a slice if they follow on one another."""
    start = groups.starts[positions[0]]
    if positions == list(range(positions[0], positions[-1] + 1)):
        return slice(start, groups.starts[positions[-1]] + groups.counts[positions[-1]])
    ranges = [range(groups.starts[each], groups.starts[each] + groups.counts[each]) for each in positions]
    return torch.tensor([*chain(*ranges)], device=device)


GROUPS = 1000  # the CUDA kernel takes fewer than 1,024 groups


def _windows(wave: Wave) -> list[Wave]:
    """Sort the wave by slot, and cut it where it would span more slots than one grouped product takes."""
    windows: list[Wave] = []
    for position, slot in sorted(wave, key=lambda pair: pair[1]):
        if not windows or slot - windows[-1][0][1] >= GROUPS:
            windows.append([])
        windows[-1].append((position, slot))
    return windows

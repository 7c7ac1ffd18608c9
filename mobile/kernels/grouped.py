"""The grouped kernel: one grouped matrix product a wave, its groups the slots themselves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from mobile.kernels.loop import Groups, HostExperts, Views, activate, normed, up_name
from mobile.kernels.sum_dtype import sum_dtype
from mobile.residency.residency import Wave
from mobile.store import plain
from mobile.transfer import send


def grouped(
    module: Any,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    groups: Groups,
    waves: Iterable[Wave],
    views: Views,
    _host: HostExperts | None = None,
) -> torch.Tensor:
    """Compute one grouped product a wave, its groups the slots themselves. For arguments see `Kernel`.

    Equal to `loop` up to rounding: within 1e-5 of the largest output in fp32, 2e-2 in bf16. On a CPU contributions are
    summed as the loop sums them, and elsewhere by rank and in fp32, since a GPU's `index_add_` has no fixed order.
    """
    # 1. Compute each pair's output, in the order of `groups`.
    groups = groups.on(hidden.device)
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
    first, last = window[0][1], window[-1][1]
    chosen, slots, offs = _indices(groups, window, hidden.device, of_pairs=module.has_bias)

    def project(x: torch.Tensor, name: str) -> torch.Tensor:
        weight = plain(views[name])[first : last + 1]
        y = nn.functional.grouped_mm(x, weight if module.is_transposed else weight.transpose(1, 2), offs=offs)
        return y + plain(views[f"{name}_bias"])[slots] if module.has_bias else y

    inner = activate(module, project(hidden[groups.tokens[chosen]], up_name(module)))
    outer[chosen] = normed(module, project(inner, "down_proj"))


def _indices(
    groups: Groups, window: Wave, device: torch.device, *, of_pairs: bool
) -> tuple[slice | torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the window's pairs by slot, the slot of each (`of_pairs`, else none), and where a slot's pairs end.

    Pairs are a slice where they follow on one another. Ends (slots,) int32 are counted from the first slot of the
    window to its last, as grouped products take them. All are sent to the device in one copy.
    """
    first, counts = window[0][1], [groups.counts[position] for position, _ in window]
    ends = np.zeros(window[-1][1] - first + 1, dtype=np.int32)
    ends[[slot - first for _, slot in window]] = counts  # a slot that this wave does not use is an empty group
    ends = ends.cumsum(dtype=np.int32)
    positions, pairs = [position for position, _ in window], np.empty(0, dtype=np.int64)
    chosen: slice | torch.Tensor = slice(groups.starts[positions[0]], groups.starts[positions[0]] + sum(counts))
    if positions != list(range(positions[0], positions[0] + len(positions))):
        pairs = np.concatenate([np.arange(*groups.pairs(position).indices(2**62)) for position in positions])
    slots = np.repeat([slot for _, slot in window], counts if of_pairs else 0)
    sent = send(np.concatenate([pairs, slots, np.resize(ends, len(ends) + len(ends) % 2).view(np.int64)]), device)
    if len(pairs):
        chosen = sent[: len(pairs)]
    offs = sent[len(pairs) + len(slots) :].view(torch.int32)[: len(ends)]
    return chosen, sent[len(pairs) : len(pairs) + len(slots)], offs


GROUPS = 1000  # the CUDA kernel takes fewer than 1,024 groups


def _windows(wave: Wave) -> list[Wave]:
    """Sort the wave by slot, and cut it where it would span more slots than one grouped product takes."""
    windows: list[Wave] = []
    for position, slot in sorted(wave, key=lambda pair: pair[1]):
        if not windows or slot - windows[-1][0][1] >= GROUPS:
            windows.append([])
        windows[-1].append((position, slot))
    return windows

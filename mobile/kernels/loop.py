"""The reference kernel, equal bit for bit to Transformers' eager experts, and the steps that all kernels share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from mobile.kernels.sum_dtype import sum_dtype
from mobile.residency.residency import HOST, Wave
from mobile.store import Weights

Views = Mapping[str, Weights]  # weights by name, (slots, ...), or (experts, ...) where they lie in the host store


Multiply = Callable[[Any, torch.Tensor, Weights, int], torch.Tensor]  # module, x, weights, slot -> x times its matrix


class Groups(NamedTuple):
    """Routed (token, expert) pairs sorted by expert, and within one expert by rank, then token, as eager has them.

    `experts` ascending, `counts` pairs of each, `starts` where its pairs begin; `tokens` and `ranks` (pairs,) int64.
    """

    experts: list[int]
    counts: list[int]
    starts: list[int]
    tokens: torch.Tensor
    ranks: torch.Tensor


NO_SUCH_EXPERT = "A router chose expert {} of {}, which there is not."


def group(index: torch.Tensor, experts: int) -> Groups:
    """Group index (tokens, K) by expert; entries equal to `experts` mean none and are left out. Waits for the device.

    A token routed to one expert twice has two pairs with it, as in Transformers' eager experts. Raise IndexError for
    an expert that there is not, which those refuse as well.
    """
    if index.shape[0] == 1:
        # One token, as in every decode step: a list of K numbers is sorted faster than tensors are.
        ordered, ranks = index[0].sort(stable=True)
        ids = ordered.tolist()
        if ids and (ids[0] < 0 or ids[-1] > experts):
            raise IndexError(NO_SUCH_EXPERT.format(ids[0] if ids[0] < 0 else ids[-1], experts))
        chosen = [expert for expert in ids if expert < experts]
        ranks = ranks[: len(chosen)]
        active = list(dict.fromkeys(chosen))
        # Unless the router chose an expert twice, each has one pair.
        if len(active) == len(chosen):
            return Groups(active, [1] * len(active), list(range(len(active))), torch.zeros_like(ranks), ranks)
        counts = [chosen.count(expert) for expert in active]
        return Groups(active, counts, [chosen.index(expert) for expert in active], torch.zeros_like(ranks), ranks)
    # Many tokens. Pairs lie by rank, then by token, so a stable sort by expert gives the order of eager's sums.
    by_rank = index.T.reshape(-1)
    order = torch.argsort(by_rank, stable=True)
    totals = torch.bincount(by_rank, minlength=experts + 1).tolist()
    if len(totals) > experts + 1:
        raise IndexError(NO_SUCH_EXPERT.format(len(totals) - 1, experts))
    totals.pop()  # the entries that mean none; their pairs are the last
    active = [expert for expert, count in enumerate(totals) if count]
    counts, starts, end = [totals[expert] for expert in active], [], 0
    for count in counts:
        starts.append(end)
        end += count
    order = order[:end]
    return Groups(active, counts, starts, order % index.shape[0], order // index.shape[0])


def loop(
    module: Any,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    groups: Groups,
    waves: Iterable[Wave],
    views: Views,
    host: Views | None = None,
) -> torch.Tensor:
    """Compute one product at a time, and sum in ascending expert order: the reference. For arguments see `Kernel`.

    Packed weights are decoded, one matrix at a time. Experts whose slot is HOST are computed on the CPU from `host`:
    the same product where the device is the CPU too, equal up to rounding elsewhere. The CPU works on the calling
    thread, while a GPU runs what was launched before (not tested on one yet).
    """
    return one_by_one(module, hidden, weights, groups, waves, (views, host), multiplied)


def one_by_one(
    module: Any,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    groups: Groups,
    waves: Iterable[Wave],
    places: tuple[Views, Views | None],
    multiply: Multiply,
) -> torch.Tensor:
    """Compute as `loop` does, with `multiply` for each product; `places` are the slots' views and the host's."""
    views, host = places
    result = torch.zeros_like(hidden, dtype=sum_dtype(module, hidden.dtype, weights.dtype))
    scales = weights[groups.tokens, groups.ranks, None]
    held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by position, outputs that it is not yet the turn of
    turn = 0  # the position that is added next
    for wave in waves:
        for position, slot in wave:
            pairs = slice(groups.starts[position], groups.starts[position] + groups.counts[position])
            tokens = groups.tokens[pairs]
            if slot == HOST:
                assert host is not None, "a strategy that computes on the CPU is given the rows there"
                outer = expert_output(module, hidden[tokens].cpu(), groups.experts[position], host, multiply)
                outer = outer.to(hidden.device)
            else:
                outer = expert_output(module, hidden[tokens], slot, views, multiply)
            outer = normed(module, outer)
            held[position] = tokens, (outer * scales[pairs]).to(result.dtype)
        while turn in held:
            result.index_add_(0, *held.pop(turn))
            turn += 1
    return result.to(hidden.dtype)


def multiplied(module: Any, x: torch.Tensor, weights: Weights, slot: int) -> torch.Tensor:
    """Return x (pairs, inputs) times the matrix in a slot, as Transformers' eager experts multiply them."""
    weight = weights[slot]
    return x @ weight if module.is_transposed else nn.functional.linear(x, weight)


def expert_output(
    module: Any, x: torch.Tensor, slot: int, views: Views, multiply: Multiply = multiplied
) -> torch.Tensor:
    """Compute one expert on x (pairs, H), unweighted and not yet `normed`: (pairs, H)."""

    def project(x: torch.Tensor, name: str) -> torch.Tensor:
        y = multiply(module, x, views[name], slot)
        return y + views[f"{name}_bias"][slot] if module.has_bias else y

    return project(activate(module, project(x, up_name(module))), "down_proj")


def up_name(module: Any) -> str:
    """Return the name of the weight of an expert's first product."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def activate(module: Any, inner: torch.Tensor) -> torch.Tensor:
    """Apply the activation between two products: (pairs, 2I), or (pairs, I) without a gate, -> (pairs, I)."""
    return module._apply_gate(inner) if module.has_gate else module.act_fn(inner)


def normed(module: Any, outer: torch.Tensor) -> torch.Tensor:
    """Apply the norm that a layer's experts share to their outputs (pairs, H), if there is one."""
    return module.post_expert_norm(outer) if getattr(module, "has_post_expert_norm", False) else outer

"""The reference kernel, equal bit for bit to Transformers' eager experts, and the steps that all kernels share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from mobile.kernels.sum_dtype import sum_dtype
from mobile.residency.residency import HOST, Wave
from mobile.store import Weights
from mobile.transfer import read, send

Views = Mapping[str, Weights]  # weights by name, (slots, ...), or (experts, ...) where they lie in the host store


Multiply = Callable[[Any, torch.Tensor, Weights, int], torch.Tensor]  # module, x, weights, slot -> x times its matrix


class HostExperts(Protocol):
    """The experts of one layer in host memory, which the CPU computes: see `mobile.kernels.host_experts`."""

    def submit(self, module: Any, groups: Groups, position: int, multiply: Multiply) -> None:
        """Have the CPU compute the expert at a position of `groups`, after those submitted before."""

    def outputs(self, device: torch.device) -> Iterable[tuple[int, torch.Tensor]]:
        """Wait for what was submitted, and return position and output (pairs, H) of each, on a device."""
        ...


class Groups(NamedTuple):
    """Routed (token, expert) pairs sorted by expert, and within one expert by rank, then token, as eager has them.

    `experts` ascending, `counts` pairs of each, `starts` where its pairs begin; `tokens` and `ranks` (pairs,) int64, in
    host memory for FEW_TOKENS at most, else on the device of the ids.
    """

    experts: list[int]
    counts: list[int]
    starts: list[int]
    tokens: torch.Tensor
    ranks: torch.Tensor

    def pairs(self, position: int) -> slice:
        """Return where the pairs of the expert at this position are."""
        return slice(self.starts[position], self.starts[position] + self.counts[position])

    def on(self, device: torch.device) -> Groups:
        """Return them with `tokens` and `ranks` on a device, sent in one copy if they are in host memory."""
        if self.tokens.device.type != "cpu":
            return self
        tokens, ranks = send(torch.stack((self.tokens, self.ranks)), device)
        return self._replace(tokens=tokens, ranks=ranks)


FEW_TOKENS = 64  # of which the ids are read and grouped on the host; a device sorts more
NO_SUCH_EXPERT = "A router chose expert {} of {}, which there is not."


def group(index: torch.Tensor, experts: int) -> Groups:
    """Group index (tokens, K) by expert; entries equal to `experts` mean none and are left out. Waits for the device.

    A token routed to one expert twice has two pairs with it, as in Transformers' eager experts. Raise IndexError for
    an expert that there is not, which those refuse as well.
    """
    wanted, finish = begin_grouping(index, experts)
    return finish(*read(wanted))


def begin_grouping(index: torch.Tensor, experts: int) -> tuple[torch.Tensor, Callable[[torch.Tensor], Groups]]:
    """Return what has to be read for the groups of `group`, and a function that makes them of it in host memory."""
    if index.shape[0] == 1:
        return index, partial(_of_one, experts)
    # Pairs lie by rank, then by token, so a stable sort by expert gives the order of eager's sums.
    if index.shape[0] <= FEW_TOKENS:
        return index, partial(_of_few, experts)
    by_rank = index.T.reshape(-1)
    order = torch.argsort(by_rank, stable=True)
    # Places 1 to `experts` count experts, the next one entries that mean none, and those at the ends what there is not.
    totals = torch.zeros(experts + 3, dtype=torch.int64, device=index.device)
    totals.scatter_add_(0, by_rank.long().clamp(-1, experts + 1) + 1, torch.ones_like(order))
    return totals, partial(_of_many, experts, order, index.shape[0])


def _of_one(experts: int, index: torch.Tensor) -> Groups:
    """Group one token, as in every decode step: a list of K numbers is sorted faster than an array is."""
    ids = index[0].tolist()
    ranks = sorted(range(len(ids)), key=ids.__getitem__)
    if ids and not (ids[ranks[0]] >= 0 and ids[ranks[-1]] <= experts):
        raise IndexError(NO_SUCH_EXPERT.format(ids[ranks[0]] if ids[ranks[0]] < 0 else ids[ranks[-1]], experts))
    chosen = [ids[rank] for rank in ranks if ids[rank] < experts]
    active = list(dict.fromkeys(chosen))
    starts, counts = list(range(len(active))), [1] * len(active)
    if len(active) != len(chosen):  # the router chose an expert twice
        starts, counts = [chosen.index(expert) for expert in active], [chosen.count(expert) for expert in active]
    tokens = torch.zeros(len(chosen), dtype=torch.int64, device="cpu")
    return Groups(active, counts, starts, tokens, torch.tensor(ranks[: len(chosen)], device="cpu", dtype=torch.int64))


def _of_few(experts: int, index: torch.Tensor) -> Groups:
    """Group few tokens on the host."""
    by_rank = index.numpy().T.reshape(-1)
    order = by_rank.argsort(kind="stable")
    if len(order) and not (by_rank[order[0]] >= 0 and by_rank[order[-1]] <= experts):
        raise IndexError(NO_SUCH_EXPERT.format(by_rank[order[0 if by_rank[order[0]] < 0 else -1]], experts))
    groups = _counted(np.bincount(by_rank, minlength=experts + 1).tolist()[:experts])
    rank, token = np.divmod(order[: sum(groups[1])], max(1, len(index)))
    return Groups(*groups, torch.as_tensor(token, device="cpu"), torch.as_tensor(rank, device="cpu"))


def _of_many(experts: int, order: torch.Tensor, tokens: int, totals: torch.Tensor) -> Groups:
    """Group the pairs that a device has sorted into `order`."""
    below, *counts, _, above = totals.tolist()
    if below or above:
        raise IndexError(NO_SUCH_EXPERT.format("-1 or below" if below else f"{experts + 1} or above", experts))
    groups = _counted(counts)
    order = order[: sum(groups[1])]
    return Groups(*groups, order % tokens, order // tokens)


def _counted(totals: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Return the active experts, their pairs, and where these begin, given the pairs of every expert."""
    active = [expert for expert, count in enumerate(totals) if count]
    counts, starts, end = [totals[expert] for expert in active], [], 0
    for count in counts:
        starts.append(end)
        end += count
    return active, counts, starts


def loop(
    module: Any,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    groups: Groups,
    waves: Iterable[Wave],
    views: Views,
    host: HostExperts | None = None,
) -> torch.Tensor:
    """Compute one product at a time, and sum in ascending expert order: the reference. For arguments see `Kernel`.

    Packed weights are decoded, one matrix at a time. Experts whose slot is HOST are computed on the CPU: the same
    product where the device is the CPU too, equal up to rounding elsewhere.
    """
    return one_by_one(module, hidden, weights, groups, waves, (views, host), multiplied)


def one_by_one(
    module: Any,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    groups: Groups,
    waves: Iterable[Wave],
    places: tuple[Views, HostExperts | None],
    multiply: Multiply,
) -> torch.Tensor:
    """Compute as `loop` does, with `multiply` for each product; `places` are the slots' views and the host's experts.

    Of one token nothing is gathered and nothing scattered: the row is multiplied as it is, and added to.
    """
    views, host = places
    one = hidden.shape[0] == 1
    if one:
        hidden, scales, ranks = hidden.contiguous(), weights.unbind(1), groups.ranks.tolist()
    else:
        groups = groups.on(hidden.device)
        gathered = weights[groups.tokens, groups.ranks, None]
    result = torch.zeros_like(hidden, dtype=sum_dtype(module, hidden.dtype, weights.dtype))
    held: dict[int, torch.Tensor] = {}  # by position, outputs that it is not yet the turn of
    turn = 0  # the position that is added next

    def weighed(position: int, outer: torch.Tensor) -> torch.Tensor:
        """Return an expert's outputs (pairs, H) as they are added."""
        outer, pairs = normed(module, outer), groups.pairs(position)
        if not one:
            return (outer * gathered[pairs]).to(result.dtype)
        chosen = ranks[pairs]
        scale = scales[chosen[0]] if len(chosen) == 1 else torch.stack([scales[rank] for rank in chosen])
        part = outer * scale
        # Added to a wider sum it is widened there, and to a narrower one it has to be rounded before.
        return part if part.dtype.itemsize <= result.dtype.itemsize else part.to(result.dtype)

    def add(position: int, part: torch.Tensor) -> None:
        if not one:
            result.index_add_(0, groups.tokens[groups.pairs(position)], part)
            return
        if len(part) == 1:
            result.add_(part)
        else:  # chosen twice: in bf16 `index_add_` rounds once, and not after each row
            result.index_add_(0, torch.zeros(len(part), dtype=torch.int64, device=part.device), part.to(result.dtype))

    def inputs(position: int) -> torch.Tensor:
        """Return the inputs (pairs, H) of an expert."""
        if not one:
            return hidden[groups.tokens[groups.pairs(position)]]
        return hidden if groups.counts[position] == 1 else hidden.repeat(groups.counts[position], 1)

    for wave in waves:
        for position, slot in wave:
            if slot == HOST:
                assert host is not None, "a strategy that computes on the CPU is given the rows there"
                host.submit(module, groups, position, multiply)
            else:
                held[position] = weighed(position, expert_output(module, inputs(position), slot, views, multiply))
        while turn in held:
            add(turn, held.pop(turn))
            turn += 1
    if host is not None:
        held.update((position, weighed(position, outer)) for position, outer in host.outputs(hidden.device))
    for position in sorted(held):
        add(position, held[position])
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

"""A fast CPU experts function for training small MoEs: sorted tokens, one matrix product per expert."""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS


class GroupedLinear(torch.autograd.Function):
    """y[i] = x[i] @ weight[group of i].T for rows sorted by group.

    x is (rows, in), weight (groups, out, in), ends the cumulative row counts as Python integers. Writing
    each product into its place saves copies: in training on one core 7,500 tokens/s, against 6,400 with the stock
    grouped_mm and 5,000 with eager (one run each, 4 batches of the recipe, a shared machine).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, ends: list[int]) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.ends = ends
        y = x.new_empty(x.shape[0], weight.shape[1])
        start = 0
        for group, end in enumerate(ends):
            if end > start:
                torch.mm(x[start:end], weight[group].T, out=y[start:end])
            start = end
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        start = 0
        for group, end in enumerate(ctx.ends):
            if end > start:
                torch.mm(grad[start:end], weight[group], out=grad_x[start:end])
                torch.mm(grad[start:end].T, x[start:end], out=grad_weight[group])
            start = end
        return grad_x, grad_weight, None


def training_experts(self: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return (tokens, H) from hidden (tokens, H), index and weights (tokens, K), differentiable in all but index."""
    pairs = index.flatten()
    order = pairs.argsort(stable=True)
    ends = pairs.bincount(minlength=self.num_experts).cumsum(0).tolist()
    tokens = order // index.shape[1]
    inner = self._apply_gate(GroupedLinear.apply(hidden[tokens], self.gate_up_proj, ends))
    outer = GroupedLinear.apply(inner, self.down_proj, ends) * weights.flatten()[order, None]
    return torch.zeros_like(hidden).index_add(0, tokens, outer)


def register() -> None:
    """Make the function available as the experts implementation named "training"."""
    ALL_EXPERTS_FUNCTIONS.register("training", training_experts)

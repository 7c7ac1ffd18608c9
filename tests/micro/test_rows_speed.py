"""What an expert of OLMoE-1B-7B costs in each row format: its products for one token, decoded first or in place, and
its packing. A row comes from memory each time: 16 of them take more than the processor's caches hold.
"""

from __future__ import annotations

from itertools import cycle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mobile.kernels.loop import expert_output, multiplied
from mobile.kernels.packed import _in_place
from mobile.store import format_named, layout_of

EXPERTS, HIDDEN, WIDTH = 16, 2048, 1024
SHAPES = {"gate_up_proj": (2 * WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
MODULE = SimpleNamespace(
    is_transposed=False,
    has_bias=False,
    has_gate=True,
    _apply_gate=lambda y: nn.functional.silu(y[..., :WIDTH]) * y[..., WIDTH:],
)


def rows_of(name: str) -> dict:
    """Views of rows in bfloat16, packed in that format."""
    torch.manual_seed(0)
    plain = layout_of({field: torch.empty(1, *shape, dtype=torch.bfloat16) for field, shape in SHAPES.items()})
    layout = plain.packed(format_named(name), transposed=False)
    views = layout.views(torch.zeros(EXPERTS, layout.numel, dtype=layout.dtype), layout.scratch(torch.device("cpu")))
    for field, shape in SHAPES.items():
        views[field].copy_(torch.randn(1, *shape, dtype=torch.bfloat16).mul_(0.02).expand(EXPERTS, -1, -1))
    return views


@pytest.mark.parametrize(
    ("rows", "kernel"), [("as-is", "loop"), ("int8", "loop"), ("int8", "packed"), ("int4", "loop")]
)
def test_an_experts_products_for_one_token(benchmark, rows, kernel):
    views, numbers, x = rows_of(rows), cycle(range(EXPERTS)), torch.randn(1, HIDDEN, dtype=torch.bfloat16)
    multiply = multiplied if kernel == "loop" else _in_place
    benchmark(lambda: expert_output(MODULE, x, next(numbers), views, multiply))


@pytest.mark.parametrize("rows", ["as-is", "int8", "int4"])
def test_a_row_is_copied_into_a_slot(benchmark, rows):
    plain = layout_of({field: torch.empty(1, *shape, dtype=torch.bfloat16) for field, shape in SHAPES.items()})
    layout = plain.packed(format_named(rows), transposed=False)
    store, numbers = torch.ones(EXPERTS, layout.numel, dtype=layout.dtype), cycle(range(EXPERTS))
    slots = torch.zeros_like(store)
    benchmark.extra_info["nbytes"] = layout.nbytes

    def copy() -> None:
        number = next(numbers)
        slots[number].copy_(store[number])

    benchmark(copy)


@pytest.mark.parametrize("rows", ["int8", "int4"])
def test_an_expert_is_packed(benchmark, rows):
    views = rows_of(rows)
    weights = {field: torch.randn(*shape, dtype=torch.bfloat16) for field, shape in SHAPES.items()}

    def pack() -> None:
        for field, weight in weights.items():
            views[field].pack(0, weight)

    benchmark.pedantic(pack, rounds=10, iterations=1, warmup_rounds=1)

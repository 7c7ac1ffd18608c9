"""Kernels of a decode step, timed: reading a matrix, computing experts, a large product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mobile.costs.cost_model import EXPERT_LAUNCHES
from mobile.kernels import kernel_named
from mobile.kernels.loop import expert_output, group
from mobile.live_model import compat
from mobile.machine.fit_profile import Timing
from mobile.machine.measure.random_model import random_model
from mobile.machine.measure.sizes import Sizes
from mobile.machine.measure.timing import seconds_of
from mobile.store import layout_of


@torch.no_grad()
def time_kernels(
    device: torch.device, dtype: torch.dtype, sizes: Sizes
) -> tuple[tuple[Timing, ...], tuple[Timing, ...]]:
    """Return the times of one token (1, hidden) by matrices, and of one expert in a wave of top-k experts.

    Experts are computed by the default kernel. All are timed in turn, on weights that no cache holds.
    """
    token = torch.ones(1, sizes.hidden, dtype=dtype, device=device)

    def read_matrix(pool: torch.Tensor) -> Callable[[int], Any]:
        return lambda number: nn.functional.linear(token, pool[number % len(pool)])

    jobs, matrices, rows = [], [], []  # bytes of each matrix and of each row, in the order of the jobs
    for nbytes in sizes.reads_nbytes:
        height = nbytes // dtype.itemsize // sizes.hidden
        shape = max(2, sizes.pool_nbytes // nbytes), height, sizes.hidden
        jobs.append(read_matrix(torch.ones(shape, dtype=dtype, device=device)))
        matrices.append(height * sizes.hidden * dtype.itemsize)
    for width in sizes.widths:
        run, nbytes = wave_of_experts(width, device, dtype, sizes)
        jobs.append(run)
        rows.append(nbytes)
    seconds = seconds_of(device, jobs, sizes)
    of_matrices, of_experts = seconds[: len(matrices)], seconds[len(matrices) :]
    return (
        tuple(Timing(nbytes, 1, t) for nbytes, t in zip(matrices, of_matrices, strict=True)),
        tuple(Timing(nbytes, EXPERT_LAUNCHES, t / sizes.top_k) for nbytes, t in zip(rows, of_experts, strict=True)),
    )


def wave_of_experts(
    width: int, device: torch.device, dtype: torch.dtype, sizes: Sizes
) -> tuple[Callable[[int], Any], int]:
    """Return a job that computes one token by top-k experts of that width, and the bytes of one of them.

    It is the wave of a decode step: the experts have equal weights, and each run takes the next ones of a pool.
    """
    module, kernel, k = _experts_module(dtype), kernel_named("auto", device, dtype), sizes.top_k
    views, slots, nbytes = _rows(width, device, dtype, sizes)
    token, each = torch.ones(1, sizes.hidden, dtype=dtype, device=device), list(range(k))
    groups = group(torch.arange(k, device="cpu")[None], k)  # as a decode step has it: known to the host
    weights = torch.full((1, k), 1 / k, dtype=dtype, device=device)

    def run(number: int) -> None:
        wave = [(position, (number * k + position) % slots) for position in each]
        kernel(module, token, weights, groups, [wave], views)

    return run, nbytes


@torch.no_grad()
def time_host_experts(dtype: torch.dtype, sizes: Sizes) -> tuple[Timing, ...]:
    """Return the times of one expert of one token on the processor, from rows in host memory."""
    cpu, module = torch.device("cpu"), _experts_module(dtype)
    hidden = torch.ones(1, sizes.hidden, dtype=dtype)

    def run_expert(views: Any, slots: int) -> Callable[[int], Any]:
        return lambda number: expert_output(module, hidden, number % slots, views)

    rows = [_rows(width, cpu, dtype, sizes) for width in sizes.widths]
    seconds = seconds_of(cpu, [run_expert(views, slots) for views, slots, _ in rows], sizes)
    return tuple(Timing(nbytes, EXPERT_LAUNCHES, t) for (_, _, nbytes), t in zip(rows, seconds, strict=True))


def matmul_tflops(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> float:
    """Return the rate of a large square product, in TFLOP/s."""
    side = sizes.matmul
    a = torch.ones(side, side, dtype=dtype, device=device)
    return 2 * side**3 / seconds_of(device, [lambda number: a @ a], sizes)[0] / 1e12


def _rows(width: int, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> tuple[dict, int, int]:
    """Return experts of that width in rows as the engine lays them out: views, how many rows, and bytes of one."""
    shapes = {"gate_up_proj": (2 * width, sizes.hidden), "down_proj": (sizes.hidden, width)}
    layout = layout_of({name: torch.empty(1, *shape, dtype=dtype, device="meta") for name, shape in shapes.items()})
    slots = max(sizes.top_k, sizes.pool_nbytes // layout.nbytes)
    return layout.views(torch.ones(slots, layout.numel, dtype=dtype, device=device)), slots, layout.nbytes


def _experts_module(dtype: torch.dtype) -> Any:
    """Return an experts module of a model: kernels read from it how an expert is computed, and none of its weights."""
    return compat.moe_layers(random_model(torch.device("cpu"), dtype, 1, 64, 32, 4, 2))[0].experts

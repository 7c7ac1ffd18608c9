"""The decode kernel: matrix times vector with the weights read in place from their slots, by Triton."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction

from mobile.kernels.loop import Groups, HostExperts, Views, activate, loop, normed, up_name
from mobile.residency.residency import Wave
from mobile.store import plain
from mobile.transfer import send

FEW_TOKENS = 8  # above it each weight would be read once a token; the loop reads it once an expert
BLOCK_N, BLOCK_K = 16, 256


@triton.jit
def _products(
    w,
    x,
    y,
    slots,
    rows,
    n_total,
    k_total,
    w_slot,
    w_n,
    w_k,
    x_row,
    y_pair,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute y[pair] = W[slots[pair]] @ x[rows[pair]], summed in fp32; one program a pair and BLOCK_N outputs."""
    pair = tl.program_id(0)
    slot = tl.load(slots + pair).to(tl.int64)
    row = tl.load(rows + pair).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, k_total, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (n[:, None] < n_total) & (k[None, :] < k_total)
        weight = tl.load(w + slot * w_slot + n[:, None] * w_n + k[None, :] * w_k, mask=inside, other=0.0)
        value = tl.load(x + row * x_row + k, mask=k < k_total, other=0.0)
        total += tl.sum(weight.to(tl.float32) * value.to(tl.float32)[None, :], axis=1)
    tl.store(y + pair * y_pair + n, total.to(y.dtype.element_ty), mask=n < n_total)


def why_not(device: torch.device) -> str | None:
    """Return why Triton compiles nothing for this device, in words; None where it does, or where it is interpreted."""
    if isinstance(_products, InterpretedFunction):
        return None
    if device.type != "cuda":
        return "Triton compiles for GPUs only"
    try:
        target = driver.active.get_current_target()
    except Exception as error:  # no driver of its own, none that works, or no C compiler to build it with
        words = str(error).splitlines() or [type(error).__name__]
        return f"Triton has no working driver ({words[0].rstrip('.')})"
    if target.backend not in ("cuda", "hip"):
        return f"Triton's driver is for {target.backend}"
    try:
        one = torch.zeros(1, dtype=torch.int64, device=device)
        with torch.cuda.device(device):
            products(torch.zeros(1, 1, 1, device=device), one, torch.zeros(1, 1, device=device), one, transposed=False)
    except Exception as error:  # a kernel's launcher needs a C compiler, too, and the card may be one it does not know
        words = str(error).splitlines() or [type(error).__name__]
        return f"Triton compiles no kernel here ({words[0].rstrip('.')})"
    return None


def products(
    weights: torch.Tensor, slots: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, *, transposed: bool
) -> torch.Tensor:
    """Multiply for each pair a slot's matrix with a row: W[slots] @ x[rows], (pairs, N).

    weights (slots, N, K), or (slots, K, N) where `transposed`; x (rows, K), of unit stride in K. `slots` and `rows`
    (pairs,) say which weight and which input each pair takes.
    """
    if transposed:
        weights = weights.transpose(1, 2)
    n, k = weights.shape[1:]
    y = torch.empty(len(slots), n, dtype=x.dtype, device=x.device)
    _products[len(slots), triton.cdiv(n, BLOCK_N)](
        weights, x, y, slots, rows, n, k, *weights.stride(), x.stride(0), y.stride(0), BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K
    )
    return y


def triton_gemv(
    module: Any,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    groups: Groups,
    waves: Iterable[Wave],
    views: Views,
    _host: HostExperts | None = None,
) -> torch.Tensor:
    """Compute a decode step in two launches a wave; leave wider steps to `loop`. For arguments see `Kernel`.

    Equal to it up to rounding: within 1e-5 of the largest output in fp32, 2e-2 in bf16. Each pair is computed alone
    and pairs are summed by rank in fp32, so no output depends on what was resident.
    """
    if hidden.shape[0] > FEW_TOKENS:
        return loop(module, hidden, weights, groups, waves, views)
    with torch.cuda.device_of(hidden):  # Triton launches on the current device, whichever its arguments lie on
        return _few(module, hidden, weights, groups, waves, views)


def _few(
    module: Any, hidden: torch.Tensor, weights: torch.Tensor, groups: Groups, waves: Iterable[Wave], views: Views
) -> torch.Tensor:
    """Compute no more than FEW_TOKENS tokens, on the current device."""
    device = hidden.device
    hidden = hidden.contiguous()
    parts = torch.zeros(*weights.shape, hidden.shape[1], dtype=torch.float32, device=device)
    of_token, of_rank = groups.tokens.numpy(), groups.ranks.numpy()  # in host memory, being so few
    for wave in waves:
        # All indices of a wave go over in one copy: where its pairs are, and their slots, tokens and ranks.
        pairs = np.concatenate([np.arange(*groups.pairs(position).indices(len(of_token))) for position, _ in wave])
        of_slot = np.repeat([slot for _, slot in wave], [groups.counts[position] for position, _ in wave])
        indices = np.stack([of_slot, of_token[pairs], of_rank[pairs], np.arange(len(pairs))])
        slots, tokens, ranks, each = send(indices, device)

        def project(x: torch.Tensor, rows: torch.Tensor, name: str, slots: torch.Tensor = slots) -> torch.Tensor:
            y = products(plain(views[name]), slots, x, rows, transposed=module.is_transposed)
            return y + plain(views[f"{name}_bias"])[slots] if module.has_bias else y

        inner = activate(module, project(hidden, tokens, up_name(module))).contiguous()
        outer = normed(module, project(inner, each, "down_proj"))
        parts[tokens, ranks] = outer.float() * weights[tokens, ranks, None].float()
    return parts.sum(1).to(hidden.dtype)

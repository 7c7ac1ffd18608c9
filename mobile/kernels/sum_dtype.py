"""The precision in which a class of experts sums: that of the hidden states in most, fp32 in some.

Transformers says it nowhere but in each class's own eager forward, so that is tried.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from mobile.live_model.compat import NORM, weight_names

TRIED = 65  # experts in a trial
_found: dict[tuple[type, torch.dtype, torch.dtype], torch.dtype] = {}


def sum_dtype(experts: Any, hidden: torch.dtype, weights: torch.dtype) -> torch.dtype:
    """Return the dtype in which the module's eager forward sums its experts, for hidden states and weights of these.

    Found once for each class. One whose forward cannot be tried is taken to do as most do.
    """
    if hidden.itemsize >= torch.float32.itemsize:
        return hidden
    key = type(experts), hidden, weights
    if key not in _found:
        try:
            _found[key] = torch.float32 if _sums_wide(experts, hidden, weights) else hidden
        except Exception:  # its own code may raise anything at widths that it does not expect
            _found[key] = hidden
    return _found[key]


@torch.no_grad()
def _sums_wide(experts: Any, dtype: torch.dtype, weights: torch.dtype) -> bool:
    """Try its forward on one token and equal experts of width 1, the first of weight 1, the others of eps / 8.

    Each of these is lost in a sum of that precision, and all of them together are not in a wider one.
    """
    device, wide = experts.down_proj.device, 2 if experts.has_gate else 1
    up = weight_names(experts)[0]
    shapes = {up: (1, wide) if experts.is_transposed else (wide, 1), f"{up}_bias": (wide,), "down_proj": (1, 1)}
    small = object.__new__(type(experts))
    vars(small).update(vars(experts), num_experts=TRIED)
    vars(small)["_parameters"] = {
        name: torch.ones(TRIED, *shapes.get(name, (1,)), dtype=dtype, device=device) for name in weight_names(experts)
    }
    vars(small)["_modules"] = {name: nn.Identity() if name == NORM else part for name, part in experts._modules.items()}
    scales = torch.full((1, TRIED), torch.finfo(dtype).eps / 8, dtype=weights, device=device)
    scales[0, 0] = 1
    index, one = torch.arange(TRIED, device=device)[None], torch.ones(1, 1, dtype=dtype, device=device)
    eager = inspect.unwrap(type(experts).forward)
    return not torch.equal(eager(small, one, index, scales), eager(small, one, index[:, :1], scales[:, :1]))

"""Expert kernels: what computes one layer's routed experts from their slots.

A kernel takes one layer's tokens and computes wave by wave, as experts become ready in their slots. Whatever the order
of the waves, contributions are summed in one order, so that no output depends on what was resident.
"""

from __future__ import annotations

import torch

from mobile.errors import Refused
from mobile.kernels.loop import Kernel, group, loop
from mobile.suggest import offer

__all__ = ["Kernel", "group", "kernel_named", "loop"]

KERNELS = ("auto", "loop", "grouped", "triton")


def kernel_named(name: str, device: torch.device, dtype: torch.dtype) -> Kernel:
    """Return the kernel of that name: "loop", "grouped" or "triton"; "auto" is the loop.

    Raises Refused for one that is unknown, cannot run on this device, or would not be a true kernel there.
    """
    if name in ("auto", "loop"):
        return loop
    if name == "grouped":
        from mobile.kernels.grouped import grouped

        if device.type == "cuda" and (
            dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) not in ((9, 0), (10, 0))
        ):
            raise Refused("Kernel grouped is one product only in bf16 on compute capability 9.0 and 10.0; use loop.")
        return grouped
    if name == "triton":
        try:
            from mobile.kernels.triton_gemv import triton_gemv, why_not
        except ImportError as error:
            raise Refused("Kernel triton needs the package triton; install it, or use the kernel loop.") from error
        reason = why_not(device)
        if reason is not None:
            raise Refused(f"Kernel triton cannot run on {device}: {reason}; use the kernel loop.")
        return triton_gemv
    raise Refused(f"Unknown kernel {name!r}; {offer(name, KERNELS, 'choose auto, loop, grouped or triton')}.")

"""Expert kernels: functions that compute one layer's routed experts from their slots.

A kernel takes one layer's tokens and computes wave by wave, as experts become ready in their slots. In whatever order
the waves come, contributions are summed in one order, so that no output depends on which experts were resident.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch

from mobile.costs.rows import AS_IS
from mobile.errors import Refused
from mobile.kernels.loop import Groups, HostExperts, Views, group, loop
from mobile.kernels.packed import packed
from mobile.kernels.packed import why_not as why_not_packed
from mobile.residency.residency import Wave
from mobile.suggest import offer

__all__ = ["Kernel", "group", "kernel_named", "loop", "packed"]


class Kernel(Protocol):
    """A function that computes the routed experts of one layer."""

    def __call__(
        self,
        module: Any,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        groups: Groups,
        waves: Iterable[Wave],
        views: Views,
        host: HostExperts | None = None,
        /,
    ) -> torch.Tensor:
        """Return the weighted sum of expert outputs, (tokens, H), in the dtype of `hidden`.

        - `module`: the experts module of Transformers. Only its flags, its activation and its shared norm are used; its
          own weights are empty.
        - `hidden` (tokens, H) and `weights` (tokens, K), the router's weights of the chosen experts.
        - `groups`: the (token, expert) pairs by expert, see `group`.
        - `waves`: lists of (position in `groups.experts`, slot). Taking the next wave makes its experts ready, and lets
          go of the slots of the one before: a wave must be launched before the next is asked for.
        - `views`: weights by name, (slots, ...): views of the slots.
        - `host`: the layer's experts in host memory, where a strategy leaves experts to the CPU, which have the slot
          HOST; only `loop` and `packed` have those computed.
        """
        ...


KERNELS = ("auto", "loop", "grouped", "triton", "packed")


def kernel_named(name: str, device: torch.device, dtype: torch.dtype, rows: str = AS_IS) -> Kernel:
    """Return the kernel of that name for weights of that dtype: "loop", "grouped", "triton" or "packed".

    `rows` is the format of their rows, which "loop" decodes and "packed" computes with as they are. "auto" is the loop,
    but for rows that are made to be computed with. Raise Refused for one that is unknown, cannot run on this device, or
    would not be a true kernel there.
    """
    if rows == "int4-cpu" and device.type != "cpu":
        raise Refused(f"Rows of int4-cpu are in a processor's own order, and the model is on {device}; use int4.")
    if name == "auto":
        return packed if rows == "int4-cpu" else loop
    if name == "loop":
        return loop
    if name == "packed":
        reason = why_not_packed(device, dtype, rows)
        if reason is not None:
            raise Refused(f"Kernel packed computes with codes in place, and {reason}; use the kernel loop.")
        return packed
    if name in KERNELS and rows != AS_IS:
        raise Refused(f"Kernel {name} reads weights as they are, and rows are {rows}; use the kernel loop.")
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
    listed = "choose auto, loop, grouped or triton, or packed for int8 and int4-cpu rows"
    raise Refused(f"Unknown kernel {name!r}; {offer(name, KERNELS, listed)}.")

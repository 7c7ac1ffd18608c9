"""Host memory page-locked where it lies (`cudaHostRegister`), so that a GPU reads it without the processor's help.

PyTorch's own pinned allocator would round each block up to a power of two.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

Lock = weakref.finalize  # called, it unregisters its block; it does so by itself before its block is freed


def page_lock(blocks: Sequence[torch.Tensor], device: torch.device, locks: list[Lock]) -> None:
    """Register those of these blocks of host memory that are not registered yet, and add a lock for each to `locks`.

    Where the driver refuses one, none of `locks` is left, and a RuntimeWarning says so once: copies from ordinary
    memory are as exact, and slower.
    """
    for block in blocks:
        if block.numel() == 0 or block.is_pinned():
            continue
        locks.append(Lock(block, unregister, block.data_ptr(), device))  # before, should an interrupt come between
        locks[-1].atexit = False  # the system takes it all back then
        refused = register(block, device)
        if refused is None:
            continue
        locks.pop().detach()
        unlock(locks)
        warnings.warn(
            f"CUDA does not page-lock the experts' host memory here ({refused}): they are copied from ordinary memory, "
            "which gives the same tokens, more slowly. WSL2 and some sandboxes allow little or none of it; elsewhere, "
            "free host memory.",
            RuntimeWarning,
            stacklevel=1,  # of one place, so that it is said once
        )
        return


def unlock(locks: list[Lock]) -> None:
    """Undo what is left of these."""
    while locks:
        locks.pop()()


def register(block: torch.Tensor, device: torch.device) -> str | None:
    """Page-lock one block where it lies. Return the driver's reason if it will not; no error is left behind then."""
    runtime: Any = torch.cuda.cudart()
    with torch.cuda.device(device):  # on another one it would make a context, of some hundred MB
        failed = runtime.cudaHostRegister(block.data_ptr(), block.nbytes, 0)
    if not int(failed):
        return None
    _clear_error(device)
    return f"error {int(failed)}, {runtime.cudaGetErrorString(failed)}"


def unregister(address: int, device: torch.device) -> None:
    """Undo `register` of the block at this address, once no copy reads it any more."""
    runtime: Any = torch.cuda.cudart()
    try:
        torch.cuda.synchronize(device)
    finally:
        with torch.cuda.device(device):
            failed = runtime.cudaHostUnregister(address)
        if int(failed):
            _clear_error(device)


def _clear_error(device: torch.device) -> None:
    """Launch a kernel, and drop what it raises: a failed call stays behind as CUDA's last error until one does."""
    with suppress(RuntimeError):
        torch.zeros(1, device=device)

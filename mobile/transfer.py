"""Small tensors between device and host memory: many brought over in one wait, and sent without one.

All that a decode step reads of the device goes through `read` or `Reading`, and all that it sends through `send`, so
that where the host waits can be counted. Both use page-locked memory of PyTorch's own pool, which gives no block out
again before the copies that use it are over.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


class Reading:
    """Tensors of one device on their way to host memory. Nothing waits until `get` is called."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        """Begin to copy them, behind what was launched so far."""
        # A CPU has nothing to wait for, and devices other than CUDA ones are read at once.
        self._host = [tensor.to("cpu", non_blocking=tensor.device.type in ("cpu", "cuda")) for tensor in tensors]
        device = next((tensor.device for tensor in tensors if tensor.device.type == "cuda"), None)
        self._over: torch.cuda.Event | None = None
        if device is not None:
            self._over = torch.cuda.Event()
            self._over.record(torch.cuda.current_stream(device))

    def get(self) -> list[torch.Tensor]:
        """Return the tensors in host memory; wait until they are there."""
        wait(self)
        return self._host


def wait(reading: Reading) -> None:
    """Wait until the copies are over, and with them all that was launched before: the one place where a step waits."""
    if reading._over is not None:
        reading._over.synchronize()


def read(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return tensors of one device in host memory, in one wait for all. Those that lie there are given as they are."""
    return Reading(tensors).get()


def send(values: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return values of host memory on a device, in one copy that nothing waits for."""
    host = torch.as_tensor(values, device="cpu")
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)

"""Experts computed where they lie, by the CPU: beside a GPU on a thread of its own, else on the thread that asks.

PyTorch's products let go of the interpreter, so the thread that launches work on the GPU and begins copies goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from mobile.kernels.loop import Groups, Multiply, Views, expert_output
from mobile.links.threads import Job, Threads
from mobile.transfer import Reading, send


def beside(device: torch.device) -> bool:
    """Return whether experts are computed on another thread than the one that runs the model on `device`.

    On a CPU the two would take the same cores.
    """
    return device.type != "cpu"


class CpuExperts:
    """The CPU of one engine as it computes experts, one at a time, in the order they are submitted."""

    def __init__(self, device: torch.device) -> None:
        self._threads = Threads("mobile-experts") if beside(device) else None
        self._waiting: deque[Job] = deque()
        self._after_each: Callable[[], None] = _nothing

    def after_each(self, call: Callable[[], None]) -> None:
        """Have this called after each expert, on the thread that computes or waits for the layer."""
        self._after_each = call

    def submit(self, compute: Callable[[], None]) -> None:
        """Have it computed: now, or on the thread, in the modes and with as many threads as are set here."""
        if self._threads is None:
            compute()
            self._after_each()
            return
        job = Job(partial(_as_set, compute, torch.get_num_threads(), torch.is_inference_mode_enabled(), _autocast()))
        self._threads.add(job)  # first: what is waited for is sure to be made, should Ctrl-C come between
        self._waiting.append(job)

    def join(self) -> None:
        """Wait until all that was submitted is computed. Raise what one of them raised, once all are over."""
        error = None
        while self._waiting:
            job = self._waiting[0]
            job.wait()
            self._waiting.popleft()
            error = error or job.error
            if error is None:
                self._after_each()
        if error is not None:
            raise error

    def reset(self) -> None:
        """Wait until nothing is computed, whatever came of it: then no row is read."""
        while self._waiting:
            self._waiting[0].wait()
            self._waiting.popleft()

    def close(self) -> None:
        """Reset, and end the thread."""
        self.reset()
        if self._threads is not None:
            self._threads.close()


@dataclass
class LayerOnHost:
    """One layer's experts in host memory: `views` of their rows, and the layer's tokens on their way there.

    `reading` brings the hidden states (tokens, H), and the token of each pair of the layer's groups.
    """

    experts: CpuExperts
    views: Views
    reading: Reading
    _outputs: list[list[Any]] = field(default_factory=list)  # position, and what it gives once it is computed

    def submit(self, module: Any, groups: Groups, position: int, multiply: Multiply) -> None:
        """See `mobile.kernels.loop.HostExperts`."""
        hidden, tokens = self.reading.get()
        given, expert, views = hidden[tokens[groups.pairs(position)]], groups.experts[position], self.views
        entry: list[Any] = [position, None]
        self._outputs.append(entry)

        def compute() -> None:
            entry[1] = expert_output(module, given, expert, views, multiply)

        self.experts.submit(compute)

    def outputs(self, device: torch.device) -> Iterable[tuple[int, torch.Tensor]]:
        """See `mobile.kernels.loop.HostExperts`. All of them are sent in one copy."""
        if not self._outputs:
            return []
        self.experts.join()
        positions, parts = zip(*self._outputs, strict=True)
        sent = send(torch.cat(parts), device).split([len(part) for part in parts])
        return list(zip(positions, sent, strict=True))


def _nothing() -> None:
    """Do nothing."""


def _autocast() -> torch.dtype | None:
    """Return the dtype of autocast on the CPU, None where it is off."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


def _as_set(compute: Callable[[], None], threads: int, inference: bool, autocast: torch.dtype | None) -> None:
    """Compute on this thread as the one that submitted it would: modes and the number of threads are a thread's own."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(inference) if inference else torch.no_grad())
        if autocast is not None:
            modes.enter_context(torch.autocast("cpu", autocast))
        compute()

"""The steps of one attached model, one at a time: a step that breaks off leaves nothing to be trusted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from typing import Any, Protocol

import torch

_under_way: ContextVar[tuple[Steps, ...]] = ContextVar("mobile_steps_under_way", default=())


class Stepping(Protocol):
    """The engine whose steps these are."""

    def begin_cold(self) -> None:
        """Empty what the step before may have left in any state."""

    def end_step(self) -> None:
        """Close a step that came to its end."""

    def break_off(self, error: BaseException) -> None:
        """Close what the step had open when this error ended it."""


class Steps:
    """All that calls of the model do, each alone on its engine, and without gradients.

    Threads take turns (`lock`), so that each gets what it would get alone.
    """

    def __init__(self, engine: Stepping) -> None:
        self.lock = threading.RLock()
        self._engine = engine
        self._broken = False  # whether a step was broken off, and the slots may hold anything

    def run(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Run one call as a step, or as a part of the step that it is called in.

        (That it is inside of one is known by its context, which ends with the call whatever ends that.)
        """
        if self in _under_way.get():
            return call(*arguments)
        gradients = torch.is_grad_enabled()
        try:
            return copy_context().run(self._alone, call, arguments)
        except BaseException:
            torch.set_grad_enabled(gradients)  # where Ctrl-C came on the line that does it below
            raise

    def _alone(self, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """Run it under the lock. If anything breaks it off (a failing copy, Ctrl-C), the next step starts cold.

        Whatever it had opened is closed here and nowhere else, since Ctrl-C may come after a context was entered and
        before its `with` block knows.
        """
        _under_way.set((*_under_way.get(), self))
        with self.lock:
            if self._broken:
                self._engine.begin_cold()
            self._broken = True  # until the step is over: also where an interrupt leaves the handler below
            gradients = torch.is_grad_enabled()
            try:
                torch.set_grad_enabled(False)  # slots are written to again and again, so none could be computed
                result = call(*arguments)
                self._engine.end_step()
            except BaseException as error:
                self._engine.break_off(error)
                raise
            finally:
                torch.set_grad_enabled(gradients)
            self._broken = False
            return result

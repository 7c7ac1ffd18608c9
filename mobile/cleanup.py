"""Putting things back however a piece of work ends, with Ctrl-C at any of its lines as well."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar

T = TypeVar("T")


class Cleanup:
    """Steps to be taken when the work is over, the last one first. Each must do no harm when it is taken twice."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def add(self, step: Callable[[], object]) -> None:
        """Take this step at the end. Add it before the change that it undoes."""
        self._steps.append(step)

    def run(self) -> None:
        """Take all steps, even if one of them raises."""
        with ExitStack() as stack:
            for step in self._steps:
                stack.callback(step)


def with_cleanup(work: Callable[[Cleanup], T]) -> T:
    """Do the work, then take the steps that it added.

    Twice: an interrupt may fall into the first time, where a single `finally` or `with` would leave the rest undone.
    """
    cleanup = Cleanup()
    try:
        try:
            return work(cleanup)
        finally:
            cleanup.run()
    finally:
        cleanup.run()

"""Cleanup that runs however a piece of work ends, also with Ctrl-C at any of its lines."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeAlias, TypeVar

T = TypeVar("T")
Cleanup: TypeAlias = list[Callable[[], object]]


def with_cleanup(work: Callable[[Cleanup], T]) -> T:
    """Do the work, then take the steps that it appended to its list, the last one first.

    A step is appended before the change that it undoes, or in the same line, and does no harm where it is taken twice.
    For they are taken twice: an interrupt may fall into the first time, where a single `finally` or `with` would leave
    the rest undone.
    """
    cleanup: Cleanup = []
    try:
        try:
            return work(cleanup)
        finally:
            _take(cleanup)
    finally:
        _take(cleanup)


def _take(steps: Cleanup) -> None:
    """Take all steps, even if one of them raises."""
    with ExitStack() as stack:
        for step in steps:
            stack.callback(step)

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
    For the one that an interrupt falls into is taken again, and so are those after it taken: a single `finally` or
    `with` would leave them undone. A step that was taken is not taken again once a later one was, which may have let
    another thread in.
    """
    cleanup: Cleanup = []
    try:
        try:
            return work(cleanup)
        finally:
            while cleanup:
                cleanup[-1]()
                cleanup.pop()  # only now: broken off between these lines, it is taken again
    finally:
        with ExitStack() as rest:  # takes all that is left, even if one of them raises
            for step in cleanup:
                rest.callback(step)

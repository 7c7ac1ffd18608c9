"""Attributes and hooks put on a live model from outside, each of which can be taken back at any moment."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

MISSING = object()


class Overrides:
    """Instance attributes that stand in for others, and hooks; `undo` may be called at any moment, and again.

    How to undo a thing is noted before it is done, and forgotten only after it is undone: an interrupt between the two
    (Ctrl-C may come at any line) makes something be undone twice at most, which changes nothing.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute on this very object, in place of its class's."""
        self._undo.append(partial(_put_back, owner, name, vars(owner).get(name, MISSING)))
        setattr(owner, name, value)

    def hook(self, register: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        """Register a hook by PyTorch's `register`, which returns a handle."""
        handles: list[Any] = []
        self._undo.append(partial(_remove, handles))
        handles.append(register(*arguments, **named))

    def __len__(self) -> int:
        return len(self._undo)

    def undo(self, down_to: int = 0) -> None:
        """Undo the newest first, until `down_to` are left."""
        while len(self._undo) > down_to:
            self._undo[-1]()
            self._undo.pop()


def _put_back(owner: Any, name: str, before: Any) -> None:
    if before is not MISSING:
        setattr(owner, name, before)
    elif name in vars(owner):
        delattr(owner, name)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()

"""Ctrl-C at a chosen line of the engine's own code: repeatable, unlike an alarm."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import mobile

ENGINE_FILES = str(Path(mobile.__file__).parent)


class Interrupt:
    """A trace function that presses Ctrl-C at the n-th line, call or return of the engine's own code.

    Returns count as well, since a context manager entered and not yet known to be entered is where cleaning up fails.
    """

    def __init__(
        self,
        at: int = 0,
        only: tuple[str, ...] = (),
        events: tuple[str, ...] = (),
        beside: tuple[str, ...] = ("contextlib.py", "threading.py"),
    ) -> None:
        """`only` some functions or `events`; the lines of Python's own files `beside` the engine's count as well."""
        self.at, self.only, self.events, self.beside = at, only, events, beside
        self.seen, self.where = 0, ""
        self.passed: dict[tuple[str, str, int], list[int]] = {}  # by event, file and line: when it was passed

    def __call__(self, frame, event: str, _argument: object):
        name = frame.f_code.co_filename
        if not (name.startswith(ENGINE_FILES) or name.endswith(self.beside)):
            return None
        if (self.only and frame.f_code.co_name not in self.only) or (self.events and event not in self.events):
            return self
        self.seen += 1
        self.passed.setdefault((event, name, frame.f_lineno), []).append(self.seen)
        if self.seen == self.at:
            self.where = f"{event} at {name}:{frame.f_lineno}"
            raise KeyboardInterrupt
        return self

    @property
    def every_line(self) -> list[int]:
        """When each line was passed for the first time and for the last."""
        return sorted({at for passed in self.passed.values() for at in (passed[0], passed[-1])})

    def during(self, action: Callable[[], object]) -> None:
        """Run that, and be pressed in it."""
        sys.settrace(self)
        try:
            action()
        finally:
            sys.settrace(None)

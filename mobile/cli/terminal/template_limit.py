"""A bound on a chat template, which is a program of the checkpoint: on the steps it runs and the text it writes.

Jinja's sandbox keeps it from files and from Python's inside, but nested loops would run for years. A single step, such
as the repetition of a text, can still take as much memory as there is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

MOST_STEPS = 2_000_000  # lines and calls of Python, some seconds of them; a long conversation takes thousands
MOST_CHARACTERS = 10_000_000  # written by it in all


class TemplateRunsOn(Exception):
    """A template that runs or writes without an end in sight."""


class _Stop(BaseException):
    """Its cause, on the way out: Jinja tries constant expressions when it compiles, and passes over an Exception."""


def bounded(render: Callable[[], T]) -> T:
    """Return `render()`. Raise TemplateRunsOn once Jinja's code in it has run too many steps, or written too much.

    Only this thread's code is counted, by Python's own trace function, which debuggers use, too: it is put back.
    """
    steps = characters = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps, characters
        steps += event in ("line", "call")
        characters += len(argument) if event == "return" and isinstance(argument, str) else 0
        if steps > MOST_STEPS or characters > MOST_CHARACTERS:
            raise _Stop
        return trace if event != "call" or _is_of_jinja(frame) else None

    before = sys.gettrace()
    try:
        sys.settrace(trace)
        return render()
    except _Stop:
        raise TemplateRunsOn("it does not come to an end") from None
    finally:
        sys.settrace(before)


def _is_of_jinja(frame: FrameType) -> bool:
    """Return whether it runs a template, Jinja's own code, such as a filter, or what that calls, which is traced."""
    module, caller = frame.f_globals.get("__name__"), frame.f_back
    jinja = isinstance(module, str) and module.startswith("jinja2.")
    return jinja or frame.f_code.co_filename == "<template>" or (caller is not None and caller.f_trace is not None)

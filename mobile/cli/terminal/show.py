"""The output of the commands: tables and JSON on stdout, everything else on stderr, colours only on a terminal.

Streams may be closed or full; notes on stderr are then lost, and a lost result is an error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.segment import Segment
from rich.table import Table

from mobile.errors import Refused
from mobile.visible import on_one_line, visible

GIB, MIB, GB = 2**30, 2**20, 10**9


@dataclass(frozen=True)
class Visible:
    """Something to print, with the control characters in its text made visible; the console's own codes stay."""

    inner: ConsoleRenderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Segment]:
        for segment in console.render(self.inner, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


class ForeignText(RenderHook):
    """A hook that makes all that a console prints visible: names and errors come from anyone."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [Visible(each) for each in renderables]


def console(*, stderr: bool = False, soft_wrap: bool | None = None) -> Console:
    """Return a console on stdout or stderr, for foreign text: it reads neither markup nor emoji codes nor escapes.

    Lines are wrapped on a terminal only (`soft_wrap` None), nowhere (True), or everywhere (False).
    """
    stream = sys.stderr if stderr else sys.stdout
    terminal = stream.isatty()
    made = Console(
        file=stream,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=not terminal if soft_wrap is None else soft_wrap,
        width=None if terminal else 160,
    )
    made.push_render_hook(ForeignText())
    return made


def prepare() -> None:
    """Make the standard streams usable. Raise Refused if stdout is closed, since the result would be lost.

    Python has None for a stream that is closed, and its file descriptor would go to the next file that is opened.
    Characters that the encoding of stdout lacks are escaped.
    """
    closed = sys.stdout is None
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (it is open as long as the process)
    if closed:
        raise Refused("Standard output is closed; send it to a file, or to /dev/null.")
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) != "backslashreplace" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def silence(stream: Any) -> None:
    """Send the rest of a stream that cannot be written to /dev/null: Python would report the error again at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def note(text: str) -> None:
    """Print a line on stderr; control characters and bytes that are no text are escaped."""
    try:
        print(visible(text), file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def error(refused: object) -> None:
    """Print why something was refused, as one line on stderr."""
    note(f"error: {on_one_line(str(refused))}")


def waiting(text: str) -> None:
    """Print one line if stderr is a terminal, before silent work that takes long, such as importing PyTorch."""
    if sys.stderr.isatty():
        note(text)


def as_json(content: dict[str, Any]) -> None:
    """Print the one JSON object of --json."""
    print(json.dumps(content, indent=2, allow_nan=False))


def table(title: str, *columns: str) -> Table:
    """Return a table whose first column is text and whose others are numbers."""
    empty = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        header_style="dim",
        collapse_padding=True,
    )
    for number, column in enumerate(columns):
        empty.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return empty


def memory(nbytes: int | None) -> str:
    """Return bytes of memory as text, in binary units."""
    if nbytes is None:
        return "unknown"
    for unit, size in (("GiB", GIB), ("MiB", MIB)):
        if nbytes >= size:
            return f"{nbytes / size:,.2f} {unit}"
    return f"{nbytes / 1024:,.1f} KiB"


def moved(nbytes: int) -> str:
    """Return bytes over a link as text, in decimal units like its bandwidth."""
    for unit, size in (("GB", GB), ("MB", 10**6)):
        if nbytes >= size / 10:
            return f"{nbytes / size:,.2f} {unit}"
    return f"{nbytes / 1000:,.2f} kB" if nbytes else "0"


def rate(a_second: float) -> str:
    """Return a rate as text, with one decimal below 1000."""
    return f"{a_second:,.1f}" if a_second < 1000 else f"{a_second:,.0f}"

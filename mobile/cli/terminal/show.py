"""The output of the commands: tables and JSON on stdout, everything else on stderr, colours only on a terminal.

Streams may be closed or full; notes on stderr are then lost, and a lost result is an error.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from mobile.errors import Refused

GIB, MIB, GB = 2**30, 2**20, 10**9


def console(*, stderr: bool = False) -> Console:
    """Return a console on stdout or stderr; lines are wrapped on a terminal only, and brackets are text, not markup."""
    stream = sys.stderr if stderr else sys.stdout
    terminal = stream.isatty()
    return Console(file=stream, highlight=False, markup=False, soft_wrap=not terminal, width=None if terminal else 160)


def prepare() -> None:
    """Make the standard streams usable. Raise Refused if stdout is closed, since the result would be lost.

    Python has None for a stream that is closed, and its file descriptor would go to the next file that is opened.
    Characters that the encoding of stdout lacks are escaped.
    """
    closed = sys.stdout is None
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (it is open as long as the process)
    if closed:
        raise Refused("Standard output is closed; send it to a file, or to /dev/null.")
    if getattr(sys.stdout, "errors", None) == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def silence(stream: Any) -> None:
    """Send the rest of a stream that cannot be written to /dev/null: Python would report the error again at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def note(text: str) -> None:
    """Print one line on stderr; bytes that are no text are escaped."""
    try:
        print(text.encode(errors="backslashreplace").decode(), file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


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

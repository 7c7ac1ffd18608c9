"""The console that verbs print on: text of a record is shown on it as it is, and is never obeyed."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.segment import Segment

from reports.elements.escapes import on_one_line, visible


@dataclass(frozen=True)
class Visible:
    """Something to print, with the control characters in its text made visible; the console's own codes stay."""

    inner: ConsoleRenderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Segment]:
        for segment in console.render(self.inner, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


class ForeignText(RenderHook):
    """A hook that makes all that a console prints visible."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [Visible(each) for each in renderables]


def console() -> Console:
    """Return a console on stdout, which reads neither markup nor emoji codes nor escapes in what it is given."""
    made = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False)
    made.push_render_hook(ForeignText())
    return made


def prepare() -> None:
    """Escape the characters that the encoding of a standard stream lacks, instead of ending with an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def error(refused: object) -> None:
    """Print why something was refused, as one line on stderr."""
    print(f"error: {on_one_line(str(refused))}", file=sys.stderr)

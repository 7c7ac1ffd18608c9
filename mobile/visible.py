"""Foreign text made fit to be printed: of what a terminal would obey or a file could not hold, an escape is shown.

Names, errors and a model's answers come from files that people pass around. Their control characters would move the
cursor, recolour or rename a terminal; bidirectional overrides would show a line in another order than it has.
"""

from __future__ import annotations

import re

# Control characters but for tab and line feed, U+2028 and U+2029, bidirectional embeddings, overrides and isolates, and
# half surrogate pairs, which no encoding has (of a path they are the bytes that are no UTF-8).
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Return the text with each unprintable character as an escape like \x1b or \u202e; tabs and line feeds stay."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def on_one_line(text: str) -> str:
    """Return the same on one line, so that a name cannot look like another line of the output."""
    return " ".join(visible(text).split("\n"))

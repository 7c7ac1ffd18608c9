"""One escape for each format that a page is written in: text of a record is shown as it is, and is never obeyed.

A record may come from anyone: its names, prompts, answers and errors hold markup, formulas, or what a terminal obeys.
Each escape changes only what its format would obey, and first makes visible what no format can show. HTML is escaped by
Jinja, which calls `visible` first. A bare address is still made a link where a page is shown on GitHub; it leads to
what it says. LaTeX needs an engine with the text's letters.
"""

from __future__ import annotations

import re

# As in mobile/visible.py, which this room does not import; a test holds the two equal.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

# Inside a line Markdown obeys these. An underscore within a word and a lone "<" or "&" are text; a bracket makes a link
# or a footnote only with what follows it.
MARKDOWN = re.compile(r"[\\`*~$]|_+(?![^\W_])|(?<![^\W_])_+|<(?=[A-Za-z/!?])|&(?=[#A-Za-z])|\](?=[(\[:])")
# At its start, these make a heading, a list, a quote, a rule or a table.
BLOCK = re.compile(r"[#>+=|:-]|\d{1,9}[.)]")
ESCAPED = re.compile(r"\\([!-/:-@\[-`{-~])")

LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "≥": r"$\geq$",
    "×": r"$\times$",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{c: f"{{{c}}}" for c in "[]*"},  # at the start of a row \\ would take them as its own
}
SPECIAL = re.compile("|".join(map(re.escape, LATEX)))

# A spreadsheet computes a cell that begins so, full-width forms included, unless it is a number or a lone dash.
FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*([eE][+-]?\d+)?|inf|nan)|-")


def visible(text: str) -> str:
    r"""Return the text with each unprintable character as an escape like \x1b or \u202e; tabs and line feeds stay."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def on_one_line(text: str) -> str:
    """Return the same on one line."""
    return " ".join(visible(text).split("\n"))


def markdown(text: str) -> str:
    """Return text for the inside of a line of Markdown."""
    return MARKDOWN.sub(lambda found: "".join(f"\\{c}" for c in found[0]), on_one_line(text))


def markdown_paragraph(text: str) -> str:
    """Return text that begins a line of Markdown."""
    line = markdown(text).lstrip()
    begins = BLOCK.match(line)
    return line if begins is None else f"{line[: begins.end() - 1]}\\{line[begins.end() - 1 :]}"


def markdown_cell(text: str) -> str:
    """Return text for a cell of a Markdown table."""
    return markdown(text).replace("|", "\\|")


def markdown_code(text: str) -> str:
    """Return a code block, each line indented, so that no text can close it."""
    return "\n".join(f"    {line}" for line in visible(text).splitlines() or [""])


def of_markdown(text: str) -> str:
    """Return the text that an escaped one shows."""
    return ESCAPED.sub(r"\1", text)


def latex(text: str) -> str:
    """Return text for LaTeX, outside of math and of comments."""
    return SPECIAL.sub(lambda found: LATEX[found[0]], on_one_line(text))


def csv_cell(text: str) -> str:
    """Return text for a cell of a spreadsheet: with a quote before what would be computed. Numbers stay numbers."""
    shown = visible(text)
    computed = FORMULA.match(shown) and not NUMBER.fullmatch(shown)
    return f"'{shown}" if computed else shown

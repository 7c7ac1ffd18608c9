"""Shorter SVG of the same picture: a page holds dozens of figures, and most of their bytes are digits no eye sees."""

from __future__ import annotations

import re

PATH = re.compile(r'(?<=[\s"]d=")[^"]*')
NUMBER = re.compile(r"-?\d+\.\d+")
N = r"(-?[\d.]+)"
RECTANGLE = re.compile(rf"M{N} {N}L{N} \2L\3 {N}L\1 \4(?:L\1 \2)?z")


def compact(tag: str) -> str:
    """Return a tag of matplotlib's SVG with its path data shortened: hundredths of a point, rectangles by their sides.

    Only the attribute `d` is changed.
    """
    return PATH.sub(lambda found: _path(found[0]), tag)


def _path(data: str) -> str:
    data = NUMBER.sub(lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), data)
    data = re.sub(r"\s*([A-Za-z])\s*", r"\1", " ".join(data.split()))
    return RECTANGLE.sub(r"M\1 \2H\3V\4H\1z", data)

"""File names made from any text: the one place where a name of a record becomes the name of a file or of an id."""

from __future__ import annotations

import hashlib
import re

PLAIN = re.compile(r"[a-z0-9]+([._-][a-z0-9]+)*")
LONGEST = 80


def slug(text: str) -> str:
    """Return a file name of letters a-z, digits and single `.`, `_`, `-`, which is safe on any system.

    A text that is such a name is returned as it is. Of any other that is kept which can be, and two hyphens and a part
    of its hash follow, which no plain name holds, so that different texts have different names, whatever their case.
    """
    if len(text) <= LONGEST and PLAIN.fullmatch(text):
        return text
    kept = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].rstrip("-") or "x"
    return f"{kept}--{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"

"""The one exception a user meets: a request refused before anything was changed."""

from __future__ import annotations


class Refused(ValueError):
    """Bad input, said in one sentence that tells what to change. Nothing was written or half-attached."""


def said(error: Exception) -> str:
    """Another library's error in one line, for a sentence of ours: its first paragraph, or what it is called."""
    return " ".join(str(error).strip().split("\n\n")[0].split()) or type(error).__name__

"""The one exception a user meets: a request refused before anything was changed."""

from __future__ import annotations


class Refused(ValueError):
    """Bad input, explained in one sentence that says what to change. Nothing was written or left half-attached."""


def said(error: BaseException) -> str:
    """Return another library's error in one line, for a sentence of ours: its first paragraph, or its class's name.

    Of an OSError it is the system's message without number and file. Halves of surrogate pairs are escaped, so that the
    line can be printed anywhere.
    """
    message = str(getattr(error, "strerror", None) or error).strip()
    line = " ".join(message.split("\n\n")[0].split()) or type(error).__name__
    return line.encode(errors="backslashreplace").decode().rstrip(".:")

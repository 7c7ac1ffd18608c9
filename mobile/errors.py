"""The one exception a user meets: a request refused before anything was changed."""

from __future__ import annotations


class Refused(ValueError):
    """Bad input, said in one sentence that tells what to change. Nothing was written or half-attached."""


def said(error: BaseException) -> str:
    """Return another library's error in one line, for a sentence of ours: its first paragraph, or what it is called.

    Of what the system raised its own words alone, without the number and the file. Characters that are no text (half
    of a surrogate pair) are escaped, so that the line can be printed anywhere.
    """
    told = str(getattr(error, "strerror", None) or error).strip()
    line = " ".join(told.split("\n\n")[0].split()) or type(error).__name__
    return line.encode(errors="backslashreplace").decode().rstrip(".:")

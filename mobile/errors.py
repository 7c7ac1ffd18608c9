"""The exceptions of the package: a request that is refused before anything was changed."""

from __future__ import annotations

from mobile.visible import visible

LONGEST = 300  # characters of another library's error, or of a word from a file, in one of our sentences


class Refused(ValueError):
    """Bad input. Its text is one sentence with what to change; nothing was written and no model is half-attached."""


class OutOfReach(Refused):
    """Asked for is more than this machine has: its card is too small, or its link too slow. A larger one could."""


def one_line(error: BaseException) -> str:
    """Return another library's error in one line, to be a part of a refusal: its first paragraph, or the error's type.

    An OSError gives the system's message alone, without the number and the file. What a terminal would obey and what is
    no text (half of a surrogate pair) is escaped, so that the line can be printed anywhere. A long one is cut.
    """
    message = str(getattr(error, "strerror", None) or error).strip()
    line = " ".join(message.split("\n\n")[0].split()) or type(error).__name__
    return shortened(visible(line)).rstrip(".:")


def shortened(text: str) -> str:
    """Return the text, and of a long one its beginning and end: a file's content may be of any length."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 60]} ... {text[-50:]}"

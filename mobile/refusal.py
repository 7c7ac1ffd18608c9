"""The one exception a user meets: a request refused before anything was changed."""


class Refused(ValueError):
    """Bad input, said in one sentence that tells what to change. Nothing was written or half-attached."""


def reason(error: BaseException) -> str:
    """Return why it was raised, for the middle of a sentence: its message's first line, or its kind where it has none.

    Characters that are no text (half of a surrogate pair) are escaped, so that what is said can be printed anywhere.
    """
    told = getattr(error, "strerror", None) or str(error)
    line = next((line.strip() for line in told.splitlines() if line.strip()), type(error).__name__)
    return line.encode(errors="backslashreplace").decode().rstrip(".:")

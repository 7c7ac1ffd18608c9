"""The one exception a user meets: a request refused before anything was changed."""


class Refused(ValueError):
    """Bad input, said in one sentence that tells what to change. Nothing was written or half-attached."""

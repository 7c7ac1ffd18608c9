"""Suggestions for a word that is none of the choices."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

MIN_SIMILARITY = 0.6  # difflib's ratio: 0.91 for "mobil" and "mobile", 0.67 for "gpu" and "cpu"
MIN_PREFIX_LENGTH = 3  # letters of a beginning that is taken for the whole word


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice that `word` was probably meant to be: the most similar, or the only one that begins with it."""
    by_lower = {choice.lower(): choice for choice in choices}
    lower = str(word).lower()
    matches = get_close_matches(lower, by_lower, n=1, cutoff=MIN_SIMILARITY)
    if not matches and len(lower) >= MIN_PREFIX_LENGTH:
        completions = [choice for choice in by_lower if choice.startswith(lower)]
        matches = completions if len(completions) == 1 else []
    return by_lower[matches[0]] if matches else None


def offer(word: str, choices: Iterable[str], listed: str | None = None) -> str:
    """Return the end of a refusal's sentence: the nearest choice, if any is near, and all choices.

    "did you mean lru? Choose one of: lfu, lru" or "choose one of: lfu, lru", without a full stop. `listed` replaces the
    list of all choices.
    """
    names = list(choices)
    listed = listed or (f"choose one of: {', '.join(names)}" if names else "there is none to choose")
    meant = nearest(word, names)
    return listed if meant is None else f"did you mean {meant}? {listed[0].upper()}{listed[1:]}"

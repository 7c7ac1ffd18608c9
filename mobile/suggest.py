"""Suggestions: the choice that a wrong word was probably meant to be."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

ALIKE = 0.6  # of difflib's ratio: "mobil" and "mobile" are 0.91 alike, "gpu" and "cpu" 0.67
FEWEST_LETTERS = 3  # of a beginning that is taken for the whole word


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice that `word` was probably meant to be: the most alike, or the only one that begins so."""
    by_lower = {choice.lower(): choice for choice in choices}
    asked = str(word).lower()
    found = get_close_matches(asked, by_lower, n=1, cutoff=ALIKE)
    if not found and len(asked) >= FEWEST_LETTERS:
        begun = [choice for choice in by_lower if choice.startswith(asked)]
        found = begun if len(begun) == 1 else []
    return by_lower[found[0]] if found else None


def offer(word: str, choices: Iterable[str], listed: str | None = None) -> str:
    """Return the end of a refusal's sentence: what was probably meant, if anything, and all choices.

    "did you mean lru? Choose one of: lfu, lru" or "choose one of: lfu, lru", without a full stop. `listed` is another
    way to list them.
    """
    named = list(choices)
    listed = listed or (f"choose one of: {', '.join(named)}" if named else "there is none to choose")
    meant = nearest(word, named)
    return listed if meant is None else f"did you mean {meant}? {listed[0].upper()}{listed[1:]}"

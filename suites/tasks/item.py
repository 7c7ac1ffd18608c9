"""One question with a worked answer: the unit every task generates, trains on and is scored by."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """A prompt, the worked answer a model should write, and the short answer that is scored.

    `key` names the item's substance with its surface removed (names, nouns and phrasing). The
    train/test split is a function of `key`, so near duplicates never straddle it.
    """

    prompt: str
    worked: str
    answer: str
    key: str


def held_out(key: str) -> bool:
    """Return whether the item belongs to the test side: one key in eight, by hash and nothing else."""
    return hashlib.sha256(key.encode()).digest()[0] % 8 == 0

"""What the next layer's router says of this layer's input: all that a lookahead is shown of a token. No torch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class StepLogits:
    """The `logits` (layers - 1, rows, experts), float16, of one decode step: row l is of layer l + 1's router.

    Layers are put in order together: a numpy call on one layer's few numbers is mostly the call.
    """

    __slots__ = ("_most", "_order", "logits")

    def __init__(self, logits: np.ndarray) -> None:
        self.logits = logits
        self._order: list[list[int]] = []
        self._most = 0

    def likeliest(self, layer: int, guesses: int) -> list[int]:
        """See `NextLayerLogits.likeliest`."""
        if guesses > self._most:
            scores = self.logits.max(axis=1) if self.logits.shape[1] > 1 else self.logits[:, 0]
            self._order = order(scores.astype(np.float32), guesses)
            self._most = guesses
        return self._order[layer] if guesses == self._most else self._order[layer][:guesses]


class NextLayerLogits(NamedTuple):
    """What one layer's input says of the layer after it."""

    step: StepLogits
    layer: int

    @property
    def logits(self) -> np.ndarray:
        """(rows, experts) float16."""
        return self.step.logits[self.layer]

    def likeliest(self, guesses: int) -> list[int]:
        """The experts that score highest in any row, the highest first, of equal ones the lower; not to be changed."""
        return self.step.likeliest(self.layer, guesses)


def alone(logits: np.ndarray) -> NextLayerLogits:
    """One layer's (rows, experts), as a live run has it."""
    return NextLayerLogits(StepLogits(logits[None]), 0)


def order(scores: np.ndarray, most: int) -> list[list[int]]:
    """By row of scores (rows, experts), the experts of the `most` highest, in order; of equal ones the lower first."""
    found: list[list[int]] = np.argsort(-scores, axis=1, kind="stable")[:, :most].tolist()
    return found

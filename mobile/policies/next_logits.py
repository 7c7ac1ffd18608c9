"""Next-layer logits: the next layer's router logits on this layer's router input, which lookaheads predict from.

No torch: a replay reads them from a trace.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class StepLogits:
    """The logits of one decode step, (layers - 1, rows, experts) float16; [l] are layer l + 1's router's on layer l.

    All layers are sorted together: on one layer's few numbers a numpy call is mostly overhead.
    """

    __slots__ = ("_experts", "_sorted", "logits")

    def __init__(self, logits: np.ndarray) -> None:
        self.logits = logits
        self._experts: list[list[int]] = []
        self._sorted = 0

    def likeliest(self, layer: int, guesses: int) -> list[int]:
        """Return the experts of `NextLayerLogits.likeliest` at `layer`."""
        if guesses > self._sorted:
            scores = self.logits.max(axis=1) if self.logits.shape[1] > 1 else self.logits[:, 0]
            self._experts = top_experts(scores.astype(np.float32), guesses)
            self._sorted = guesses
        return self._experts[layer] if guesses == self._sorted else self._experts[layer][:guesses]


class NextLayerLogits(NamedTuple):
    """The next layer's router logits on the router input of `layer`."""

    step: StepLogits
    layer: int

    @property
    def logits(self) -> np.ndarray:
        """Return them, (rows, experts) float16."""
        return self.step.logits[self.layer]

    def likeliest(self, guesses: int) -> list[int]:
        """Return the `guesses` experts with the highest logit in any row, highest first; of equal ones the lower first.

        The list is shared: do not change it.
        """
        return self.step.likeliest(self.layer, guesses)


def of_one_layer(logits: np.ndarray) -> NextLayerLogits:
    """Return the logits (rows, experts) of one layer, which is all that a live run has at a time."""
    return NextLayerLogits(StepLogits(logits[None]), 0)


def top_experts(scores: np.ndarray, count: int) -> list[list[int]]:
    """Return, for each row of scores (rows, experts), the `count` highest, in order; of equal ones the lower first."""
    found: list[list[int]] = np.argsort(-scores, axis=1, kind="stable")[:, :count].tolist()
    return found


def predicting_layer(mine: int, last: bool, layers: int) -> int | None:
    """Return the recorded layer whose next-layer logits a layer charged with recorded layer `mine` is given, or None.

    The `last` layer of those charged with `mine` is followed by the first one charged with `mine` + 1, so it is given
    the logits of `mine`. The others are followed by a layer charged with `mine` too, whose routing is predicted by the
    logits of `mine` - 1. So each layer is predicted as well as a recorded one, and those of the first group are not.
    """
    source = mine if last else mine - 1
    return source if 0 <= source < layers - 1 else None

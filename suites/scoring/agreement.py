"""Which fallbacks the little pass would not have needed: where it and the big pass write the same token.

Both are known only where a row fell back. Above gamma no big pass ran, so nothing is known of those tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mobile.replay.trace import Request
from suites.scoring.batched import Batch


class BothPasses:
    """A collector for `Engine.comparing`: by big pass and row of a batch, whether both passes write the same token."""

    def __init__(self, batch: Batch | None = None) -> None:
        self.batch = batch
        self.alike: list[dict[int, bool]] = []

    def __call__(self, _little: object, logits: torch.Tensor, big_logits: torch.Tensor) -> None:
        """Add a big pass, given the logits (rows, V) of both, of the rows that have not left `batch` (None: all)."""
        alike = (logits.argmax(-1) == big_logits.argmax(-1)).tolist()
        rows = range(len(alike)) if self.batch is None else self.batch.going
        self.alike.append(dict(zip(rows, alike, strict=True)))

    def by_row(self, requests: Sequence[Request]) -> list[list[bool]]:
        """Return for each row of the batch, and each of its fallbacks in order, whether both passes agreed.

        `requests` are what the batch recorded, a row each. Rows decode in step, so a row's nth little pass belongs to
        the nth decode step of the batch, and a big pass to a step in which any row fell back.
        """
        fell = [fallback_steps(request) for request in requests]
        passes = {step: number for number, step in enumerate(sorted({step for row in fell for step in row}))}
        if len(passes) != len(self.alike):
            raise ValueError(f"{len(self.alike)} big passes were compared, and {len(passes)} were recorded")
        return [[self.alike[passes[step]][number] for step in row] for number, row in enumerate(fell)]


def fallback_steps(request: Request) -> list[int]:
    """Return the decode steps, counted from 0, in which a request fell back."""
    steps, number = [], -1
    for step in request:
        number += step.kind == "little"
        if step.kind == "big":
            steps.append(number)
    return steps

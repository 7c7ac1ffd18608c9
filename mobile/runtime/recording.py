"""Recording the routing of live sequences, one request each, for traces that are replayed later."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from mobile.replay.trace import Request
from mobile.runtime.forward_pass import ForwardPass


class Recorder:
    """The recording of one caller's passes, while one is on.

    `keeps_next_layer_logits` says that steps hold what next-layer predictors need, see `trace.Step`.
    """

    def __init__(self) -> None:
        self.keeps_next_layer_logits = False
        self._requests: list[Request] | None = None  # None: no recording is on
        self._rows: list[Request] = []  # the requests that the rows of the last batch are

    @contextmanager
    def recording(self, *, ahead: bool) -> Iterator[list[Request]]:
        """Record inside the block; yields the growing list of requests. `ahead` keeps next-layer logits as well."""
        requests: list[Request] = []
        self._requests, self._rows, self.keeps_next_layer_logits = requests, [], ahead
        try:
            yield requests
        finally:
            self._requests, self.keeps_next_layer_logits = None, False

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the last batch alone, the others have left it."""
        if self._rows:
            self._rows = [self._rows[row] for row in rows]

    def add(
        self,
        done: ForwardPass,
        live: torch.Tensor | None = None,
        confidence: torch.Tensor | None = None,
        predicted: Sequence[torch.Tensor] = (),
        *,
        fresh: bool = False,
    ) -> None:
        """Append a finished pass to the request of each live row, if a recording is on.

        All in host memory: live (rows,) bool, None: all; confidence (rows,); `predicted`, expert ids (rows, K) by
        layer. `fresh` begins new requests, as does another number of rows.
        """
        if self._requests is None:
            return
        rows = done.valid.shape[0]
        if fresh or len(self._rows) != rows:
            self._rows = [[] for _ in range(rows)]
            self._requests.extend(self._rows)
        written = [True] * rows if live is None else live.tolist()
        sure = [None] * rows if confidence is None else confidence.tolist()
        foreseen = [layer.tolist() for layer in predicted]
        for row in range(rows):
            if written[row]:
                self._rows[row].append(done.row_step(row, sure[row], foreseen))

"""One forward pass as the engine sees it: the experts it selects, layer by layer, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from mobile.replay.trace import Experts, Kind, Step
from mobile.transfer import read

RouterInput = tuple[tuple, dict[str, Any]]
Selection = tuple[torch.Tensor, torch.Tensor]  # expert ids and their weights, (tokens, K) each


@dataclass
class ForwardPass:
    """One forward pass over `rows` sequences; `valid` (rows, length) marks tokens that are not padding.

    `live` (rows,) marks the rows of a decode step that are still being written, in host memory; None: all of them.
    `confident` (rows,) and `little_selections`, by layer, make a big pass keep the little pass's experts for rows that
    were sure, so that no row's output depends on the others in its batch. `chosen` are the ids of `selections` in host
    memory, as far as the engine has read them.
    """

    kind: Kind
    valid: torch.Tensor
    live: torch.Tensor | None = None
    selections: list[Selection] = field(default_factory=list)
    chosen: list[torch.Tensor] = field(default_factory=list)
    router_inputs: dict[int, RouterInput] = field(default_factory=dict)
    ahead: dict[int, np.ndarray] = field(default_factory=dict)  # by layer, the next one's router logits on its input
    confident: torch.Tensor | None = None
    experts: int = 0  # of a layer; known once one has selected
    little_selections: Sequence[Selection] = ()

    @property
    def tokens(self) -> int:
        """Tokens that are computed, those of padding and of rows that ended among them."""
        return self.valid.numel()

    @property
    def counted(self) -> int:
        """Tokens that are read or written: all but padding and rows that ended. In prefill it waits for the device."""
        if self.kind == "prefill":
            return int(self.valid.sum())
        return self.valid.shape[0] if self.live is None else int(self.live.sum())

    def select(self, layer: int, index: torch.Tensor, weights: torch.Tensor, experts: int) -> Selection:
        """Return the selection that runs in `layer`, given the router's; ids equal to `experts` mean no expert."""
        self.experts = experts
        if self.confident is not None:
            kept_index, kept_weights = self.little_selections[layer]
            unused, keeps = (0, index.shape[1] - kept_index.shape[1]), self.confident[:, None]
            index = torch.where(keeps, nn.functional.pad(kept_index, unused, value=experts), index)
            weights = torch.where(keeps, nn.functional.pad(kept_weights, unused), weights)
        self.selections.append((index, weights))
        return index, weights

    def row_step(self, row: int, confidence: float | None = None, predicted: Sequence[list[list[int]]] = ()) -> Step:
        """Return this pass as one row of the batch would have run it alone."""
        foreseen = tuple(tuple(sorted(layer[row])) for layer in predicted)
        if self.kind != "prefill":
            ran, counts = self._chosen(row)
            return Step(self.kind, 1, ran, counts, confidence, foreseen, self._ahead(row))
        rows, length = self.valid.shape
        active, times_each = [], []
        valid, *layers = self._prompt
        for index in layers:
            mine = index.view(rows, length, -1)[row][valid[row]]
            ids, times = mine[mine < self.experts].unique(return_counts=True)
            active.append(tuple(ids.tolist()))
            times_each.append(tuple(times.tolist()))
        return Step(self.kind, int(valid[row].sum()), tuple(active), tuple(times_each), confidence, foreseen)

    def _chosen(self, row: int) -> tuple[Experts, Experts]:
        """Return the active experts of one token by layer, and how often it was routed to each; empty: once to all."""
        chosen = [[e for e in layer[row] if e < self.experts] for layer in self.selected]
        ran = tuple(tuple(sorted(set(each))) for each in chosen)
        if all(len(each) == len(unique) for each, unique in zip(chosen, ran, strict=True)):
            return ran, ()
        return ran, tuple(tuple(map(each.count, unique)) for each, unique in zip(chosen, ran, strict=True))

    @cached_property
    def selected(self) -> list[list[list[int]]]:
        """The experts of one token, by layer and row. For when the pass is over."""
        known = len(self.chosen) == len(self.selections)
        return [index.tolist() for index in (self.chosen if known else read(*(index for index, _ in self.selections)))]

    @cached_property
    def _prompt(self) -> list[torch.Tensor]:
        """In host memory, `valid` and the experts of a prompt's tokens by layer. For when the pass is over."""
        return read(self.valid, *(index for index, _ in self.selections))

    def _ahead(self, row: int) -> np.ndarray | None:
        """Return the row's next-layer logits (layers - 1, experts), None if some router was not asked."""
        if not self.ahead or len(self.ahead) < len(self.selections) - 1:
            return None
        return np.stack([self.ahead[layer][row] for layer in range(len(self.selections) - 1)])

"""Measuring settings on a live model: full K answers once, then every setting, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch

from mobile.policies.signals import SIGNALS
from mobile.policies.strategy import BigLittle
from mobile.runtime.confidence import confidence, replay_routers
from mobile.runtime.engine import Engine
from mobile.runtime.forward_pass import ForwardPass
from mobile.tuning.choice import Measured, Setting
from mobile.tuning.items import Item, outcomes

ALWAYS = 2.0  # a gamma above every confidence: full K's own tokens


@dataclass(frozen=True)
class Questions:
    """Encoded prompts (1, length) each, and how a model answers and its answers are read.

    `generate(ids, mask)` takes and returns ids (rows, length); `text` turns new ids (length,) into an answer.
    """

    items: Sequence[Item]
    prompts: Sequence[torch.Tensor]
    generate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    text: Callable[[torch.Tensor], str]
    batch: int = 16

    @property
    def batches(self) -> int:
        """Return how many batches all of them make."""
        return ceil(len(self.prompts) / self.batch)

    def answers(self, advance: Callable[[], None]) -> list[str]:
        """Return the text that the model writes for each; `advance` is called after every batch.

        Prompts of like length share a batch, padded on the left. No row of the engine's depends on the others.
        """
        order = sorted(range(len(self.prompts)), key=lambda number: self.prompts[number].shape[1])
        found = [""] * len(order)
        for begin in range(0, len(order), self.batch):
            chunk = order[begin : begin + self.batch]
            longest = max(self.prompts[number].shape[1] for number in chunk)
            ids = torch.zeros(len(chunk), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, number in enumerate(chunk):
                length = self.prompts[number].shape[1]
                ids[row, longest - length :], mask[row, longest - length :] = self.prompts[number][0], 1
            written = self.generate(ids, mask)[:, longest:].cpu()
            for number, new in zip(chunk, written, strict=True):
                found[number] = self.text(new)
            advance()
        return found


@dataclass
class Collected:
    """Confidences of little passes, by signal, of every decoded token."""

    signals: Sequence[str]
    layers: Sequence[Any]
    values: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def __call__(self, little: ForwardPass, logits: torch.Tensor, _big: torch.Tensor) -> None:
        """Add the rows that are still being written."""
        replayed = replay_routers(self.layers, little) if any(SIGNALS[s].replays_routers for s in self.signals) else []
        for signal in self.signals:
            value = confidence(signal, logits, little, replayed)
            live = value if little.live is None else value[little.live]
            self.values.setdefault(signal, []).append(live.float().cpu())

    def gammas(self, signal: str, rates: Sequence[float]) -> list[float]:
        """Return by falling rate the gamma below which that share of the tokens is; each once."""
        if signal not in self.values:
            return []
        ordered = torch.cat(self.values[signal]).sort().values
        last = len(ordered) - 1
        found = [float(ordered[min(last, round(rate * len(ordered)))]) if rate else 0.0 for rate in rates]
        return sorted(set(found), reverse=True)


def full_answers(
    engine: Engine, questions: Questions, signals: Sequence[str], advance: Callable[[], None]
) -> tuple[list[str], Collected]:
    """Return full K's answers, from passes that all fall back, and the confidences of their little passes."""
    collected = Collected(signals, engine.layers)
    with engine.gated(BigLittle(ALWAYS)), engine.comparing(collected):
        return questions.answers(advance), collected


def measure(
    engine: Engine,
    questions: Questions,
    full: Sequence[str],
    settings: Sequence[Setting],
    advance: Callable[[], None],
) -> Iterator[Measured]:
    """Yield what each setting did, in order."""
    for setting in settings:
        with engine.gated(BigLittle(setting.gamma, setting.signal)):
            answers = questions.answers(advance)
            stats = engine.stats()
        lost, gained = outcomes(questions.items, full, answers)
        yield Measured(
            setting=setting,
            items=len(answers),
            tokens=stats["tokens"],
            fallbacks=stats["fallbacks"],
            lost=tuple(lost),
            gained=tuple(gained),
            can_gain=any(item.answer is not None for item in questions.items),
        )

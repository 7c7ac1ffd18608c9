"""Signal cells: how well each confidence signal tells which tokens half of the experts get wrong. No torch here.

`suites.measure.signals` measures them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from mobile.errors import Refused
from mobile.policies.signals import PROBABILITY, SIGNALS
from mobile.suggest import offer
from suites.identity import Model, code_hash, digest, model_hash, task_hash, versions
from suites.record import VIRTUAL, RunFolder, is_record
from suites.tasks.catalogue import SHIPPED
from suites.tasks.files import items_of


@dataclass(frozen=True)
class SignalCell:
    """One model on `items` test items of a task, and on as many fresh ones of the training side.

    Each of `signals` is compared with the paper's, and answers by itself at the fallback rate of the paper's.
    """

    model: Model
    task: str
    signals: tuple[str, ...]
    items: int
    seed: int

    strategy = "mobile"
    gamma = None
    budget = "smallest"
    hardware = "auto"

    kind = "signals"
    scope = VIRTUAL  # alike on any machine
    online = False

    @property
    def id(self) -> str:
        return digest(asdict(self), code_hash(), versions(), task_hash(self.task), model_hash(self.model))

    @property
    def label(self) -> str:
        return f"{self.model.name} {self.task} signals {' '.join(self.signals)}"

    @property
    def shared(self) -> tuple:
        """Return which model is loaded."""
        return (self.model.name,)

    @property
    def docs(self) -> list[int]:
        """Return a seeded random subset of the task's items, ascending: those of a live run of so many."""
        available = items_of(self.task, None)
        return sorted(Random(self.seed).sample(range(available), available)[: self.items])

    def needs(self, run: RunFolder) -> Path | None:
        return None

    def output(self, run: RunFolder) -> Path:
        return run.record(self.id)

    def intact(self, run: RunFolder) -> bool:
        return is_record(self.output(run))


def signal_cell_from(data: dict[str, Any]) -> SignalCell:
    """Return the cell whose fields, as JSON, are `data`."""
    return SignalCell(**{**data, "model": Model(**data["model"]), "signals": tuple(data["signals"])})


def signal_cells_of(data: dict[str, Any], models: Sequence[Model], at_most: dict[str, int]) -> Iterator[SignalCell]:
    """Yield the cells that a preset asks for with `signals`, one a model and task; none without. Raise Refused."""
    signals = tuple(dict.fromkeys((PROBABILITY, *data.get("signals", ()))))
    for signal in signals:
        if signal not in SIGNALS:
            raise Refused(f"Unknown confidence signal {signal!r}; {offer(signal, SIGNALS)}.")
    if "signals" not in data:
        return
    for model in models:
        for task, available in at_most.items():
            if task not in SHIPPED:
                raise Refused(f"Signals are tuned on items of the training side, which {task} lacks; leave one out.")
            items = min(data.get("signal_items", data["items"]), available)
            yield SignalCell(model, task, signals, items, data["seeds"][0])

"""Synthetic cells: the wall-clock speed of a real geometry with synthetic weights, which plays a script."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

from mobile.costs.geometry import GEOMETRIES
from mobile.costs.hardware import parse_nbytes, profile, shown
from mobile.costs.rows import AS_IS, check_rows
from mobile.errors import Refused
from mobile.links.registry import LINKS
from mobile.policies.strategy import Strategy, resolve
from mobile.suggest import offer
from suites.identity import ENGINE, Model, code_hash, digest, model_hash, versions
from suites.record import RunFolder, is_record
from suites.synthetic.reference_cells import ReferenceCell, reference_cells_of

RECORDED = "recorded"  # routing and fallbacks of the shipped model in the model's folder


@dataclass(frozen=True)
class SyntheticCell:
    """One row of a result: so many repeats of a prompt and its decode steps, each with a script of its own.

    The script of a repeat follows from `routing`, `rate`, `seed` and the tokens alone, so every strategy plays the
    same. `rate` is the share of decode steps that fall back, None where a recorded run fixes it, or the strategy never
    falls back. `link_gb_per_s` is what the link is throttled to, None: as it is. `layers` are the MoE layers made,
    None: as many as fit the host memory, or over a disk all; `shrink` divides every width, for tests. `rows` is the
    experts' row format.
    """

    model: Model
    routing: str
    rate: float | None
    strategy: str
    gamma: float | None
    hardware: str
    budget: str
    link: str
    link_gb_per_s: float | None
    prompt_tokens: int
    warmup_tokens: int
    decode_tokens: int
    repeats: int
    seed: int
    layers: int | None = None
    shrink: int = 1
    swept: bool = False  # a point of a sweep over fallback rates
    rows: str = AS_IS

    @property
    def id(self) -> str:
        fields = {**asdict(self), "hardware": asdict(profile(self.hardware))}  # the profile's content, wherever it lies
        return digest(fields, code_hash(), versions(ENGINE), model_hash(self.model))

    @property
    def task(self) -> str:
        return f"{self.routing} routing"

    @property
    def scope(self) -> str:
        """Return whose time it takes: a GPU's, its link throttled or not, a disk's, a paced link's, or the clock's."""
        return LINKS[self.link].scope_at(self.link_gb_per_s)

    online = False

    @property
    def kind(self) -> str:
        """Return how it is timed: over a disk in turn with the model's other cells, else by itself."""
        return "in turn" if LINKS[self.link].store == "disk" else "synthetic"

    @property
    def shared(self) -> tuple:
        """Return which model is made. Over a disk, all row formats are timed in turn, so it is made in each."""
        made = self.model.name, self.layers or 0, self.shrink, self.link
        return made if self.kind == "in turn" else (*made, self.rows)

    def needs(self, run: RunFolder) -> None:
        return None

    def output(self, run: RunFolder) -> Path:
        return run.record(self.id)

    def intact(self, run: RunFolder) -> bool:
        return is_record(self.output(run))

    @property
    def is_predicted(self) -> bool:
        """Return whether the virtual clock predicts it too: not where it times it anyway."""
        return LINKS[self.link].real_time

    @property
    def label(self) -> str:
        rate = () if self.rate is None else (f"fallback {self.rate:g}",)
        rows = () if self.rows == AS_IS else ("rows", self.rows)
        link = speed_of(self.link_gb_per_s)
        return " ".join((self.model.name, link, self.routing, self.strategy, *rate, *rows, self.budget))


def speed_of(link_gb_per_s: float | None) -> str:
    """Return what a link's speed is called: "native", or "25GB/s"."""
    return "native" if link_gb_per_s is None else f"{link_gb_per_s:g}GB/s"


def synthetic_cell_from(data: dict[str, Any]) -> SyntheticCell:
    """Return the cell whose fields, as JSON, are `data`."""
    return SyntheticCell(**{**data, "model": Model(**data["model"])})


def synthetic_cells_of(data: dict[str, Any], link: str | None) -> Iterator[SyntheticCell | ReferenceCell]:
    """Yield the cells of a preset with [[runs]], over `link` or else the preset's own, and last those of `beside`.

    A model's own `budgets`, `layers` and `shrink` go before the preset's. Raise Refused, KeyError, TypeError.
    """
    chosen = link or data["link"]
    if chosen not in LINKS:
        raise Refused(f"Link {chosen!r} is not available; {offer(chosen, sorted(LINKS))}.")
    counts = {name: data[name] for name in ("prompt_tokens", "warmup_tokens", "decode_tokens", "repeats")}
    if min(counts.values()) < 1:
        raise Refused(f"A preset with runs needs at least one of each of: {', '.join(counts)}.")
    known = {field.name for field in fields(Model)}
    models: dict[str, Model] = {}
    for row in data["models"]:
        model = Model(**{name: value for name, value in row.items() if name in known}, weights="synthetic")
        if unknown := set(row) - known - {"budgets", "layers", "shrink"}:
            raise Refused(f"Model {model.name} has an unknown field {sorted(unknown)[0]!r}.")
        if model.geometry not in GEOMETRIES:
            raise Refused(f"Unknown geometry {model.geometry!r}; {offer(model.geometry, sorted(GEOMETRIES))}.")
        model_hash(model)
        models[model.name] = model
        given = {**data, **row}
        size = {"layers": given.get("layers"), "shrink": given.get("shrink", 1)}
        cards = [str(Path(name).absolute()) if name.endswith(".json") else name for name in data["hardware"]]
        for seed, card, run in product(data["seeds"], cards, data["runs"]):
            profile(card)
            shared = {**counts, **size, "seed": seed, "hardware": card, "link": chosen}
            yield from _cells_of_run(model, run, run.get("budgets", given["budgets"]), shared)
    yield from reference_cells_of(data, models, chosen)


def _cells_of_run(
    model: Model, run: dict[str, Any], budgets: list[str], shared: dict[str, Any]
) -> Iterator[SyntheticCell]:
    """Yield the cells of one [[runs]] table for one model; `shared` are fields that all of them have alike."""
    rates = run.get("rates", [None])
    if above := [rate for rate in rates if rate is not None and rate > 1]:
        raise Refused(f"A rate of fallbacks is a share of the decode steps, and cannot be {above[0]:g}.")
    for rate_of_link, rows, name in product(run["links"], run.get("rows", [AS_IS]), run["strategies"]):
        strategy = resolve(name)
        check_rows(rows)
        falls_back = strategy.gamma is not None
        if falls_back and None in rates and run["routing"] != RECORDED:
            raise Refused(
                f"Routing {run['routing']} says nothing of fallbacks; give its run rates, like rates = [0.1]."
            )
        for budget, rate in product(_budgets(strategy, budgets), rates if falls_back else [None]):
            yield SyntheticCell(
                model=model,
                routing=run["routing"],
                rate=rate,
                strategy=name,
                gamma=strategy.gamma,
                budget=budget,
                link_gb_per_s=_gb_per_s(rate_of_link),
                swept="rates" in run and run["routing"] == RECORDED,
                rows=rows,
                **shared,
            )


def _gb_per_s(link: Any) -> float | None:
    """Return the rate of a link, None for "native". Raise Refused for anything else."""
    if link == "native":
        return None
    if isinstance(link, bool) or not isinstance(link, int | float) or not link > 0:
        raise Refused(f'A link cannot be {shown(link)}; write "native", or a rate in GB/s like 25.')
    return float(link)


def _budgets(strategy: Strategy, budgets: list[str]) -> list[str]:
    """Return the budgets that make a difference: none does to a strategy that caches nothing, or everything."""
    if strategy.retain == "everything":
        return ["all"]
    for budget in set(budgets) - {"smallest"}:
        parse_nbytes(budget)
    return ["smallest"] if strategy.retain == "nothing" else budgets

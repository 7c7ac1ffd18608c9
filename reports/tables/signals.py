"""Tables of confidence signals: what each catches at equal fallback rate, and what it answers by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from reports.data.results import family
from reports.elements.numbers import percent, points
from reports.elements.page import Table
from reports.stats.caught import caught, interval, pooled
from reports.stats.intervals import Interval, Paired
from suites.record import Record

PAPERS = "probability"  # the signal that others are held against
GAMMAS = (0.7, 0.9)  # whose fallback rates are compared at


@dataclass(frozen=True)
class Row:
    """One signal on one family, all its tasks together. Shares are from 0 to 1, differences against the paper's."""

    family: str
    signal: str
    disagreements: int
    tokens: int
    rates: tuple[float, ...]
    area: Interval
    area_difference: Interval | None
    caught: tuple[Interval, ...]
    difference: Interval | None

    @property
    def verdict(self) -> str:
        """Return whether it beats the paper's: by more of the curve, and by more caught at the paper's rate."""
        if self.area_difference is None or self.difference is None:
            return "the paper's"
        better = [each.low > 0 for each in (self.area_difference, self.difference)]
        worse = [each.high < 0 for each in (self.area_difference, self.difference)]
        if all(better):
            return "better"
        if any(better) and not any(worse):
            return "better in part"
        return "worse" if any(worse) and not any(better) else "no difference shown"


def rows(records: Sequence[Record]) -> list[Row]:
    """Return a row a family and signal, the paper's first of each."""
    return [row for group in by_family(records).values() for row in _rows(group)]


def by_family(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the records of each family; of a family trained from several seeds all together."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(family(record), []).append(record)
    return found


def _rows(group: list[Record]) -> Iterator[Row]:
    items = [
        (agrees, {signal: by_item[number] for signal, by_item in record.config["doubts"].items()})
        for record in group
        for number, agrees in enumerate(record.config["agree"])
    ]
    signals = [name for name in items[0][1] if all(name in doubts for _, doubts in items)]
    tokens = pooled([(agrees, {name: doubts[name] for name in signals}) for agrees, doubts in items])
    if not tokens.wrong.any():
        return
    draws = tokens.draws
    rates = [tokens.rates(tokens.doubts[PAPERS], 1 - gamma, draws) for gamma in GAMMAS]
    paper = caught(tokens, tokens.doubts[PAPERS], rates, draws)
    for signal in sorted(signals, key=lambda name: name != PAPERS):
        found = caught(tokens, tokens.doubts[signal], rates, draws)
        ours = signal == PAPERS
        yield Row(
            family(group[0]),
            signal,
            int(tokens.wrong.sum()),
            len(tokens.wrong),
            tuple(float(rate[0]) for rate in rates),
            interval(found.area),
            None if ours else interval(found.area - paper.area),
            tuple(interval(at) for at in found.at),
            None if ours else interval(found.at[0] - paper.at[0]),
        )


def caught_table(found: Sequence[Row]) -> Table:
    """Return what each signal catches of the tokens that the little pass gets otherwise than full K."""
    head = (
        "family",
        "signal",
        "area",
        "over the paper's",
        f"caught at the rate of gamma {GAMMAS[0]:g}",
        "over the paper's, points",
        f"at that of {GAMMAS[1]:g}",
        "left at the first",
        "verdict",
    )
    return Table(
        "Disagreements with full K that a fallback would catch, at equal fallback rate",
        head,
        tuple(
            (
                row.family,
                row.signal,
                _share(row.area),
                "-" if row.area_difference is None else _share(row.area_difference, signed=True),
                f"{percent(row.caught[0].value)} at {percent(row.rates[0])}",
                "-" if row.difference is None else points(_in_points(row.difference)),
                f"{percent(row.caught[1].value)} at {percent(row.rates[1])}",
                f"{row.disagreements * (1 - row.caught[0].value):.0f} of {row.disagreements}",
                row.verdict,
            )
            for row in found
        ),
    )


def alone_table(records: Sequence[Record]) -> Table:
    """Return what each signal answers by itself, against full K on the same items, all tasks together."""
    made = []
    for name, group in by_family(records).items():
        items = sum(len(record.config["docs"]) for record in group)
        for signal in dict.fromkeys(each["signal"] for record in group for each in record.config["live"]):
            mine = [each for record in group for each in record.config["live"] if each["signal"] == signal]
            lost, gained, fallbacks, tokens = (
                sum(each[count] for each in mine) for count in ("lost", "gained", "fallbacks", "tokens")
            )
            difference = points(Paired(items, lost, gained).difference)
            rate = percent(fallbacks / tokens if tokens else None)
            made.append((name, signal, rate, str(lost), str(gained), difference, str(items)))
    head = ("family", "signal", "fallbacks", "lost", "gained", "points against full K", "items")
    return Table("Answers by each signal alone, at the paper's fallback rate", head, tuple(made))


def _share(value: Interval, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{value.value:{sign}.4f} [{value.low:{sign}.4f}, {value.high:{sign}.4f}]"


def _in_points(value: Interval) -> Interval:
    return Interval(100 * value.value, 100 * value.low, 100 * value.high)

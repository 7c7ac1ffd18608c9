"""Tokens by 1 - confidence of the little pass: how many fall back, and on how many both passes disagree."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from suites.record import Record
from suites.record_fields import DOUBT_EDGES

PAPERS = "probability"  # the signal whose doubts are 1 - confidence


@dataclass(frozen=True)
class Bin:
    """The tokens with `low` <= 1 - confidence < `high`.

    Of `tokens`, `fallbacks` fell back, or would. Both passes are known of `compared` tokens, and differ on `disagreed`.
    """

    low: float
    high: float
    tokens: int
    fallbacks: int
    compared: int
    disagreed: int


def of_answers(records: Sequence[Record]) -> list[Bin]:
    """Return the bins of cells that wrote their own answers; none where a record keeps none.

    A big pass ran only where a token fell back, so both passes are known of these tokens only.
    """
    kept = [record.config.get("doubt_histogram") for record in records]
    rows = [row for histogram in kept if histogram is not None for row in histogram]
    if not rows or None in kept:
        return _of_older(records)
    sums: dict[float, list[int]] = {}
    known = all(wrong is not None for *_, wrong in rows)
    for low, tokens, fell, wrong in rows:
        found = sums.setdefault(low, [0, 0, 0])
        for place, count in enumerate((tokens, fell, wrong or 0)):
            found[place] += count
    bins = []
    for low, high in pairwise((*sorted(sums), 1.0)):
        tokens, fell, wrong = sums[low]
        bins.append(Bin(low, high, tokens, fell, fell if known else 0, wrong))
    return bins


def _of_older(records: Sequence[Record]) -> list[Bin]:
    """Return the bins of records that keep equal bins of confidence only, where a fallback counts as two tokens."""
    sums: dict[float, int] = {}
    for record in records:
        for edge, passes in record.config.get("confidence_histogram") or ():
            sums[edge] = sums.get(edge, 0) + passes
    if not any(sums.values()):
        return []
    gamma = records[0].gamma or 0.0
    found = []
    for edge, above in pairwise((*sorted(sums), 1.0)):
        falls = edge < gamma - 1e-9
        tokens = sums[edge] // 2 if falls else sums[edge]
        found.append(Bin(round(1 - above, 9), round(1 - edge, 9), tokens, tokens if falls else 0, 0, 0))
    return found[::-1]


def of_signals(records: Sequence[Record]) -> list[Bin]:
    """Return the bins of signal cells, which ran both passes on every token of full K's answers; none without."""
    counts = {low: [0, 0, 0] for low in DOUBT_EDGES}
    for record in records:
        gamma = next(each["gamma"] for each in record.config["live"] if each["signal"] == PAPERS)
        for agrees, doubts in zip(record.config["agree"], record.config["doubts"][PAPERS], strict=True):
            for alike, doubt in zip(agrees, doubts, strict=True):
                found = counts[DOUBT_EDGES[bisect_right(DOUBT_EDGES, doubt) - 1]]
                for place, count in enumerate((1, doubt > 1 - gamma, not alike)):
                    found[place] += count
    if not any(tokens for tokens, *_ in counts.values()):
        return []
    return [
        Bin(low, high, counts[low][0], counts[low][1], counts[low][0], counts[low][2])
        for low, high in pairwise((*DOUBT_EDGES, 1.0))
    ]

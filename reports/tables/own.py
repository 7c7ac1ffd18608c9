"""Table of a run's own strategies: what MoBiLE has in the overview, for each strategy that is not shipped here."""

from __future__ import annotations

from reports.data import groups
from reports.data.compare import accuracy, count, speedup, strategy_name, total, worst_task
from reports.data.own import own_strategies
from reports.data.results import Results
from reports.elements.numbers import budget_name, percent, points, ratio
from reports.elements.page import Table


def families(results: Results, margin_points: float) -> Table:
    """Return one row a family and strategy of the run's own, at the fewest slots or its first budget."""
    rows = []
    for model in results.models:
        full_k = groups.full_k(results, model)
        for group in own_strategies(results, model):
            first, tokens = group[0], total(group, "decode_tokens")
            bases = groups.baselines(results, first.budget, model)
            loss = accuracy(group, full_k) if full_k and not first.lossless else None
            worst = worst_task(group, full_k) if loss else None
            mobile = groups.mobile(results, model, first.budget)
            rows.append(
                (
                    model,
                    strategy_name(first),
                    points(loss.difference) if loss and loss.items else "0" if first.lossless else "-",
                    loss.within(margin_points) if loss and loss.items else "yes" if first.lossless else "-",
                    worst.in_words if worst else "-",
                    *(ratio(speedup(group, bases[base])) if base in bases else "-" for base in groups.BASELINES),
                    ratio(speedup(group, mobile)) if mobile else "-",
                    percent(total(group, "fallbacks") / tokens) if first.gamma is not None and tokens else "-",
                    budget_name(first.budget, groups.budget_holds_all(results, model, first.budget)),
                    str(count(group)),
                )
            )
    head = (
        "model",
        "strategy",
        "less full K, points",
        f"within {margin_points:g} point",
        "worst task",
        *(f"over {base}" for base in groups.BASELINES),
        "over MoBiLE",
        "fallbacks",
        "memory",
        "n",
    )
    note = "Strategies that are not shipped here; one that answers as full K does loses nothing by construction."
    return Table("Strategies of this run's own", head, tuple(rows), note)

"""Speed tables: tokens per second, speedups over named baselines, and the ceiling of the link."""

from __future__ import annotations

from collections.abc import Sequence

from reports.data import groups
from reports.data.compare import count, hit_rate, share, speedup, strategy_name, tokens_per_s, total
from reports.data.groups import BASELINES, ON_DEMAND, Group
from reports.data.results import Results
from reports.elements.numbers import budget_title, percent, ratio
from reports.elements.page import Table


def speedup_text(group: Group, baseline: Group | None) -> str:
    """Write the speedup of a group over a baseline: MISSING without one, 1 over itself."""
    if baseline is None:
        return "MISSING"
    return "1" if group == baseline else ratio(speedup(group, baseline))


def rate_text(tokens_per_second: float | None) -> str:
    """Write tokens per second with one decimal."""
    return "-" if tokens_per_second is None else f"{tokens_per_second:.1f}"


def by_strategy(results: Results, model: str, budget: str) -> Table:
    """Return speed and speedups of every strategy at one budget, all tasks together, default gamma."""
    bases, timed = groups.baselines(results, budget, model), groups.unswept(results, budget, model)
    rows = []
    for group, alike in zip(timed, groups.on_common_items(timed), strict=True):
        tokens = total(alike, "decode_tokens")
        rows.append(
            (
                strategy_name(group[0]),
                "full K's" if group[0].lossless else "may differ",
                rate_text(tokens_per_s(alike)),
                *(speedup_text(group, bases.get(base)) for base in BASELINES),
                f"{total(alike, 'decode_bytes') / tokens / 1e9:.3f}" if tokens else "-",
                percent(total(alike, "fallbacks") / tokens) if group[0].gamma is not None and tokens else "-",
                percent(hit_rate(group)),
                percent(share(group, "decode_stall_seconds", "decode_seconds")),
                f"{total(alike, 'ttft_ns') / 1e6 / count(alike):,.0f}" if count(alike) else "-",
                "-" if group[0].slots is None else f"{group[0].slots:,}",
                str(count(alike)),
            )
        )
    head = (
        "strategy",
        "answers",
        "tokens/s",
        *(f"over {base}" for base in BASELINES),
        "GB/token",
        "fallbacks",
        "hits",
        "stalled",
        "TTFT ms",
        "slots",
        "prompts",
    )
    notes = (unlike_prompts(timed, "hits and stalled are"), _training(results, model, budget))
    title = budget_title(budget, groups.budget_holds_all(results, model, budget))
    return Table(f"Decode speed, {title}", head, tuple(rows), " ".join(note for note in notes if note))


def unlike_prompts(timed: Sequence[Group], counted: str) -> str:
    """Return the note that some columns are over all prompts of each strategy; empty where all have the same."""
    sizes = sorted({count(group) for group in timed})
    if len(sizes) < 2:
        return ""
    return (
        f"All strategies on the same prompts; only {counted} over all prompts of each, {sizes[0]:,} to {sizes[-1]:,}."
    )


def _training(results: Results, model: str, budget: str) -> str:
    """Return the note on fitting trained predictors: tokens, fits and CPU seconds, which no time of the table holds."""
    notes = []
    for group in groups.unswept(results, budget, model):
        trained = [record.environment["training"] for record in group if record.environment.get("training")]
        if trained:
            seconds, tokens, fits = (sum(fit[part] for fit in trained) for part in ("seconds", "tokens", "fits"))
            when = "as it went" if trained[0]["online"] else "before it was timed"
            notes.append(
                f"{strategy_name(group[0])} learnt from {tokens:,} decode tokens {when}: {fits} fits in "
                f"{seconds:.2f} s of processor time on this machine, not in the times above, "
                f"{trained[0]['parameters']:,} parameters each"
            )
    return f"{'; '.join(notes)}." if notes else ""


def by_task(results: Results, model: str, budget: str) -> Table:
    """Return MoBiLE's speedup and fallback rate for each task at one budget."""
    rows = []
    for task in results.tasks(model):
        bases = groups.baselines(results, budget, model, task=task)
        group = groups.mobile(results, model, budget, task=task)
        if group:
            rows.append(
                (
                    task,
                    *(speedup_text(group, bases.get(base)) for base in BASELINES),
                    rate_text(tokens_per_s(group)),
                    percent(share(group, "fallbacks", "tokens")),
                    f"{total(group, 'decode_tokens') / count(group):.1f}",
                    str(count(group)),
                )
            )
    head = ("task", *(f"over {base}" for base in BASELINES), "tokens/s", "fallbacks", "tokens/answer", "prompts")
    return Table(
        f"MoBiLE by task, {budget_title(budget, groups.budget_holds_all(results, model, budget))}", head, tuple(rows)
    )


def against_ceiling(results: Results, model: str) -> Table:
    """Return on-demand's speed beside the bandwidth bound that no engine without a cache can pass."""
    rows = []
    for record in [r for r in results.select(model=model) if r.strategy in ON_DEMAND and r.budget == "smallest"]:
        reached, ceiling = tokens_per_s([record]), record.ceiling_tokens_per_s
        if reached is None or ceiling is None:
            continue
        leaked = "yes" if reached <= ceiling else "NO: caching leaked in"
        rows.append(
            (record.task, record.strategy, f"{reached:.2f}", f"{ceiling:.2f}", percent(reached / ceiling), leaked)
        )
    head = ("task", "strategy", "tokens/s", "ceiling", "of the ceiling", "below")
    return Table("On-demand against its bandwidth ceiling", head, tuple(rows))

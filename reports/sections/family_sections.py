"""The chapter of one family: accuracy, speed, predictions, and the parts of a token's time."""

from __future__ import annotations

from typing import Any

from reports.data.results import Results
from reports.elements.page import Section
from reports.plots import confidence, hits_and_recall, pareto, timeline, token_time
from reports.sections import sentences
from reports.sections.examples import disagreements
from reports.tables import prediction, scores, speed

ACCURACY = (
    "Greedy decoding scored on the engine that is timed. Lossless strategies give full K's answers by construction, "
    "so they have no row. Prefill runs all K experts in every row. Brackets are 95 % intervals: Wilson's of a score, "
    "Bonett and Price's of a paired difference; lost and gained are the discordant items."
)
SPEED = (
    "A speedup is the geometric mean over prompts of the baseline's time per token over the strategy's own, on the "
    "prompts that both were timed on, with a 95 % interval from a two-level bootstrap (tasks, then prompts). Batch 1, "
    "decode only; prefill (TTFT) stands apart. Slots are of the real model's experts; the cache starts cold and stays "
    "warm from prompt to prompt. Plain offloading keeps nothing between tokens, so memory beyond its smallest does not "
    "help it: where a budget holds much of the model, compare with lru instead."
)
PREDICTION = (
    "Recall is the share of the experts a layer needed that had been foreseen, precision the share of the foreseen "
    "that were needed; MoBiLE foresees only when it falls back. Experts fetched and not used are wasted on the link. "
    "A layer of the small model stands for several of the real one; each is foreseen as well as a recorded layer is."
)
EXAMPLES = (
    "The first items of each task on which MoBiLE's text differs from full K's: two answers lost and one gained where "
    "there are so many. Tokens that the big pass wrote are marked."
)


def family_sections(results: Results, model: str, paper: dict[str, Any]) -> list[Section]:
    """Return a family's heading with its main numbers, then its parts, most of them folded."""
    margin, first = paper["accuracy"]["margin_points"], results.select(model=model)[0]
    conditions = (
        f"{model} ({first.weights}) stands for {first.geometry} on {first.hardware}: its own routing and fallbacks, "
        "the real model's bytes, layers and memory budget, on a virtual clock. Projected."
        if first.scope == "cpu+virtual"
        else f"{model} ({first.weights}) on {first.hardware}, {first.scope}."
    )
    examples = tuple(e for task in results.tasks(model) for e in disagreements(results, model, task))
    parts_of = [
        Section(f"{model}: accuracy", (ACCURACY,), scores.by_task(results, model, margin), level=3),
        Section(
            f"{model}: accuracy against speed",
            (),
            (scores.by_gamma(results, model, margin),),
            tuple(
                f for f in (pareto.accuracy_against_speed(results, model), confidence.histogram(results, model)) if f
            ),
            level=3,
        ),
        Section(
            f"{model}: examples of disagreement",
            (EXAMPLES,) if examples else (),
            examples=examples,
            level=3,
            folded=True,
        ),
        Section(
            f"{model}: speed",
            (SPEED,),
            tuple(speed.by_strategy(results, model, budget) for budget in results.budgets(model)),
            level=3,
            folded=True,
        ),
        Section(
            f"{model}: speed by task, and the ceiling of the link",
            (),
            (
                *(speed.by_task(results, model, budget) for budget in results.budgets(model)[:1]),
                speed.against_ceiling(results, model),
            ),
            level=3,
            folded=True,
        ),
        Section(
            f"{model}: where a token's time goes",
            (),
            (),
            tuple(f for f in (token_time.stacked_parts(results, model), timeline.token_timeline(results, model)) if f),
            level=3,
            folded=True,
        ),
        _prediction(results, model),
    ]
    return [
        Section(model, (conditions, sentences.fallback_arithmetic(results, model))),
        *(part for part in parts_of if not part.empty),
    ]


def _prediction(results: Results, model: str) -> Section:
    tables = tuple(prediction.by_strategy(results, model, budget) for budget in results.budgets(model))
    tables = tuple(table for table in (*tables, prediction.by_layer(results, model)) if table.rows)
    figures = tuple(
        figure
        for figure in (hits_and_recall.recall_by_depth(results, model), hits_and_recall.hits_by_memory(results, model))
        if figure
    )
    return Section(
        f"{model}: what can be foreseen, and what a cache holds",
        (PREDICTION,) if tables else (),
        tables,
        figures,
        level=3,
        folded=True,
    )

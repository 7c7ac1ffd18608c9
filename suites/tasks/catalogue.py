"""A row for every task: its items, what guessing scores, whether its answers are run, and where its items come from.

Prompt, stops, the most tokens of an answer and scoring are in the YAML that lm-eval reads: ours for a shipped task,
lm-eval's own for a published one. No lm-eval and no torch here: plans are made from this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random

from mobile.errors import Refused
from suites.tasks import arithmetic, boolean_expressions, object_counting, python_functions, web_of_lies
from suites.tasks.item import Item

Generator = Callable[[Random], Item]
GSM8K_URL = "https://github.com/openai/grade-school-math"
HUMANEVAL_URL = "https://github.com/openai/human-eval"
BBH_URL = "https://github.com/suzgunmirac/BIG-Bench-Hard"


@dataclass(frozen=True)
class ShippedTask:
    """A task whose items are generated and lie in data/NAME.jsonl; NAME.yaml says how lm-eval asks and scores them.

    `train` makes items to learn from, `test` those that are shipped: where the task saturates, these are longer.
    `verdict` makes those of the preset accuracy, None where they are made as `test` makes them.
    `chance_level` is the share that answering at random gets right, None where there are no choices to pick from.
    `runs_code`: items are judged by running what the model wrote.
    """

    train: Generator
    test: Generator
    verdict: Generator | None = None
    items: int = 250
    chance_level: float | None = None
    runs_code: bool = False


@dataclass(frozen=True)
class PublishedTask:
    """A task of the paper. `definition` is a path in lm-eval's folder of tasks, `hub` the repository of its items.

    `items` are as published. `files` names, by split, the local files that may hold them, to be had from `url`. With
    `asked_as` the shipped task of that name is asked instead, so that a model trained on generated items meets the
    public ones in the form it knows. `chance_level` and `runs_code` are those of a shipped task.
    """

    definition: str
    items: int
    hub: str
    url: str
    files: dict[str, tuple[str, ...]]
    chance_level: float | None = None
    runs_code: bool = False
    asked_as: str | None = None


SHIPPED: dict[str, ShippedTask] = {
    "arithmetic": ShippedTask(
        train=arithmetic.generate,
        test=partial(arithmetic.generate, steps=arithmetic.TESTED),
    ),
    "boolean_expressions": ShippedTask(
        train=boolean_expressions.generate,
        test=partial(boolean_expressions.generate, operators=boolean_expressions.TESTED),
        verdict=partial(boolean_expressions.generate, operators=boolean_expressions.LONG),
        chance_level=1 / 2,
    ),
    "object_counting": ShippedTask(
        train=object_counting.generate,
        test=partial(object_counting.generate, kinds=object_counting.TESTED),
    ),
    "python_functions": ShippedTask(
        train=python_functions.generate,
        test=python_functions.generate,
        runs_code=True,
    ),
    "web_of_lies": ShippedTask(
        train=web_of_lies.generate,
        test=partial(web_of_lies.generate, people=web_of_lies.TESTED),
        chance_level=1 / 2,
    ),
}

BBH = (
    "boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages formal_fallacies "
    "geometric_shapes hyperbaton logical_deduction_five_objects logical_deduction_seven_objects "
    "logical_deduction_three_objects movie_recommendation multistep_arithmetic_two navigate object_counting "
    "penguins_in_a_table reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks "
    "sports_understanding temporal_sequences tracking_shuffled_objects_five_objects "
    "tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies word_sorting"
).split()
BBH_ITEMS = {"causal_judgement": 187, "penguins_in_a_table": 146, "snarks": 178}  # all others have 250
BBH_YES_OR_NO = (  # or valid and invalid, or True and False
    "boolean_expressions causal_judgement formal_fallacies navigate sports_understanding web_of_lies"
).split()


def _bbh(name: str, asked_as: str | None = None) -> PublishedTask:
    return PublishedTask(
        definition=f"bbh/cot_fewshot/{name}.yaml",
        items=BBH_ITEMS.get(name, 250),
        hub="SaylorTwift/bbh",
        url=BBH_URL,
        files={"test": (f"bbh/{name}.json",)},
        chance_level=1 / 2 if name in BBH_YES_OR_NO else None,
        asked_as=asked_as,
    )


PUBLISHED: dict[str, PublishedTask] = {
    "gsm8k": PublishedTask(
        definition="gsm8k/gsm8k.yaml",
        items=1319,
        hub="openai/gsm8k",
        url=GSM8K_URL,
        files={"test": ("gsm8k/test.jsonl",), "train": ("gsm8k/train.jsonl", "gsm8k/train_head64.jsonl")},
    ),
    "gsm8k_cot": PublishedTask(
        definition="gsm8k/gsm8k-cot.yaml",
        items=1319,
        hub="openai/gsm8k",
        url=GSM8K_URL,
        files={"test": ("gsm8k/test.jsonl",)},
    ),
    "humaneval": PublishedTask(
        definition="humaneval/humaneval.yaml",
        items=164,
        hub="openai/openai_humaneval",
        url=HUMANEVAL_URL,
        files={"test": ("humaneval/HumanEval.jsonl", "humaneval/HumanEval.jsonl.gz")},
        runs_code=True,
    ),
    **{f"bbh_cot_fewshot_{name}": _bbh(name) for name in BBH},
    **{f"bbh_plain_{name}": _bbh(name, asked_as=name) for name in BBH if name in SHIPPED},
}

TASKS: dict[str, ShippedTask | PublishedTask] = {**SHIPPED, **PUBLISHED}
GROUPS = {
    "bbh": tuple(f"bbh_cot_fewshot_{name}" for name in BBH),
    "bbh_plain": tuple(name for name in PUBLISHED if name.startswith("bbh_plain_")),
}


def expand(names: list[str]) -> dict[str, str]:
    """Return by task the name it was asked for by, groups taken apart. Raise Refused for an unknown name."""
    found: dict[str, str] = {}
    for name in names:
        if name not in TASKS and name not in GROUPS:
            known = ", ".join([*SHIPPED, *GROUPS, *(task for task in PUBLISHED if not task.startswith("bbh_"))])
            raise Refused(f"Unknown task {name!r}; choose among: {known}.")
        found |= dict.fromkeys(GROUPS.get(name, (name,)), name)
    return found

"""The tasks: what is shipped is what the generators make, its answers are right, and training never sees it."""

from __future__ import annotations

import json
import re
from itertools import islice
from random import Random

import pytest

from suites.accuracy import task_config
from suites.models.train import training_items
from suites.tasks import DATA, GENERATORS
from suites.tasks.item import held_out
from suites.tasks.object_counting import CATEGORIES, PLURALS, WORDS

TASKS = sorted(GENERATORS)


def shipped(task: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"{task}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", TASKS)
def test_the_shipped_items_are_what_the_generator_makes(task, tmp_path, monkeypatch):
    from suites.tasks import __main__ as writer

    monkeypatch.setattr(writer, "DATA", tmp_path)
    writer.main()
    assert (tmp_path / f"{task}.jsonl").read_bytes() == (DATA / f"{task}.jsonl").read_bytes()


@pytest.mark.parametrize("task", TASKS)
def test_the_scorer_finds_the_answer_in_every_worked_answer(task):
    pattern = task_config(task)["filter_list"][0]["filter"][0]["regex_pattern"]
    for item in shipped(task):
        assert re.findall(pattern, item["worked"]) == [item["answer"]]
        assert "\n" not in item["worked"], "generation stops at a line break"


def test_every_arithmetic_step_is_right_and_the_last_one_is_the_answer():
    for item in shipped("arithmetic"):
        steps = re.findall(r"(\d+)([-+*/])(\d+)=(\d+)\.", item["worked"])
        results = [{"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / int(b)}[sign]
                   for a, sign, b, _ in steps]  # fmt: skip
        assert [int(step[3]) for step in steps] == results
        assert results[-1] == int(item["answer"])


def test_boolean_answers_are_pythons():
    for item in shipped("boolean_expressions"):
        expression = item["prompt"].removeprefix("Q: ").removesuffix(" is\nA:")
        assert set(expression.split()) <= {"True", "False", "not", "and", "or", "(", ")"}
        assert str(eval(expression)) == item["answer"]


def test_counts_are_recounted_from_the_question():
    singular = {PLURALS.get(noun, noun + "s"): noun for nouns in CATEGORIES.values() for noun in nouns.split()}
    for item in shipped("object_counting"):
        listed, target = re.match(r"Q: I have (.*)\. How many (.*) do I have\?", item["prompt"]).groups()
        count = 0
        for phrase in re.split(r", and |, ", listed):
            number, noun = phrase.split()
            if singular.get(noun, noun) in CATEGORIES[target].split():
                count += 1 if number in ("a", "an") else WORDS.index(number)
        assert str(count) == item["answer"]


def test_training_never_sees_a_test_item():
    trained = {item.key for item in islice(training_items(Random(3)), 20_000)}
    tested = {item["key"] for task in TASKS for item in shipped(task)}
    assert not trained & tested
    assert not any(map(held_out, trained))
    assert all(map(held_out, tested))
    assert len(tested) == 750, "no item is shipped twice"

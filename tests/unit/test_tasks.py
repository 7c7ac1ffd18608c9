"""The tasks: what is shipped is what the generators make, its answers are right, and training never sees it."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from reports.data import chance_levels
from suites.models.train import RECIPE, training_items
from suites.scoring.lm_eval import task_config
from suites.tasks.catalogue import SHIPPED
from suites.tasks.catalogue import TASKS as CATALOGUE
from suites.tasks.files import DATA, shipped
from suites.tasks.item import held_out
from suites.tasks.object_counting import CATEGORIES, PLURALS, WORDS

ROOT = Path(__file__).parent.parent.parent
TASKS = sorted(SHIPPED)
SHORT = [task for task in TASKS if task != "python_functions"]  # scored by the answer found in the text


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The files that the command writes elsewhere."""
    out = tmp_path_factory.mktemp("tasks") / "data"
    subprocess.run([sys.executable, "-m", "suites.tasks", "--out", str(out)], check=True, cwd=ROOT)
    return out


def test_asking_for_help_writes_nothing():
    before = [(path, path.stat().st_mtime_ns) for path in sorted(DATA.iterdir())]
    said = subprocess.run(
        [sys.executable, "-m", "suites.tasks", "--help"], check=True, cwd=ROOT, capture_output=True, text=True
    ).stdout
    assert "test items of each task" in said
    assert [(path, path.stat().st_mtime_ns) for path in sorted(DATA.iterdir())] == before


@pytest.mark.parametrize("task", TASKS)
def test_the_shipped_items_are_what_the_generator_makes(task, written):
    assert (written / f"{task}.jsonl").read_bytes() == (DATA / f"{task}.jsonl").read_bytes()


@pytest.mark.parametrize("task", SHORT)
def test_the_scorer_finds_the_answer_in_every_worked_answer(task):
    pattern = task_config(task)["filter_list"][0]["filter"][0]["regex_pattern"]
    for item in shipped(task):
        assert re.findall(pattern, item["worked"]) == [item["answer"]]
        assert "\n" not in item["worked"], "generation stops at a line break"


def test_every_arithmetic_step_is_right_and_the_last_one_is_the_answer():
    for item in shipped("arithmetic"):
        steps = re.findall(r"(\d+)([-+*/])(\d+)=(\d+)\.", item["worked"])
        results = [
            {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / int(b)}[sign]
            for a, sign, b, _ in steps
        ]
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
    trained = {item.key for item in islice(training_items(Random(3), RECIPE), 20_000)}
    tested = {item["key"] for task in TASKS for item in shipped(task)}
    assert not trained & tested
    assert not any(map(held_out, trained))
    assert all(map(held_out, tested))
    assert len({item["prompt"] for task in TASKS for item in shipped(task)}) == 250 * len(TASKS), "one is shipped twice"


def test_training_has_no_near_duplicate_of_a_test_item():
    """Names, nouns and phrasing removed, no training item reads like a test item."""

    def bare(prompt: str, task: str) -> str:
        if task == "web_of_lies":
            order: dict[str, str] = {}
            names = re.findall(r"\b(?!Question|Does)[A-Z][a-z]+", prompt)
            return re.sub(
                r"\b[A-Z][a-z]+", lambda m: order.setdefault(m[0], f"p{len(order)}") if m[0] in names else m[0], prompt
            )
        if task == "python_functions":
            argument = re.search(r"\((\w+)\)", prompt)[1]
            return re.sub(rf"\b{argument}\b", "v", prompt).split("\n")[1]
        return prompt

    for task in ("web_of_lies", "boolean_expressions", "python_functions"):
        tested = {bare(item["prompt"], task) for item in shipped(task)}
        rng = Random(5)
        items = (SHIPPED[task].train(rng) for _ in range(5000))
        assert not tested & {bare(item.prompt, task) for item in items if not held_out(item.key)}, task


def test_reports_know_what_guessing_scores_on_each_task():
    for name, task in CATALOGUE.items():
        assert chance_levels.chance_level(name) == task.chance_level, name


def test_who_lies_is_found_by_trying_both():
    """An independent solver: each speaker's claim is checked against the world that all sentences allow."""
    for item in shipped("web_of_lies"):
        told = item["prompt"].removeprefix("Q: Question: ").removesuffix("\nA:")
        truth: dict[str, bool] = {}
        sentences, asked = told.split(" Does ")
        statements = [s for s in sentences.split(". ") if s]
        while len(truth) < len(statements):
            for sentence in statements:
                name, *rest = sentence.rstrip(".").split()
                if rest[0] != "says":
                    truth[name] = rest[0] == "tells"
                elif rest[1] in truth:
                    truth[name] = truth[rest[1]] == (rest[2] == "tells")
        assert item["answer"] == ("Yes" if truth[asked.split()[0]] else "No")


def test_a_function_passes_its_own_tests_and_its_neighbours_fail_them():
    """The worked body passes; the body of another item under the same name almost never does."""
    items = shipped("python_functions")
    wrong = 0
    for item, other in zip(items, items[1:] + items[:1], strict=True):
        exec(item["prompt"] + item["worked"] + "\n" + item["answer"], {})
        name, argument = re.match(r"def (\w+)\((\w+)\)", item["prompt"]).groups()
        _, theirs = re.match(r"def (\w+)\((\w+)\)", other["prompt"]).groups()
        body = re.sub(rf"\b{theirs}\b", argument, other["worked"])
        try:
            exec(f"def {name}({argument}):\n{body}\n{item['answer']}", {})
        except (AssertionError, TypeError):
            wrong += 1
    assert wrong >= len(items) - 2

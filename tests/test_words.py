"""Words of the page: one verdict, no pooled difference without its worst task, nothing that was not measured."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import pytest

from reports.data.compare import worst_task
from reports.pages import content
from reports.sections import sentences
from tests.report_runs import ITEMS, Rule, results

PAPER = tomllib.loads(content.PAPER.read_text(encoding="utf-8"))
TWO = (("olmoe-tiny", "olmoe", 0), ("qwen2-moe-tiny", "qwen2-moe", 0))


def losing(found, model, task, more):
    """Return the results with so many more answers of MoBiLE wrong on one task of one model."""

    def worse(record):
        if (record.model, record.task, record.strategy) != (model, task, "mobile"):
            return record
        right = [i.doc for i in record.items if i.correct][:more]
        return replace(record, items=tuple(replace(i, correct=i.correct and i.doc not in right) for i in record.items))

    return replace(found, records=tuple(map(worse, found.records)))


def test_the_worst_task_is_the_one_with_the_lowest_difference():
    found = losing(results(Rule()), "olmoe-tiny", "web_of_lies", 3)
    mobile = found.select(model="olmoe-tiny", strategy="mobile", gamma=0.7, budget="smallest")
    worst = worst_task(mobile, found.select(model="olmoe-tiny", strategy="resident"))
    assert (worst.task, worst.loss.lost) == ("web_of_lies", 5)
    assert worst.in_words.startswith(f"{worst.short} [")
    assert worst.short == f"web_of_lies {-100 * 5 / ITEMS:+.1f}"


@pytest.mark.parametrize("models", [TWO[:1], TWO])
def test_the_worst_task_stands_beside_the_pooled_difference_of_the_opening_and_the_verdict(models):
    found = losing(results(Rule(models=models)), models[-1][0], "web_of_lies", 3)
    for text in (sentences.opening(found, PAPER)[1], sentences.verdict(found, PAPER)):
        assert "(worst task web_of_lies -12.5 [" in text
        assert (f"], {models[-1][0]})" in text) == (len(models) > 1)


def test_the_verdict_is_one_sentence_and_a_projection_says_so():
    text = sentences.verdict(results(Rule(models=TWO)), PAPER)
    assert text.startswith("Projected, so not judged by the paper: MoBiLE ran 1.60 times as fast")
    assert text.endswith("that the loss is within 1 point is shown for 0 of 2 families.")
    assert ". " not in text


def test_the_verdict_of_a_measurement_counts_what_was_judged():
    text = sentences.verdict(results(Rule(scope="gpu+pcie", weights="real", gpu={"name": "a card"})), PAPER)
    assert text.startswith("Measured (gpu+pcie, real), speed ")
    assert "REPRODUCED in " in text
    other = sentences.verdict(results(Rule(scope="gpu+throttled", weights="real")), PAPER)
    assert other.startswith("Measured (gpu+throttled, real), so not judged by the paper: ")


def test_a_broken_control_leaves_no_verdict():
    assert "can be trusted" in sentences.verdict(results(Rule(canary_correct=ITEMS)), PAPER)

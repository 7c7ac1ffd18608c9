"""Where little and big pass write the same token: known of fallbacks only, and by row as of the row alone."""

from __future__ import annotations

import pytest
from conftest import greedy, prompt, tiny
from test_two_pass import between

import mobile
from mobile.policies.big_little import MOBILE
from mobile.policies.strategy import BigLittle
from mobile.replay.trace import Step
from suites.measure.replayed import confidences, doubts
from suites.record_fields import DOUBT_EDGES
from suites.scoring.agreement import BothPasses


def step(kind: str, confidence: float | None = None) -> Step:
    return Step(kind, 1, ((0,),), confidence=confidence)


def test_each_row_of_a_batch_agrees_where_it_agrees_alone(family):
    model, ids = tiny(family), prompt(rows=4)
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    mobile.attach(model, MOBILE, slots=8)
    with model.mobile.gated(BigLittle(0.0)), model.mobile.recording() as requests:
        greedy(model, ids)
    gamma = between([each.confidence for request in requests for each in request if each.kind == "little"])
    with model.mobile.gated(BigLittle(gamma)):
        together = BothPasses()
        with model.mobile.recording() as requests, model.mobile.comparing(together):
            greedy(model, ids)
        found = together.by_row(requests)
        for row in range(4):
            alone = BothPasses()
            with model.mobile.comparing(alone):
                greedy(model, ids[row : row + 1])
            assert found[row] == [alike[0] for alike in alone.alike]
    every = [alike for row in found for alike in row]
    assert {True, False} == set(every)
    assert len({len(row) for row in found}) > 1


def test_rows_that_end_or_fall_back_in_other_steps_keep_their_own():
    both = BothPasses()
    both.alike = [
        {0: True, 1: False},
        {0: False, 1: True},
        {1: True},
    ]  # row 0 left before the last
    ends = [step("prefill"), step("little"), step("big"), step("little")]
    goes_on = [step("prefill"), step("little"), step("little"), step("little"), step("big"), step("little")]
    assert both.by_row([ends, [*goes_on, step("big")]]) == [[True], [True, True]]
    with pytest.raises(ValueError, match="3 big passes were compared, and 1 were recorded"):
        both.by_row([ends, goes_on[:3]])


def test_tokens_are_counted_once_and_disagreements_at_fallbacks_only():
    first = [step("little", 1.0), step("little", 0.5), step("big", 0.5), step("little", 0.9)]
    second = [step("little", 0.4), step("big", 0.4), step("little", 0.2), step("big", 0.2)]
    rows = doubts([first, second], [[1], [0, 1]])
    assert [row[0] for row in rows] == list(DOUBT_EDGES)
    assert {tuple(row) for row in rows if row[1]} == {
        (0.0, 1, 0, 0),
        (0.05623, 1, 0, 0),  # 1 - 0.9 in floating point lies below 0.1
        (0.3162, 1, 1, 0),
        (0.5623, 2, 2, 1),
    }
    unknown = doubts([first, second], [None, None])
    assert [row[:3] for row in unknown] == [row[:3] for row in rows]
    assert {row[3] for row in unknown} == {None}
    assert doubts([[step("prefill"), step("full")]], [[]]) is None
    assert sum(count for _, count in confidences([first, second])) == 5

"""Traces: what is written is read back; anything else is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobile import trace
from mobile.refusal import Refused
from mobile.trace import Step

LAYERS = 3
ids = st.lists(st.integers(0, 127), unique=True, max_size=8).map(lambda x: tuple(sorted(x)))
per_layer = st.tuples(*[ids] * LAYERS)
decode = st.builds(
    Step, kind=st.sampled_from(["full", "little"]), tokens=st.just(1), experts=per_layer,
    confidence=st.none() | st.floats(0, 1),
)  # fmt: skip
big = st.builds(Step, kind=st.just("big"), tokens=st.just(1), experts=per_layer, confidence=st.floats(0, 1),
                predicted=per_layer)  # fmt: skip


@given(st.lists(st.lists(decode | big, max_size=4), max_size=4))
def test_a_saved_trace_reads_back_the_same(tmp_path_factory, requests):
    path = tmp_path_factory.mktemp("trace") / "t.npz"
    trace.save(path, requests, LAYERS, {"note": "x"})
    assert trace.load(path) == (requests, {"note": "x"})


def test_prefill_counts_are_kept(tmp_path):
    step = Step("prefill", 9, ((1, 2), (3,), (0,)), ((4, 5), (9,), (9,)))
    trace.save(tmp_path / "t.npz", [[step]], LAYERS, {})
    assert trace.load(tmp_path / "t.npz")[0] == [[step]]


def test_a_truncated_or_foreign_file_is_refused(tmp_path):
    path = tmp_path / "t.npz"
    trace.save(path, [[Step("full", 1, ((1,), (2,), (3,)))]] * 50, LAYERS, {})
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a trace"):
        path.write_bytes(content)
        with pytest.raises(Refused, match="not a complete mobile-trace-2 file"):
            trace.load(path)
    with pytest.raises(Refused, match="record it again"):
        trace.load(tmp_path / "absent.npz")

"""Traces: what is written is read back; anything else is refused."""

from __future__ import annotations

import io
import json
import re
import zipfile
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mobile.errors import Refused
from mobile.replay import trace
from mobile.replay.trace import Step

LAYERS = 3
ids = st.lists(st.integers(0, 127), unique=True, max_size=8).map(lambda x: tuple(sorted(x)))
per_layer = st.tuples(*[ids] * LAYERS)
decode = st.builds(
    Step,
    kind=st.sampled_from(["full", "little"]),
    tokens=st.just(1),
    experts=per_layer,
    confidence=st.none() | st.floats(0, 1),
)
big = st.builds(
    Step, kind=st.just("big"), tokens=st.just(1), experts=per_layer, confidence=st.floats(0, 1), predicted=per_layer
)


@given(st.lists(st.lists(decode | big, max_size=4), max_size=4))
def test_a_saved_trace_reads_back_the_same(tmp_path_factory, requests):
    path = tmp_path_factory.mktemp("trace") / "t.npz"
    trace.save(path, requests, LAYERS, {"note": "x"})
    assert trace.load(path) == (requests, {"note": "x"})


def test_prefill_counts_are_kept(tmp_path):
    step = Step("prefill", 9, ((1, 2), (3,), (0,)), ((4, 5), (9,), (9,)))
    trace.save(tmp_path / "t.npz", [[step]], LAYERS, {})
    assert trace.load(tmp_path / "t.npz")[0] == [[step]]


EXPERTS = 128
signals = arrays(np.float16, (LAYERS - 1, EXPERTS), elements=st.floats(width=16, allow_nan=False))
told = (decode | big).flatmap(lambda step: (st.none() | signals).map(lambda ahead: replace(step, ahead=ahead)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(told, max_size=3), max_size=3))
def test_what_lookaheads_guess_from_reads_back_to_the_bit(tmp_path_factory, requests):
    path = tmp_path_factory.mktemp("trace") / "t.npz"
    trace.save(path, requests, LAYERS, {"geometry": {"moe_layers": LAYERS, "experts": EXPERTS}})
    read = trace.load(path)[0]
    assert read == requests
    for step, again in zip(chain(*requests), chain(*read), strict=True):
        assert (step.ahead is None) == (again.ahead is None)
        if step.ahead is not None:
            assert again.ahead.dtype == np.float16
            assert again.ahead.tobytes() == step.ahead.tobytes()


def test_a_prompt_of_more_tokens_than_16_bits_count_is_kept(tmp_path):
    step = Step("prefill", 100_000, ((1,), (3,), (0,)), ((100_000,),) * 3)
    trace.save(tmp_path / "t.npz", [[step]], LAYERS, {})
    assert trace.load(tmp_path / "t.npz")[0] == [[step]]


# --- refusals ---------------------------------------------------------------------------------------

SOUND = [
    [Step("prefill", 9, ((1, 2), (3,), (0,)), ((4, 5), (9,), (9,)))],
    [
        Step("little", 1, ((1,), (2,), (3,)), (), 0.5, ahead=np.zeros((LAYERS - 1, 8), np.float16)),
        Step("big", 1, ((1, 2), (2,), (3, 4)), (), 0.5, ((1,), (2,), (5,))),
    ],
]
ABOUT = {"geometry": {"moe_layers": LAYERS, "experts": 8}}


@pytest.fixture
def altered(tmp_path):
    """A sound file with its header or arrays changed."""

    def make(header=(), **arrays) -> Path:
        path = tmp_path / "t.npz"
        trace.save(path, SOUND, LAYERS, ABOUT)
        with np.load(path) as archive:
            data = {name: archive[name] for name in archive.files}
        told = {**json.loads(data["header"].tobytes()), **dict(header)}
        data["header"] = np.frombuffer(json.dumps(told).encode(), np.uint8)
        for name, change in arrays.items():
            data[name] = change(data[name].copy()) if callable(change) else change
        np.savez_compressed(path, **data)
        return path

    return make


def put(value, at=0):
    def change(array):
        array[at] = value
        return array

    return change


def test_an_unaltered_file_is_sound(altered):
    assert trace.load(altered())[0] == SOUND


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"request_steps": put(7)}, "requests' steps do not add up"),
        ({"request_steps": lambda a: a.astype(np.int64)}, "request_steps is not uint32"),
        ({"kind": put(4)}, "a kind of step that there is not"),
        ({"tokens": put(0)}, "no tokens"),
        ({"tokens": lambda a: a[:-1]}, "unequal number"),
        ({"confidence": put(1.5, 1)}, "not a probability"),
        ({"confidence": put(np.inf, 1)}, "not a probability"),
        ({"experts_lengths": put(3)}, "lengths of experts do not add up"),
        ({"experts_lengths": lambda a: a[:-1]}, "rows of experts"),
        ({"experts_values": put(8, 1)}, "not below 8"),
        ({"experts_values": put(2)}, "ascending"),
        ({"predicted_values": put(9)}, "not below 8"),
        ({"counts_lengths": put(1), "counts_values": lambda a: a[1:]}, "do not pair up"),
        ({"counts_values": put(0)}, "no tokens"),
        ({"predicted_lengths": lambda a: np.roll(a, 3)}, "belongs to no fallback"),
        ({"ahead_steps": put(3)}, "belongs to no step"),
        ({"ahead": np.zeros((1, LAYERS, 8), np.float16)}, "one signal for each layer but the last"),
        ({"ahead": np.zeros((1, LAYERS - 1, 9), np.float16)}, "does not cover 8"),
        ({"ahead": np.zeros((1, 8), np.float16)}, "with 3 axes"),
        ({"stranger": np.zeros(1)}, "not those of the format"),
    ],
)
def test_arrays_that_do_not_add_up_are_refused_in_one_sentence(altered, arrays, says):
    with pytest.raises(Refused) as refused:
        trace.load(altered(**arrays))
    assert says in str(refused.value)
    assert str(refused.value).endswith("; record it again.")


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"layers": 0}, "not a count"),
        ({"layers": True}, "not a count"),
        ({"layers": 2}, "rows of experts"),
        ({"about": []}, "not an object"),
        ({"about": {"geometry": {"moe_layers": 4, "experts": 8}}}, "not that of its layers"),
        ({"about": {"geometry": 3}}, "not that of its layers"),
        ({"format": "mobile-trace-1"}, "record it again with `mobile trace`"),
        ({"format": "mobile-trace-3"}, "update mobile-moe"),
        ({"format": 2}, "calls itself '2'"),
        ({"format": "x"}, "calls itself 'x'"),
    ],
)
def test_a_header_that_cannot_be_is_refused(altered, header, says):
    with pytest.raises(Refused, match=re.escape(says)):
        trace.load(altered(header))


def test_a_size_that_the_bytes_do_not_bear_out_is_never_allocated(tmp_path, altered):
    """An .npy header may claim any shape: 2**60 numbers here, behind a few bytes."""
    path, forged = altered(), tmp_path / "forged.npz"
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<u2", "fortran_order": False, "shape": (2**60,)})
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(forged, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, head.getvalue() if name == "experts_values.npy" else old.read(name))
    with pytest.raises(Refused, match="experts_values is not as long as it says"):
        trace.load(forged)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_file_is_refused_or_reads_back_the_same(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("trace") / "t.npz"
    trace.save(path, SOUND, LAYERS, ABOUT)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.integers(len(whole) - 30, len(whole)))])
    try:
        read, _ = trace.load(path)
    except Refused:
        return
    assert read == SOUND


def test_what_does_not_add_up_is_not_written_and_leaves_no_file(tmp_path):
    with pytest.raises(Refused, match="ascending"):
        trace.save(tmp_path / "t.npz", [[Step("full", 1, ((2, 1), (2,), (3,)))]], LAYERS, {})
    assert list(tmp_path.iterdir()) == []


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

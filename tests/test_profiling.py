"""A profile's time is told apart by what ran: on a trace as a GPU leaves it, and on a real one of this processor."""

from __future__ import annotations

import json
import sys

import pytest

from mobile.errors import Refused
from suites.__main__ import main
from suites.measure.profile import Breakdown, Span, breakdown, spans_of, window_of


def event(cat: str, name: str, ts: float, dur: float, **more) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 1, **more}


def launched(number: int, at: float, cat: str, name: str, ts: float, dur: float) -> list[dict]:
    """A kernel or copy on the device and the call that launched it."""
    of = {"args": {"correlation": number}}
    return [event("cuda_runtime", "cudaLaunchKernel", at, 1, **of), event(cat, name, ts, dur, **of)]


GPU = [
    event("user_annotation", "mobile: prefill pass", 0, 90),
    event("user_annotation", "mobile: full pass", 100, 60),
    event("user_annotation", "mobile: experts", 120, 20),
    *launched(1, 50, "kernel", "gemm of prefill", 60, 10),
    *launched(2, 105, "kernel", "norm", 110, 10),
    *launched(3, 121, "gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 122, 28),
    *launched(4, 125, "kernel", "gemv", 140, 30),
    *launched(5, 150, "gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 175, 5),
]


def test_a_gpus_trace_is_read_by_what_launched_each_kernel():
    window = window_of(GPU)
    assert window == (100, 180)
    found = breakdown(spans_of(GPU), window, tokens=1)
    assert found.wall_ms == pytest.approx(0.080)
    assert found.kinds_ms == pytest.approx({"copies": 0.028, "expert kernels": 0.030, "other kernels": 0.015})
    assert found.alone_ms == pytest.approx(0.080 - 0.063)  # 110-120, 122-170, 175-180 were not


def test_what_overlaps_counts_once_and_what_lies_outside_not_at_all():
    spans = [Span("copies", -5, 5), Span("copies", 4, 8), Span("other kernels", 6, 9), Span("expert kernels", 20, 30)]
    kinds = {"copies": 0.008, "expert kernels": 0.0, "other kernels": 0.003}
    assert breakdown(spans, (0, 10), 1) == Breakdown(1, 0.01, kinds, pytest.approx(0.001))


def test_a_trace_without_a_decode_pass_is_refused():
    with pytest.raises(Refused, match="no decode pass"):
        window_of(GPU[:1])


def test_without_a_gpu_operators_that_others_call_count_once():
    events = [
        event("user_annotation", "mobile: full pass", 0, 100),
        event("user_annotation", "mobile: experts", 40, 30),
        event("cpu_op", "aten::linear", 10, 20),
        event("cpu_op", "aten::addmm", 12, 10),
        event("cpu_op", "aten::linear", 45, 20),
    ]
    assert spans_of(events) == [Span("other kernels", 10, 30), Span("expert kernels", 45, 65)]


def test_the_command_profiles_a_narrow_model_on_this_processor(tmp_path, monkeypatch, capsys):
    argv = [
        "suites",
        "profile",
        "--geometry",
        "olmoe-1b-7b",
        "--layers",
        "2",
        "--shrink",
        "16",
        "--link",
        "paced",
        "--tokens",
        "3",
        "--strategy",
        "on-demand-overlap",
        "--out",
        str(tmp_path / "profile"),
    ]
    monkeypatch.setattr(sys, "argv", argv)
    assert main() == 0
    out = capsys.readouterr().out
    assert "expert kernels" in out
    assert "neither: the host alone" in out
    found = json.loads((tmp_path / "profile/breakdown.json").read_text())
    assert found["tokens"] == 3
    assert all(ms > 0 for ms in found["kinds_ms"].values())
    assert 0 < found["alone_ms"] < found["wall_ms"]
    names = {e.get("name") for e in json.loads((tmp_path / "profile/trace.json").read_text())["traceEvents"]}
    assert {"mobile: experts", "mobile: full pass", "mobile: prefill pass"} <= names


def test_what_cannot_be_profiled_is_refused(monkeypatch, capsys, tmp_path):
    asked = ["suites", "profile", "--geometry", "olmoe-1b-7b", "--link", "paced", "--out", str(tmp_path)]
    for more, says in ((["--tokens", "0"], "positive number"), (["--geometry", "gpt-9"], "Unknown geometry")):
        monkeypatch.setattr(sys, "argv", [*asked, *more])
        assert main() == 2
        assert says in capsys.readouterr().err

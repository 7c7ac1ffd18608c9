"""Traces and hardware profiles from strangers: refused in one sentence, at once, and in little memory."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path
from random import Random

import numpy as np
import pytest

from baselines.signals import ridge, sensitivity
from mobile.costs.cost_model import CostModel
from mobile.costs.geometry import GEOMETRIES
from mobile.costs.hardware import PROFILES, HardwareProfile, profile
from mobile.errors import Refused
from mobile.replay import trace, trace_file
from mobile.replay.trace import Step
from tests import absurd

TRIES = 1000
LAYERS, EXPERTS = 3, 8
REQUESTS = [
    [Step("prefill", 9, ((1, 2), (3,), (0,)), ((4, 5), (9,), (9,)))],
    [
        Step("little", 1, ((1,), (2,), (3,)), (), 0.5, ahead=np.zeros((LAYERS - 1, EXPERTS), np.float16)),
        Step("big", 1, ((1, 2), (2,), (3, 4)), (), 0.5, ((1,), (2,), (5,))),
    ],
]
ABOUT = {"geometry": {"moe_layers": LAYERS, "experts": EXPERTS}, "strategy": "mobile", "docs": [3, 5]}


@pytest.fixture
def members(tmp_path) -> dict[str, bytes]:
    """Return the members of a sound trace."""
    trace.save(tmp_path / "sound.npz", REQUESTS, LAYERS, ABOUT)
    with zipfile.ZipFile(tmp_path / "sound.npz") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(members: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", how) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return made.getvalue()


def array(values, dtype) -> bytes:
    made = io.BytesIO()
    np.save(made, np.asarray(values).astype(dtype))
    return made.getvalue()


def refusal(path: Path) -> str:
    with pytest.raises(Refused) as refused:
        trace.load(path)
    told = str(refused.value)
    assert told.isprintable()
    assert len(told) < 500
    return told


def test_absurd_traces_are_refused_or_read(members, tmp_path):
    """Each is a sound zip file, so that what is in it is what is refused."""
    path, random, read = tmp_path / "t.npz", Random(7), 0
    header = json.loads(members["header.npy"][128:])
    for number in range(TRIES):
        changed = dict(members)
        name = random.choice(sorted(members))
        if number % 3 == 0:
            content = absurd.text(absurd.changed(header, random))
            changed["header.npy"] = array(np.frombuffer(content, np.uint8), np.uint8)
        elif number % 3 == 1:
            found = np.load(io.BytesIO(members[name]))
            flat = found.reshape(-1).copy()
            if len(flat):
                flat[random.randrange(len(flat))] = random.choice([0, 1, 2, 255])
            changed[name] = array(flat.reshape(found.shape), found.dtype)
        else:
            changed[name] = absurd.spoiled(members[name], random)
        path.write_bytes(zipped(changed))
        try:
            requests, about = trace.load(path)
            read += 1
            assert all(step.tokens > 0 and len(step.experts) == LAYERS for steps in requests for step in steps)
            assert isinstance(about, dict)
        except Refused as refused:
            told = str(refused)
            assert told.isprintable(), told
    assert 10 < read < TRIES / 2


def test_a_trace_that_claims_more_than_routing_can_be_is_refused_before_it_is_read(members, tmp_path):
    """Deflate makes a hundred million zeros of 100 kB; a confidence for each step is the largest array of them."""
    path, steps = tmp_path / "bomb.npz", 20_000_000
    many = {"kind": np.uint8, "confidence": np.float64}
    changed = members | {f"{name}.npy": array(np.zeros(steps), dtype) for name, dtype in many.items()}
    path.write_bytes(zipped(changed, zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 2**20
    told = refusal(path)
    assert "'confidence' (160,000,128)" in told
    assert "its arrays claim more than" in told


def test_a_long_trace_that_repeats_itself_is_read(tmp_path):
    """The most regular routing there is: the same expert in every layer of 20,000 steps, and no router logits."""
    path = tmp_path / "long.npz"
    trace.save(path, [[Step("full", 1, ((1,),) * 16)] * 20_000], 16, {})
    expansion = sum(info.file_size for info in zipfile.ZipFile(path).infolist()) / path.stat().st_size
    assert expansion > trace_file.MOST_EXPANSION_OF_ALL
    assert len(trace.load(path)[0][0]) == 20_000


@pytest.mark.parametrize("how", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(members, tmp_path, how):
    (tmp_path / "t.npz").write_bytes(zipped(members, how))
    assert "is not deflated" in refusal(tmp_path / "t.npz")


def test_a_member_twice_is_refused(members, tmp_path):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("kind.npy", members["kind.npy"])
    (tmp_path / "t.npz").write_bytes(made.getvalue())
    assert "its arrays are not those of the format" in refusal(tmp_path / "t.npz")


@pytest.mark.parametrize("layers", [10**30, 2**63, 10**6])
def test_a_number_of_layers_that_cannot_be_is_refused(members, tmp_path, layers):
    header = {**json.loads(members["header.npy"][128:]), "layers": layers, "about": {}}
    empty = {
        name: array(np.load(io.BytesIO(members[name]))[:0], np.load(io.BytesIO(members[name])).dtype)
        for name in members
    }
    content = np.frombuffer(json.dumps(header).encode(), np.uint8)
    (tmp_path / "t.npz").write_bytes(zipped({**empty, "header.npy": array(content, np.uint8)}))
    refusal(tmp_path / "t.npz")


def test_what_is_no_file_in_a_files_place_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("pipe.npz", "folder.npz"):
        if name == "folder.npz":
            (tmp_path / name).mkdir()
        assert "no regular file" in (told := refusal(tmp_path / name)) or "directory" in told
    with pytest.raises(Refused, match="no regular file"):
        profile(str(tmp_path / "pipe.json"))
    done = subprocess.run(
        [sys.executable, "-m", "mobile", "replay", tmp_path / "pipe.npz", "--strategy", "lru"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


# --- profiles -----------------------------------------------------------------------------------------


def test_absurd_profiles_are_refused_or_can_be_computed_with(tmp_path):
    path, random, read = tmp_path / "card.json", Random(8), 0
    data = json.loads(json.dumps(asdict(PROFILES["rtx4080-pcie4"])))
    for number in range(TRIES):
        content = absurd.text(absurd.changed(data, random))
        path.write_bytes(content if number % 4 else absurd.spoiled(content, random))
        try:
            card = profile(str(path))
        except Refused as refused:
            assert "card.json" in str(refused)  # noqa: PT017
            assert "\n" not in str(refused)  # noqa: PT017
            continue
        read += 1
        assert isinstance(card, HardwareProfile)
        cost = CostModel(card, GEOMETRIES["olmoe-1b-7b"])
        assert min(cost.dense_ns(1), cost.expert_ns(1)) >= 0
    assert 10 < read < TRIES / 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"link_gb_per_s": 5e-324}, "link_gb_per_s cannot be 5e-324"),
        ({"memory_gb_per_s": 1e300}, r"memory_gb_per_s cannot be 1e\+300"),
        ({"vram_nbytes": 2**63}, "vram_nbytes cannot be inf"),
        ({"launch_seconds": 1e9}, "launch_seconds cannot be 1000000000.0"),
        ({"tflops": []}, r"tflops cannot be \[\]"),
    ],
)
def test_a_field_of_a_profile_is_named_beside_its_file(tmp_path, change, says):
    data = {**asdict(PROFILES["rtx4080-pcie4"]), **change}
    (tmp_path / "card.json").write_text(json.dumps(data))
    with pytest.raises(Refused, match=rf"card\.json is no hardware profile: {says}"):
        profile(str(tmp_path / "card.json"))


@pytest.mark.parametrize(
    "text", ['{"name": "a", "name": "b"}', '{"tflops": NaN}', "[" * 100_000, "\ufeff{}", " " * 2**21]
)
def test_a_profile_that_is_not_strict_json_is_refused(tmp_path, text):
    (tmp_path / "card.json").write_text(text, encoding="utf-8")
    with pytest.raises(Refused, match=r"card\.json") as refused:
        profile(str(tmp_path / "card.json"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("load", [ridge.Predictor.load, sensitivity.Measured.load])
def test_what_strategies_read_is_refused_in_a_sentence(members, tmp_path, load):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "list").write_text("[]")
    (tmp_path / "deep").write_text("[" * 100_000)
    (tmp_path / "array").write_bytes(array([1], np.uint8))
    header = array(np.frombuffer(b"[]", np.uint8), np.uint8)
    (tmp_path / "odd").write_bytes(zipped({"header.npy": header}))
    (tmp_path / "other").write_bytes(zipped(members))
    for name in ("pipe", "list", "deep", "array", "odd", "other", "absent"):
        with pytest.raises(Refused, match="is not a complete"):
            load(tmp_path / name)

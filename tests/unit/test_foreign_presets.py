"""Presets from strangers: each key is of its type, each cell asked for once, or the preset is refused in a sentence."""

from __future__ import annotations

import json
import tomllib
from random import Random
from typing import Any

import pytest

from mobile.errors import Refused
from suites.identity import HERE
from suites.plan import preflight
from suites.plan.preset import presets, read_preset
from suites.record import RunFolder
from suites.run.runner import describe
from tests import absurd

TRIES = 1000
SMOKE = (HERE / "presets/smoke.toml").read_text(encoding="utf-8")


def toml(value: Any) -> str:
    """Return a value as TOML writes it; null, which TOML has not, as an empty text."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(str(name))} = {toml(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps("" if value is None else value).replace("\x7f", "\\u007f")


def refused(tmp_path, text: str) -> str:
    (tmp_path / "odd.toml").write_text(text, encoding="utf-8")
    with pytest.raises(Refused) as told:
        read_preset(str(tmp_path / "odd.toml"))
    return str(told.value)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("items = 32", "items = 1.5", "items must be a whole number, not 1.5"),
        ("items = 32", "items = true", "items must be a whole number, not true"),
        ("minutes = 2", "minutes = inf", "the number inf is none that a preset can have"),
        ("minutes = 2", "minutes = -1", "minutes must be a number above 0, not -1"),
        ("minutes = 2", "minutes = 2026-01-01", "2026-01-01 is a date or a time"),
        ("minutes = 2", "minutes = 2\nitmes = 3", "itmes is unknown"),
        ("seeds = [0]", 'seeds = "0123"', "seeds must be a list"),
        ("seeds = [0]", "seeds = [[]]", "seeds[0] must be a whole number"),
        ("seeds = [0]", f"seeds = [{10**30}]", "is none that a preset can have"),
        ('["smallest", "8GiB"]', "[8589934592]", "budgets[0] must be a text"),
        ('["smallest", "8GiB"]', '["smallest", "smallest"]', "asks twice for the cell"),
        ("gammas = []", "gammas = [0.9, 0.9]", "asks twice for the cell"),
        ("gammas = []", 'gammas = []\ncaches = ["lru"]\nshares = ["-5%"]', "Cannot read the share '-5%'"),
        ("gammas = []", f"gammas = {'[' * 5000}", "nested too deep"),
        ("gammas = []", f"gammas = []\nseeds = {list(range(30_000))}", "more than 20,000 cells"),
        ('canaries = ["object_counting"]', 'canaries = ["x"]', "'x' has a canary"),
        ('weights = "shipped-tiny"', "weights = 3", "models[0].weights must be a text"),
    ],
)
def test_a_key_that_cannot_be_is_named(tmp_path, old, new, says):
    text = SMOKE.replace("seeds = [0]\n", "") if "\nseeds" in new else SMOKE
    assert old in text
    told = refused(tmp_path, text.replace(old, new))
    assert says in told
    assert "\n" not in told


def test_what_a_preset_with_runs_asks_for_is_held_too(tmp_path):
    text = (HERE / "presets/shapes.toml").read_text(encoding="utf-8")
    for old, new, says in (
        ('links = ["native", 25, 12]', 'links = ["nan"]', "A link cannot be 'nan'; write \"native\", or a rate"),
        ('links = ["native", 25, 12]', "links = [true]", "A link cannot be True"),
        ("rates = [0.0, 0.05, 0.1, 0.2, 0.3, 0.5]", "rates = [1.5]", "cannot be 1.5"),
        ("seeds = [0]", "seeds = []", "asks for no cell"),
        ("repeats = 3", 'repeats = "3"', "repeats must be a whole number of at least 1"),
    ):
        assert old in text
        assert says in refused(tmp_path, text.replace(old, new))


def test_a_large_file_is_no_preset(tmp_path):
    assert "more than 1,048,576 are not read" in refused(tmp_path, "#" * 2**21)


def test_absurd_presets_are_refused_or_can_be_planned(tmp_path):
    random, told, whole = Random(8), [], {name: HERE / f"presets/{name}.toml" for name in presets()}
    data = {name: tomllib.loads(path.read_text(encoding="utf-8")) for name, path in whole.items()}
    path = tmp_path / "odd.toml"
    for number in range(TRIES):
        changed = absurd.changed(data[("smoke", "measured")[number % 2]], random)
        text = toml(changed)
        if isinstance(changed, dict):
            text = "\n".join(f"{toml(str(name))} = {toml(value)}" for name, value in changed.items())
        path.write_bytes(text.encode(errors="replace"))
        try:
            preset = read_preset(str(path))
            describe(preset, RunFolder(tmp_path / "run"))
            preflight.answer(preset)
        except Refused as refusal:
            told.append(str(refusal))
    assert TRIES / 2 < len(told) < TRIES
    assert not any("\n" in one for one in told)

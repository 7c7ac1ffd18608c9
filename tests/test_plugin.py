"""A stranger's package adds a strategy through the entry point, and a checkout has its own without being installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

import mobile
from mobile.cli import main
from mobile.policies import strategy

ROOT = Path(__file__).parent.parent
GROUP = "mobile.strategies"
OWN = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP])

PLUGIN = '''
"""First in, first out."""

from dataclasses import replace

from baselines.lru import LRU


class Fifo:
    def __init__(self, setting):
        self._arrived = {}

    def used(self, layer, keys):
        for key in keys:
            self._arrived.setdefault(key, len(self._arrived))

    def victim(self, pool, coming, *, protected):
        oldest = min(pool.evictable(protected=protected), key=lambda key: self._arrived.get(key, -1), default=None)
        self._arrived.pop(oldest, None)
        return oldest


FIFO = replace(LRU, name="strangers-fifo", summary="evict the oldest", source="a test", evict=Fifo)
'''

USE = """
import sys
sys.path.insert(0, {tests!r})
import torch
from conftest import greedy, prompt, tiny
import mobile
assert mobile.strategies()["strangers-fifo"].lossless
model, ids = tiny("olmoe"), prompt()
expected = greedy(model, ids)[1]
mobile.attach(model, "strangers-fifo", slots=6, poison=True)
assert torch.equal(greedy(model, ids)[1], expected)
print(model.mobile.stats()["hits"])
"""


def test_a_separate_package_adds_a_strategy(tmp_path):
    assert PLUGIN.count("\n") < 60
    (tmp_path / "fifo_plugin.py").write_text(PLUGIN)
    info = tmp_path / "fifo_plugin-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fifo-plugin\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[mobile.strategies]\nstrangers-fifo = fifo_plugin:FIFO\n")
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tmp_path), str(tests.parent)])
    code = USE.format(tests=str(tests))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


@pytest.fixture
def installed(monkeypatch):
    """Pretend that these are the entry points of all installed packages: (name, value, its distribution's name)."""

    def pretend(*points: tuple[str, str, str]) -> None:
        class Installed:
            def __init__(self, name: str) -> None:
                self.name = name

        made = [EntryPoint(name, value, GROUP)._for(Installed(package)) for name, value, package in points]
        monkeypatch.setattr(strategy, "entry_points", lambda group: EntryPoints(made))
        mobile.strategies.cache_clear()

    yield pretend
    mobile.strategies.cache_clear()


def test_a_checkout_that_is_not_installed_has_every_strategy_of_its_pyproject(installed):
    installed()
    assert set(mobile.strategies()) == OWN


def test_metadata_of_an_older_checkout_hides_no_strategy_of_this_one_and_adds_none(installed):
    installed(("gone", "baselines.gone:GONE", "mobile-moe"), ("lru", "baselines.lru:LRU", "mobile_moe"))
    assert set(mobile.strategies()) == OWN


def test_a_plug_in_stands_beside_the_strategies_of_a_checkout(installed, monkeypatch, tmp_path):
    (tmp_path / "first_out.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    installed(("strangers-fifo", "first_out:FIFO", "first-out"))
    assert set(mobile.strategies()) == OWN | {"strangers-fifo"}


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("import nothing_of_that_name", "cannot be imported .ModuleNotFoundError: No module named"),
        ("S =", "cannot be imported .SyntaxError"),
        ("import sys; sys.exit(3)", "cannot be imported .SystemExit: 3"),
        ("raise OSError('a\\n\\nb')", "cannot be imported .OSError: a.; uninstall it or mend it"),
        ("", "cannot be imported .AttributeError"),
        ("S = 5", "is not a mobile Strategy"),
        ("from mobile.policies import Strategy; S = Strategy(5, '', '', True)", "is not a mobile Strategy"),
        (
            "from mobile.policies import Strategy; S = Strategy('a+b', '', '', True)",
            "is named 'a.b', and . joins ",
        ),
    ],
)
def test_a_plug_in_that_fails_is_one_sentence(installed, monkeypatch, tmp_path, capsys, program, says):
    """Every command asks which strategies there are."""
    (tmp_path / "failing_plug_in.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "failing_plug_in", raising=False)
    installed(("S", "failing_plug_in:S", "failing"))
    assert main(["strategies"]) == 2
    assert re.search(f"^error: The plug-in failing_plug_in:S {says}.*\n$", capsys.readouterr().err)


@pytest.mark.parametrize("beside", [None, '[project]\nname = "another"\n', "no toml ["])
def test_outside_a_checkout_strategies_are_those_of_the_installed_packages(beside, installed, monkeypatch, tmp_path):
    if beside is not None:
        (tmp_path / "pyproject.toml").write_text(beside)
    monkeypatch.setattr(strategy, "CHECKOUT", tmp_path / "pyproject.toml")
    installed(("lru", "baselines.lru:LRU", "mobile-moe"))
    assert set(mobile.strategies()) == {"lru"}

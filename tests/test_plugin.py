"""A stranger's package adds a strategy through the entry point, and nothing of ours knows of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


FIFO = replace(LRU, name="fifo", summary="evict the oldest", source="a test", evict=Fifo)
'''

USE = """
import sys
sys.path.insert(0, {tests!r})
import torch
from conftest import greedy, prompt, tiny
import mobile
assert mobile.strategies()["fifo"].lossless
model, ids = tiny("olmoe"), prompt()
expected = greedy(model, ids)[1]
mobile.attach(model, "fifo", slots=6, poison=True)
assert torch.equal(greedy(model, ids)[1], expected)
print(model.mobile.stats()["hits"])
"""


def test_a_separate_package_adds_a_strategy(tmp_path):
    assert PLUGIN.count("\n") < 60
    (tmp_path / "fifo_plugin.py").write_text(PLUGIN)
    info = tmp_path / "fifo_plugin-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fifo-plugin\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[mobile.strategies]\nfifo = fifo_plugin:FIFO\n")
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tmp_path), str(tests.parent)])
    code = USE.format(tests=str(tests))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0

"""What the README tells a newcomer to do works: its sessions exist, its Python runs, its tables are true."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import mobile

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_sessions_it_names_exist():
    listed = subprocess.run(
        [sys.executable, "-m", "nox", "-l"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    named = set(re.findall(r"nox (?:--no-venv )?-s (\w+)", README))
    assert {"reproduce", "tests"} <= named
    assert all(re.search(rf"^[*-] {name}\b", listed, re.MULTILINE) for name in named)


def test_its_python_runs_and_leaves_nothing_behind(tmp_path):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    code = code.replace('"suites/models', f'"{ROOT}/suites/models')
    here, temporary = tmp_path / "here", tmp_path / "temporary"
    here.mkdir()
    temporary.mkdir()
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(temporary)}
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, env=offline)
    assert done.returncode == 0, done.stderr
    assert "fallbacks" in done.stdout
    assert list(here.iterdir()) == []
    (timeline,) = temporary.glob("*/timeline.json")
    assert json.loads(timeline.read_text())["traceEvents"]


def test_its_commands_run(tmp_path):
    """All but the server, which runs until it is told to stop: its --help; the chat gets one line."""
    (tmp_path / "suites").symlink_to(ROOT / "suites")
    (tmp_path / "prompts.txt").write_text("Q: not True is\n")
    lines = re.findall(r"^mobile (.+)$", README, re.MULTILINE)
    assert {line.split()[0] for line in lines} == {"plan", "doctor", "generate", "chat", "trace", "replay", "serve"}
    for line in lines:
        words = shlex.split(line)
        if words[0] == "serve":
            words = [*words, "--help"]
        done = subprocess.run(
            [sys.executable, "-m", "mobile", *words],
            cwd=tmp_path,
            input="hello\n",
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == 0, (line, done.stderr)


def test_its_table_of_strategies_is_the_registry():
    rows = dict(re.findall(r"^\| `([\w-]+)` \|.*\| (yes|no) \|$", README, re.MULTILINE))
    assert rows == {name: "yes" if s.lossless else "no" for name, s in mobile.strategies().items()}


def test_the_baselines_page_has_a_row_for_every_strategy():
    page = (ROOT / "baselines/README.md").read_text()
    rows = dict(re.findall(r"^\| `([\w-]+)` \|.*\| (yes|no) \|[^|]*\|[^|]*\|$", page, re.MULTILINE))
    registered = {name: "yes" if s.lossless else "no" for name, s in mobile.strategies().items() if name != "resident"}
    assert rows == registered


def test_its_tree_names_modules_that_exist():
    tree = README.split("## Where things are")[1].split("```")[1]
    for room in ("mobile", "suites", "reports"):
        assert f"{room}/" in tree
    for name in re.findall(r"^  (\w+/?) ", tree, re.MULTILINE):
        assert list(ROOT.glob(f"*/{name.rstrip('/')}" + ("" if name.endswith("/") else ".py"))), name

"""An ASCII locale, optimised Python, folders with odd names: a run and its page are right, or refused at the start."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_run import PRESET, ROOT

import mobile
from mobile.live_model import compat
from mobile.machine.measure.random_model import random_model
from reports.data.results import read
from suites.measure import profile
from tests import report_runs
from tests.report_runs import Rule

MODEL = ROOT / "suites" / "models" / "olmoe-tiny"
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
NO_DOCSTRINGS = {"PYTHONOPTIMIZE": "2"}
ODD = os.fsdecode(b"[bold] [/x] \xff \xc3\xb6")  # console markup, no UTF-8, and no ASCII


def python(*words: str, cwd: Path, **surroundings: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **surroundings}
    return subprocess.run([sys.executable, "-m", *words], cwd=cwd, env=environment, capture_output=True)


@pytest.fixture
def odd(tmp_path) -> Path:
    """A folder with that name, where the file system takes it."""
    folder = tmp_path / ODD
    try:
        folder.mkdir(parents=True)
    except OSError:
        pytest.skip("the file system takes only names that are text")
    return folder


def test_a_run_is_right_with_an_ascii_locale_without_docstrings_and_in_an_odd_folder(odd, tmp_path):
    """All of them at once, from the live run to the page; the model's name is no ASCII either."""
    preset = PRESET.replace('["smallest", "7GiB", "8GiB"]', '["smallest"]').replace('"olmoe-tiny"', '"mödel [/x]"')
    (tmp_path / "tiny.toml").write_text(preset.replace('"static-half", ', ""), encoding="utf-8")
    surroundings = {**ASCII, **NO_DOCSTRINGS, "FORCE_COLOR": "1"}  # a bar is drawn
    words = ("suites", "run", "--preset", "tiny.toml", "--out", str(odd))
    done = python(*words, cwd=tmp_path, **surroundings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / "latest").read_bytes() == os.fsencode(odd) + b"\n"
    (record,) = read(odd).records
    assert record.model == "mödel [/x]"
    for verb in ("build", "verify"):
        done = python("reports", verb, cwd=tmp_path, **surroundings)
        assert done.returncode == 0, done.stdout + done.stderr
        assert b"[bold] [/x] \\udcff \\udcc3\\udcb6" in done.stdout
    assert "mödel [/x]" in (odd / "report.html").read_text(encoding="utf-8")


def test_a_page_is_built_and_checked_with_an_ascii_locale(tmp_path):
    report_runs.write(Rule(models=(("mödel 模型", "mödel", 0),)), tmp_path / "run")
    for verb, *more in (("build",), ("check",), ("expect", "--out", "kept"), ("gate", "--against", "kept")):
        done = python("reports", verb, "run", *more, cwd=tmp_path, **ASCII)
        assert done.returncode == (1 if verb == "check" else 0), done.stdout + done.stderr
        assert done.stderr == b""


def test_without_docstrings_a_model_is_refused_in_one_sentence(tmp_path):
    done = python("mobile", "plan", str(MODEL), cwd=tmp_path, **NO_DOCSTRINGS)
    assert done.returncode == 2
    said = done.stderr.decode()
    assert said.startswith("error: Transformers makes no model under python -OO")
    assert said.count("\n") == 1


def test_without_docstrings_every_door_to_a_model_is_closed(monkeypatch):
    monkeypatch.setattr(compat, "sys", SimpleNamespace(flags=SimpleNamespace(optimize=2)))
    doors = (
        lambda: mobile.load(MODEL),
        lambda: random_model(torch.device("cpu"), torch.float32, 1, 128, 8, 4, 2),
        lambda: profile.profile(SimpleNamespace()),
    )
    for door in doors:
        with pytest.raises(mobile.Refused, match="no model under python -OO"):
            door()


@pytest.mark.parametrize("module", ["mobile", "suites", "reports", "suites.abba"])
def test_help_needs_no_docstrings(tmp_path, module):
    assert python(module, "--help", cwd=tmp_path, **NO_DOCSTRINGS).returncode == 0


def test_a_prompt_is_utf8_also_where_the_locale_says_ascii(tmp_path):
    words = ("mobile", "generate", str(MODEL), "hé", "--max-new-tokens", "2", "--json")
    done = python(*words, cwd=tmp_path, **ASCII)
    assert done.returncode == 0, done.stderr
    assert b'"prompt": "h\\u00e9"' in done.stdout


# --- encodings ---------------------------------------------------------------------------------------


def unnamed(source: str) -> list[int]:
    """Return the lines of calls that read or write text in whatever encoding the locale has."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or any(word.arg == "encoding" for word in call.keywords):
            continue
        function, words = ast.unparse(call.func), {word.arg for word in call.keywords}
        name, texts = function.rpartition(".")[2], [a.value for a in call.args if isinstance(a, ast.Constant)]
        modes = [text for text in texts if isinstance(text, str) and set(text) <= set("rwxabt+")]
        opens = name == "fdopen" or function == "open" or (name == "open" and function != "os.open" and bool(modes))
        binary = any("b" in mode for mode in modes)
        reads = name == "read_text" and not call.args and function != "package.read_text"
        if reads or name == "write_text" or (opens and not binary) or {"text", "universal_newlines"} & words:
            found.append(call.lineno)
    return found


def test_every_text_file_and_every_pipe_names_its_encoding():
    """Ruff's rule for this knows only paths whose type it can see."""
    rooms = [path for room in ("mobile", "baselines", "suites", "reports") for path in (ROOT / room).rglob("*.py")]
    for path in rooms:
        lines = unnamed(path.read_text(encoding="utf-8"))
        assert not lines, f"{path}: {lines}"
    assert unnamed("path.read_text()\nopen(path)\nsubprocess.run(words, text=True)") == [1, 2, 3]

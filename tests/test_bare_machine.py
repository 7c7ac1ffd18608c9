"""A checkout on a machine with torch, Transformers and pytest alone: all that a first run on a card needs starts."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from suites.first_contact.parts import REHEARSAL
from tests.bare_machine import GIVEN, ROOT, bare, given_modules, python


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> dict[str, str]:
    return bare(tmp_path_factory.mktemp("bare"))


def test_what_is_imported_at_the_start_comes_with_the_three_packages():
    """The progress bar and the lock of a run come with Transformers and torch, unasked for."""
    assert {*GIVEN, "rich", "filelock", "numpy"} <= given_modules()
    assert not {"psutil", "hypothesis", "lm_eval", "scipy", "matplotlib", "pynvml", "accelerate"} & given_modules()


@pytest.mark.parametrize("module", ["psutil", "hypothesis", "pytest_benchmark", "lm_eval", "accelerate", "matplotlib"])
def test_the_bare_python_refuses_everything_else(bare_python, module):
    pytest.importorskip(module)
    done = subprocess.run([sys.executable, "-c", f"import {module}"], env=bare_python, capture_output=True, text=True)
    assert "ModuleNotFoundError" in done.stderr


def imports_of(path: Path) -> set[str]:
    """Return the first names of all modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def test_tests_that_need_a_gpu_import_nothing_else_not_even_once_they_run():
    """Here they are skipped, so that an import inside of one would be found on a card only."""
    tests = {path.stem for path in (ROOT / "tests").rglob("*.py")}
    known = {*sys.stdlib_module_names, *given_modules(), *tests, "tests", "mobile", "baselines", "suites", "reports"}
    for path in (ROOT / "tests" / "gpu").glob("test_*.py"):
        assert imports_of(path) <= known, path.name


def test_tests_that_need_a_gpu_are_read_and_skipped(bare_python):
    done = python("pytest", "tests/gpu", "-p", "no:cacheprovider", environment=bare_python)
    assert done.returncode == 0, done.stdout + done.stderr
    if not torch.cuda.is_available():
        assert re.search(r"^\d+ skipped", done.stdout, re.MULTILINE)


def test_commands_run_uninstalled_from_any_folder(bare_python, tmp_path):
    """Strategies are found by name, though there are no entry points."""
    asked = {
        "plan": ("suites", "plan", "--preset", "shapes"),
        "run": ("suites", "run", "--preset", str(REHEARSAL), "--link", "virtual", "--only", "native recorded"),
        "profile": (
            *("suites", "profile", "--geometry", "olmoe-1b-7b", "--strategy", "mobile", "--layers", "2"),
            *("--shrink", "16", "--link", "paced", "--tokens", "2"),
        ),
        "calibrate": ("mobile", "doctor", "--calibrate", "--json", "--device", "cpu"),
        "help": ("suites", "first-contact", "--help"),
    }
    done = {name: python(*words, environment=bare_python, cwd=tmp_path) for name, words in asked.items()}
    for name, one in done.items():
        assert one.returncode == 0, (name, one.stdout + one.stderr)
    assert "together about" in done["plan"].stdout
    assert "2 of 2 cells have records" in done["run"].stdout
    assert "expert kernels" in done["profile"].stdout
    assert json.loads(done["calibrate"].stdout)["profile"]["link_gb_per_s"] > 0
    assert "exit code: 0 if every part" in done["help"].stdout

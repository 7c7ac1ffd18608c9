"""Who may import whom, and what must not need torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_rooms_import_in_one_direction_and_in_no_circle():
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "module",
    [
        "mobile",
        "mobile.links.registry",
        "mobile.replay.trace",
        "suites.budget",
        "suites.plan.preset",
        "suites.run.worker",
        "reports.pages.content",
    ],
)
def test_budgets_replays_and_reports_need_no_torch(module):
    code = f"import {module}, sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_only_one_module_imports_lm_eval():
    rooms = [path for room in ("mobile", "baselines", "suites", "reports") for path in (ROOT / room).rglob("*.py")]
    assert [
        path.name
        for path in rooms
        if "lm_eval" in path.read_text().split("import", 1)[-1]
        and any(line.startswith(("import lm_eval", "from lm_eval")) for line in path.read_text().splitlines())
    ] == ["lm_eval.py"]

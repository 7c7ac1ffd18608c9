"""The READMEs do not promise too much: sessions exist, Python and commands run, tables and paths are true."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import mobile
from reports.checks import readme
from reports.data.markdown_tables import columns, read_tables
from reports.data.results import read
from reports.sections.accuracy import KEPT
from reports.tables.accuracy import judged
from suites.plan.accuracy_cells import PAPERS, RANDOM, STATIC

ROOT = Path(__file__).parent.parent
PAGES = {
    name: (ROOT / name).read_text()
    for name in ("README.md", *(f"{room}/README.md" for room in ("baselines", "mobile", "suites", "reports")))
}
README = PAGES["README.md"]
EVERYTHING = "\n".join(PAGES.values())
GUIDE = (ROOT / ".github/CONTRIBUTING.md").read_text()


def test_the_sessions_it_names_exist():
    listed = subprocess.run(
        [sys.executable, "-m", "nox", "-l"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    named = set(re.findall(r"nox (?:--no-venv )?-s (\w+)", EVERYTHING + GUIDE))
    assert {"reproduce", "tests"} <= named
    assert all(re.search(rf"^[*-] {name}\b", listed, re.MULTILINE) for name in named)


@pytest.mark.parametrize("page", ["README.md", "mobile/README.md"])
def test_its_python_runs_and_leaves_nothing_behind(tmp_path, page):
    """The blocks of a page are one program."""
    code = "".join(re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL))
    code = code.replace('"suites/models', f'"{ROOT}/suites/models')
    here, temporary = tmp_path / "here", tmp_path / "temporary"
    here.mkdir()
    temporary.mkdir()
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(temporary)}
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, env=offline)
    assert done.returncode == 0, done.stderr
    assert list(here.iterdir()) == []
    if page == "README.md":
        assert "fallbacks" in done.stdout
        assert re.search(r"^at-random 0\.\d+$", done.stdout, re.MULTILINE)
        (timeline,) = temporary.glob("*/timeline.json")
        assert json.loads(timeline.read_text())["traceEvents"]


def test_its_commands_run(tmp_path):
    """All but the server, which runs until it is told to stop: its --help; the chat gets one line."""
    (tmp_path / "suites").symlink_to(ROOT / "suites")
    (tmp_path / "prompts.txt").write_text("Q: not True is\n")
    (tmp_path / "items.jsonl").write_text('{"prompt": "Q: not True is\\nA:", "answer": "False"}\n')
    lines = re.findall(r"^mobile (.+)$", EVERYTHING, re.MULTILINE)
    assert {line.split()[0] for line in lines} == {
        "plan",
        "doctor",
        "generate",
        "chat",
        "trace",
        "replay",
        "serve",
        "tune",
    }
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
    rows = dict(re.findall(r"^\| `([\w-]+)` \|.*\| (yes|no) \|$", PAGES["baselines/README.md"], re.MULTILINE))
    assert rows == {name: "yes" if s.lossless else "no" for name, s in mobile.strategies().items()}


def test_the_baselines_page_has_a_row_for_every_strategy():
    page = PAGES["baselines/README.md"]
    rows = dict(re.findall(r"^\| `([\w-]+)` \|.*\| (yes|no) \|[^|]*\|[^|]*\|$", page, re.MULTILINE))
    registered = {name: "yes" if s.lossless else "no" for name, s in mobile.strategies().items() if name != "resident"}
    assert rows == registered


@pytest.mark.parametrize("page", [*PAGES, ".github/CONTRIBUTING.md"])
def test_every_path_and_link_of_a_page_exists(page):
    """In backticks a path counts from the root or from the page's own folder, a link from the page's folder alone."""
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    for path in re.findall(r"`([\w.-]+(?:/[\w.-]+)*/?)`", text):
        if re.search(r"/|\.(py|md|toml)$", path) and not path.startswith("runs/") and "NAME" not in path:
            assert any((start / path).exists() for start in (ROOT, folder, *folder.glob("*/"))), path
    for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text):
        assert (folder / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_links_into_a_page_name_its_headings(page):
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([\w-]+)\)", PAGES[page]):
        text = ((ROOT / page).parent / target if target else ROOT / page).read_text()
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("package", ["reports", "suites", "suites.abba", "suites.models.train", "suites.tasks"])
def test_the_verbs_of_its_other_commands_exist(package):
    verbs = set(re.findall(rf"python -m {re.escape(package)} ([a-z]+)", EVERYTHING + GUIDE))
    shown = subprocess.run(
        [sys.executable, "-m", package, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert all(re.search(rf"\b{verb}\b", shown) for verb in verbs), verbs


def test_number_tables_and_the_figure_are_those_of_the_committed_report():
    assert readme.stale() == [], "run: python -m reports readme"


def test_a_number_that_was_changed_by_hand_is_found(monkeypatch, tmp_path):
    for path in ("README.md", "baselines/README.md", "suites/README.md"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(re.sub(r"\d\.\d\dx \[", "9.99x [", (ROOT / path).read_text()))
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "FIGURES", tmp_path)
    names = {"README.md", "baselines/README.md", "suites/README.md", "summary-light.svg", "summary-dark.svg"}
    assert set(readme.write()) == {tmp_path / name for name in names}
    assert readme.stale() == []
    assert (tmp_path / "README.md").read_text() == README


def test_what_the_readme_says_of_all_families_is_so():
    found, words = judged(read(KEPT).accuracy), ("none", "one", "two", "three", "four")
    paper, most = (
        [one.difference(gamma).within(one.margin_points) for one in found] for gamma in (PAPERS, "MoBiLE 0.99")
    )
    said = (
        f'"Negligible" (the whole interval above -1 point) is shown for {words[paper.count("yes")]} of the four at the '
        f"paper's gamma and refuted for {words[paper.count('no')]}; at gamma 0.99 it is shown for "
        f"{words[most.count('yes')]}."
    )
    assert said in " ".join(README.split())
    better = [one.difference(PAPERS, worse).low > 0 for one in found for worse in (STATIC, RANDOM)]
    assert all(better) == ("and than falling back as often at random, in all four families" in " ".join(README.split()))


def test_the_front_page_is_short():
    assert len(README.splitlines()) <= 150


def test_the_presets_of_the_suites_page_are_those_there_are():
    listed = re.findall(r"^\| `(\w+)` \|", PAGES["suites/README.md"].split("## The rooms")[0], re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "suites/presets").glob("*.toml"))


@pytest.mark.parametrize("room", ["mobile", "suites", "reports"])
def test_a_page_names_every_folder_of_its_room(room):
    rows = re.findall(r"^\| (`.+?) \|", PAGES[f"{room}/README.md"].split("## The rooms")[1], re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([\w/]+)/`", row)}
    assert named == {path.parent.name for path in (ROOT / room).glob("*/__init__.py")} | (
        {"presets"} if room == "suites" else set()
    )


def test_the_committed_page_and_the_committed_cells_are_of_one_run():
    speedups = json.loads((readme.FIGURES / "cells.json").read_text())["speedups"]
    glance = read_tables(readme.SOURCE.read_text())[readme.GLANCE]
    for base in ("on-demand", "on-demand-overlap"):
        for model, over in columns(glance, "model", f"over {base}"):
            value = speedups[f"{model} / mobile (gamma 0.7) / smallest / over {base}"]
            assert over.startswith(f"{value:.2f}x [")

"""Base against head: a head that is slower fails the gate, an equal one does not, and unlike work is not compared."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mobile.errors import Refused
from reports.checks.abba import INCONCLUSIVE, PASSED, REGRESSION, Unjudgeable, judge, verdict
from reports.checks.abba import read as read_trial
from reports.stats.intervals import Interval
from suites.abba import commands, variants
from suites.record import TRIAL, write_json

ROOT = Path(__file__).parent.parent
NAPS = """

import time

_step = Decoder._step


def _late(self, *arguments):
    time.sleep(0.25)
    return _step(self, *arguments)


Decoder._step = _late
"""  # after which a decode step of the shipped model takes many times as long


def git(folder: Path, *arguments: str) -> str:
    name = ("-c", "user.name=test", "-c", "user.email=test@example.invalid")
    done = subprocess.run(["git", *name, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """This checkout's code as the first commit of a repository, and a slower engine as the second."""
    folder = tmp_path_factory.mktemp("repository")
    for room in ("mobile", "baselines", "suites", "reports"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__", "expected"))
    for file in ("pyproject.toml", ".gitignore"):
        shutil.copy(ROOT / file, folder)
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=fast")
    with (folder / "mobile" / "runtime" / "decoding.py").open("a") as file:
        file.write(NAPS)
    git(folder, "commit", "--quiet", "--all", "--message=slow")
    return folder


def python(folder: Path, *words: object) -> subprocess.CompletedProcess:
    """Run that repository's own code."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )


@pytest.fixture(scope="module")
def slow(repository) -> dict:
    """The slow commit timed against the one before it, three processes a side."""
    words = ("--pairs", 3, "--steps", 3, "--repeats", 2, "--warm-up", 0, "--strategy", "on-demand")
    done = python(repository, "suites.abba", "regression", *words)
    assert done.returncode == 0, done.stderr
    assert "6/6 head" in done.stderr or "6/6 base" in done.stderr
    return read_trial(repository / "runs" / "regression")


# --- live ----------------------------------------------------------------------------------------------


def test_a_slower_head_fails_and_the_page_says_so(repository, slow):
    [line] = judge(slow).lines
    assert line.verdict == REGRESSION
    assert line.ratio.high < 0.95
    assert line.written == "equal"
    assert all(first == second for name, first, second in line.counters if not name.endswith("seconds"))
    page = repository / "page.md"
    done = python(repository, "reports", "abba", "--summary", page)
    assert done.returncode == 1, done.stderr
    assert page.read_text().startswith("**REGRESSION: head is slower than base under on-demand.**")
    assert (repository / "runs/regression/summary.md").read_text() in page.read_text()


def test_each_side_ran_its_own_commit_in_turn_and_no_worktree_is_left(repository, slow):
    commits = [{process["git_commit"] for process in side} for side in slow["processes"]]
    assert commits == [{git(repository, "rev-parse", rev)} for rev in ("HEAD~1", "HEAD")]
    assert slow["order"] == [0, 1, 1, 0, 0, 1]
    assert git(repository, "worktree", "list").count("\n") == 0
    assert not any(process["git_dirty"] for side in slow["processes"] for process in side)


def test_the_same_base_against_itself_or_a_faster_head_passes(slow):
    base, head = slow["processes"]
    [itself] = judge({**slow, "processes": [base, base[1:] + base[:1]]}).lines
    assert itself.verdict != REGRESSION
    assert itself.ratio.low <= 1 <= itself.ratio.high
    [faster] = judge({**slow, "processes": [head, base]}).lines
    assert faster.verdict == PASSED


def test_a_commit_that_cannot_do_the_work_is_named_and_nothing_is_written(repository):
    done = python(repository, "suites.abba", "compare", "HEAD", "HEAD~1", "--strategy", "belady", "--out", "nothing")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: HEAD cannot do this work (mobile.errors.Refused:")
    assert not (repository / "nothing").exists()
    assert git(repository, "worktree", "list").count("\n") == 0


# --- over a disk ---------------------------------------------------------------------------------------

TINY = ("--pairs", 3, "--steps", 3, "--repeats", 2, "--warm-up", 0, "--link", "disk")


@pytest.fixture(scope="module")
def over_disk(repository) -> dict:
    """Two strategies with the shipped model's experts on a disk, in a folder of its own beside the results."""
    model, store = ROOT / "suites/models/olmoe-tiny", repository / "store"
    store.mkdir()
    words = ("on-demand", "lru", *TINY, "--model", model, "--store", store, "--out", "runs/disk")
    done = python(repository, "suites.abba", "compare", *words)
    assert done.returncode == 0, done.stderr
    assert list(store.iterdir()) == []
    return read_trial(repository / "runs" / "disk")


def test_two_strategies_are_timed_over_a_disk_and_the_page_names_it(repository, over_disk):
    assert over_disk["scope"] == "cpu+disk"
    processes = [process for side in over_disk["processes"] for process in side]
    assert {process["link"] for process in processes} == {"disk"}
    assert all(process["disk"] == processes[0]["disk"] and process["disk"]["file_system"] for process in processes)
    on_demand, lru = (side[0]["strategies"][0]["repeats"][0]["counters"] for side in over_disk["processes"])
    assert on_demand["decode_bytes"] > lru["decode_bytes"] > 0
    assert on_demand["decode_bytes"] % 4096 == 0  # rows of whole pages, as a file has them
    done = python(repository, "reports", "abba", "runs/disk")
    assert done.returncode == 0, done.stderr
    assert "scope: cpu+disk" in done.stdout
    assert f"disk: {processes[0]['disk']['model'] or processes[0]['disk']['source']}" in done.stdout


def test_another_disk_is_not_compared(over_disk):
    with pytest.raises(Unjudgeable, match="Not one disk in all processes"):
        judge(spoiled(over_disk, disk={"file_system": "ext4", "source": "/dev/other", "model": None}))


def test_a_base_without_the_link_is_told_in_one_sentence(repository):
    start = git(repository, "rev-parse", "HEAD")
    attach = repository / "mobile" / "runtime" / "attachment.py"
    text = attach.read_text()
    for line in ("    store: str | os.PathLike[str] | None = None,\n", "        store=store,\n"):
        assert line in text
        text = text.replace(line, "")
    attach.write_text(text)
    try:
        git(repository, "commit", "--quiet", "--all", "--message=before there was a disk")
        old = git(repository, "rev-parse", "HEAD")
    finally:
        git(repository, "reset", "--quiet", "--hard", start)
    done = python(repository, "suites.abba", "regression", "--base", old, *TINY, "--layers", 1)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"error: base {old[:12]} has no link disk; compare commits that have it."
    assert not list(repository.glob("**/mobile-abba-*"))


def disk_options(*words: object):
    options = commands.parser().parse_args(["compare", "lru", "mobile", "--link", "disk", *map(str, words)])
    commands.complete(options)
    return options


def test_over_a_disk_a_layer_of_real_size_is_timed_unless_told_otherwise(tmp_path):
    options = disk_options("--out", tmp_path / "not/yet")
    assert (options.layers, options.pairs, options.store) == (1, 4, tmp_path)
    said = commands.forecast(options, 2)
    assert said.startswith("8 processes in turn. Each needs 0.8 GB of memory and as much of the disk of")
    assert "about 5 minutes in all" in said
    options = disk_options("--layers", 2, "--steps", 5, "--pairs", 3, "--store", tmp_path)
    assert (options.layers, options.steps, options.repeats, options.pairs) == (2, 5, 3, 3)
    options = disk_options("--model", tmp_path, "--store", tmp_path)
    assert (options.layers, options.steps) == (None, None)
    assert commands.forecast(options, 2) is None


def test_a_store_that_cannot_be_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(Refused, match="There is no folder"):
        disk_options("--store", tmp_path / "nowhere")
    options = commands.parser().parse_args(["compare", "lru", "mobile", "--store", str(tmp_path)])
    with pytest.raises(Refused, match="give --link disk too"):
        commands.complete(options)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no file system in memory")
def test_memory_is_not_timed_as_a_disk(tmp_path):
    workload = ROOT / "suites/abba/workload.py"
    words = ("-P", workload, "--link", "disk", "--store", "/dev/shm", "--out", tmp_path / "here.json")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)
    assert done.stderr.strip() == "/dev/shm lies in memory and on no disk; give another --store."
    assert list(tmp_path.iterdir()) == []


# --- the two sides -------------------------------------------------------------------------------------


@pytest.fixture
def here(repository, monkeypatch) -> Path:
    monkeypatch.setattr(variants, "REPOSITORY", repository)
    return repository


def test_names_are_strategies_or_revisions(here):
    first, second = variants.named("lru", "mobile", ("ser",))
    assert (first.commit, first.strategies, second.strategies) == (None, ("lru",), ("mobile",))
    first, second = variants.named("HEAD", "HEAD~1", ("ser",))
    assert (first.commit, second.commit) == (git(here, "rev-parse", "HEAD"), git(here, "rev-parse", "HEAD~1"))
    assert first.strategies == second.strategies == ("ser",)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("lru", "HEAD"), "lru is a strategy and HEAD a revision; give two of one kind"),
        (("lru", "lruu"), "'lruu' is neither a strategy nor a revision"),
        (("HEAD", "--all"), "'--all' is neither"),
        (("lfu", "HEAD"), "'lfu' is a strategy and a revision; write the revision as .* or refs/heads/lfu"),
    ],
)
def test_other_names_are_refused_in_a_sentence(here, names, says):
    git(here, "branch", "--force", "lfu")
    try:
        with pytest.raises(Refused, match=says):
            variants.named(*names, ("mobile",))
    finally:
        git(here, "branch", "--delete", "--force", "lfu")


def test_the_base_is_where_the_branch_left_main_or_the_commit_before(here):
    assert variants.default_base() == git(here, "rev-parse", "HEAD~1")
    git(here, "switch", "--quiet", "--create", "topic")
    try:
        for message in ("one", "two"):
            git(here, "commit", "--quiet", "--allow-empty", f"--message={message}")
        assert variants.default_base() == git(here, "rev-parse", "main")
    finally:
        git(here, "switch", "--quiet", "main")
    with pytest.raises(Refused, match="knows no revision 'nowhere'"):
        variants.regression("nowhere", ("mobile",))


def test_a_tree_brings_its_own_strategies_and_goes_away_when_the_work_breaks_off(here):
    both = variants.Variant("a", variants.commit_of("HEAD~1"), ()), variants.Variant("b", None, ())
    opened = variants.trees(both)
    [names, tree], [_, working] = opened.__enter__()
    listed = (names / "mobile_moe-0.1.0.dist-info" / "entry_points.txt").read_text()
    assert "lru = baselines.lru:LRU" in listed
    assert not (tree / "mobile" / "runtime" / "decoding.py").read_text().endswith(NAPS)
    assert working == here
    assert opened.__exit__(ZeroDivisionError, ZeroDivisionError(), None) is False
    assert not tree.exists()
    assert git(here, "worktree", "list").count("\n") == 0


@pytest.mark.parametrize("pairs", [3, 4, 7])
def test_neither_side_goes_first_more_often_than_the_other(pairs):
    turns = commands.order(pairs)
    firsts = turns[::2]
    assert sorted(turns) == [0] * pairs + [1] * pairs
    assert abs(firsts.count(0) - firsts.count(1)) <= 1


# --- the judgement -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [(0.8, 0.949, REGRESSION), (0.8, 0.95, INCONCLUSIVE), (0.9, 1.1, INCONCLUSIVE), (0.95, 1.1, PASSED)],
)
def test_only_an_interval_below_the_floor_is_a_regression(low, high, says):
    assert verdict(Interval((low + high) / 2, low, high)) == says


def spoiled(trial: dict, **facts: object) -> dict:
    """The trial with something else said of the last process of head."""
    changed = copy.deepcopy(trial)
    changed["processes"][1][-1].update(facts)
    return changed


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"gpu": {"name": "another card", "uuid": "1"}}, "Not one GPU in all processes"),
        ({"cpu": "another"}, "Not one processor"),
        ({"torch": "0"}, "Not one PyTorch"),
        ({"steps": 4}, "Not one number of steps"),
        ({"git_commit": "0"}, "The code of head changed while it was timed"),
        ({"git_dirty": True}, "The code of head changed while it was timed"),
    ],
)
def test_unlike_processes_are_not_compared(slow, facts, says):
    with pytest.raises(Unjudgeable, match=says):
        judge(spoiled(slow, **facts))


def test_other_tokens_to_decode_are_not_compared_and_other_tokens_written_are_told(slow):
    changed = copy.deepcopy(slow)
    changed["processes"][1][0]["strategies"][0]["ids_sha256"] = "0"
    with pytest.raises(Unjudgeable, match="not given the same tokens"):
        judge(changed)
    changed = copy.deepcopy(slow)
    for process in changed["processes"][1]:
        process["strategies"][0]["written"][0] += 1
    found = judge(changed)
    assert found.lines[0].written == "differ at 1 of 3 steps"
    assert any("would not write the same tokens" in warning for warning in found.warnings)


def test_a_dirty_head_is_told_and_too_few_processes_are_refused(slow):
    changed = copy.deepcopy(slow)
    for process in changed["processes"][1]:
        process["git_dirty"] = True
    [warning] = judge(changed).warnings
    assert warning.startswith("head has changes that are not committed")
    with pytest.raises(Unjudgeable, match="3 a side at least"):
        judge({**slow, "processes": [side[:2] for side in slow["processes"]]})


def test_a_comparison_never_fails_and_a_missing_trial_says_what_to_run(slow, tmp_path):
    write_json(tmp_path / TRIAL, {**slow, "kind": "compare"})
    done = python(ROOT, "reports", "abba", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "REGRESSION" not in done.stdout
    assert "decode_bytes" in done.stdout
    done = python(ROOT, "reports", "abba", tmp_path / "nothing")
    assert done.returncode == 2
    assert "nox -s regression" in done.stderr

"""The workflows call sessions that exist, run no stranger's words, and lint finds where they would."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from mobile.live_model import compat

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".github" / "workflows"
NAMES = ("ci.yml", "disk.yml", "gpu.yml")


def workflow(name: str) -> dict:
    return yaml.safe_load((FOLDER / name).read_text())


def steps(name: str) -> list[dict]:
    return [step for job in workflow(name)["jobs"].values() for step in job["steps"]]


def sessions_called(text: str) -> set[str]:
    """Of every nox command in a script, the words between -s and the next option."""
    called = re.findall(r"\bnox\b[^\n]*? -s((?: +\w+)+)", text)
    return {word for words in called for word in words.split()}


def test_the_sessions_they_call_exist():
    listed = subprocess.run(
        [sys.executable, "-m", "nox", "-l"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    known = set(re.findall(r"^[*-] (\w+)", listed, re.MULTILINE))
    called = {name: sessions_called("\n".join(step.get("run", "") for step in steps(name))) for name in NAMES}
    assert called["ci.yml"] == {"lint", "tests", "compat", "reproduce", "gate"}
    assert called["disk.yml"] == {"regression", "bench"}
    assert called["gpu.yml"] == {"regression", "bench", "tests"}
    assert (set().union(*called.values()) | sessions_called((ROOT / ".ci/run").read_text())) <= known


def test_the_range_of_transformers_is_said_alike_everywhere_and_its_ends_are_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    [wanted] = [one for one in map(Requirement, project["project"]["dependencies"]) if one.name == "transformers"]
    groups = project["dependency-groups"]
    ends = [
        Requirement(next(one for one in groups[end] if one.startswith("transformers="))) for end in ("oldest", "newest")
    ]
    oldest, newest = (Version(next(iter(end.specifier)).version) for end in ends)
    assert wanted.specifier == SpecifierSet(f">={compat.OLDEST},<{compat.NEWEST_BELOW}")
    assert Version(compat.OLDEST) == oldest
    assert f"{newest.major}.{newest.minor + 1}" == compat.NEWEST_BELOW
    assert {"include-group": "oldest"} in groups["pinned"]


def test_the_hooks_before_a_commit_run_what_lint_runs():
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["lint"]
    hooks = [
        hook
        for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
        for hook in repo["hooks"]
    ]
    assert hooks
    assert all(set(hook["additional_dependencies"]) <= set(lint) for hook in hooks)


def test_no_workflow_is_forgotten():
    assert {path.name for path in FOLDER.iterdir()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_they_may_read_and_nothing_else_and_use_pinned_actions(name):
    whole = workflow(name)
    assert whole["permissions"] == {}
    assert all(job["permissions"] == {"contents": "read"} for job in whole["jobs"].values())
    used = [step["uses"] for step in steps(name) if "uses" in step]
    assert used
    assert all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", action) for action in used)
    assert "pull_request_target" not in whole[True]  # YAML 1.1 reads the key `on` as true
    assert not any("${{" in step.get("run", "") for step in steps(name))  # expressions reach scripts as variables


def test_the_gpu_is_used_by_one_run_at_a_time_on_request_and_what_it_gave_is_always_kept():
    whole = workflow("gpu.yml")
    [job] = whole["jobs"].values()
    assert whole[True].keys() == {"pull_request", "workflow_dispatch"}
    assert whole[True]["pull_request"] == {"types": ["labeled"]}
    assert "github.event.label.name == 'gpu'" in job["if"]
    assert whole["concurrency"] == {"group": "gpu-card-0", "cancel-in-progress": False}
    assert job["steps"][-1]["if"] == "always()"
    assert "upload-artifact" in job["steps"][-1]["uses"]


def test_wall_time_without_a_gpu_is_measured_over_the_disk_on_request_and_nowhere_else():
    whole = workflow("disk.yml")
    [job] = whole["jobs"].values()
    assert whole[True].keys() == {"pull_request", "workflow_dispatch"}
    assert whole[True]["pull_request"] == {"types": ["labeled"]}
    assert "github.event.label.name == 'disk'" in job["if"]
    assert job["runs-on"].startswith("ubuntu")
    assert any("regression" in step.get("run", "") and "--link disk" in step["run"] for step in job["steps"])
    assert job["steps"][-1]["if"] == "always()"
    assert not any("--link disk" in step.get("run", "") for step in steps("ci.yml"))


def zizmor(path: Path) -> int:
    program = Path(sys.executable).parent / "zizmor"
    return subprocess.run([program, "--offline", "--quiet", "--pedantic", path], capture_output=True).returncode


def schema(path: Path) -> int:
    words = ("check_jsonschema", "--builtin-schema", "vendor.github-workflows", path)
    return subprocess.run([sys.executable, "-m", *words], capture_output=True).returncode


@pytest.mark.parametrize(
    ("check", "old", "new"),
    [
        (zizmor, 'base="${ASKED:-', 'echo "${{ github.event.pull_request.title }}"; base="${ASKED:-'),
        (zizmor, "      contents: read", "      contents: write"),
        (zizmor, "@de0fac2e4500dabe0009e67214ff5f5447ce83dd # v6.0.2", "@main"),
        (zizmor, "          persist-credentials: false\n", ""),
        (schema, "timeout-minutes: 120", "timeout-minute: 120"),
        (schema, "runs-on:", "run-on:"),
    ],
)
def test_lint_finds_what_is_wrong(tmp_path, check, old, new):
    sound = (FOLDER / "gpu.yml").read_text()
    path = tmp_path / ".github" / "workflows" / "gpu.yml"
    path.parent.mkdir(parents=True)
    path.write_text(sound)
    assert check(path) == 0
    assert old in sound
    path.write_text(sound.replace(old, new))
    assert check(path) != 0

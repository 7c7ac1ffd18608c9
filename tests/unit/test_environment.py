"""Asking git about a tree leaves the tree alone."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from suites import environment
from suites.abba import workload

IDENTITY = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org")


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A repository that git takes for this one, with a file whose time is not the one in the index."""

    def git(*arguments: str) -> None:
        subprocess.run(["git", *IDENTITY, *arguments], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "file").write_text("same")
    git("init", "--quiet")
    git("add", "file")
    git("commit", "--quiet", "--message", "first")
    os.utime(tmp_path / "file", (1e9, 1e9))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("ask", [environment._git, workload.git])
def test_git_is_asked_without_a_lock_that_a_killed_run_would_leave(repository, ask):
    index = (repository / ".git/index").read_bytes()
    assert ask("status", "--porcelain") == ""
    assert (repository / ".git/index").read_bytes() == index, "it was written anew, under a lock"


def test_the_day_is_kept_and_is_no_part_of_the_fingerprint():
    seen = environment.environment()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", seen["date"])
    assert environment.fingerprint({**seen, "date": "2001-01-01"}) == seen["fingerprint"]

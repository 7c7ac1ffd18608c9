"""The two variants of a comparison: revisions of this repository, or strategies. Git runs here, torch does not."""

from __future__ import annotations

import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mobile
from mobile.errors import Refused
from mobile.policies.strategy import resolve
from mobile.suggest import offer

REPOSITORY = Path(__file__).resolve().parents[2]
GROUP = "mobile.strategies"


@dataclass(frozen=True)
class Variant:
    """A tree and the strategies that are timed in it, one after another in each process.

    `commit` None is the working tree as it stands.
    """

    name: str
    commit: str | None
    strategies: tuple[str, ...]


def _git(*arguments: str) -> str | None:
    """Return what git answers, None where it fails."""
    done = subprocess.run(
        ["git", "-C", REPOSITORY, *arguments], capture_output=True, encoding="utf-8", errors="replace"
    )
    return done.stdout.strip() if done.returncode == 0 else None


def commit_of(revision: str) -> str | None:
    """Return the full hash of the commit that git takes `revision` for; None where there is none."""
    return _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")


def default_base() -> str:
    """Return where this branch left the default branch; on that branch, the commit before. Raise Refused."""
    branch = _git("symbolic-ref", "--quiet", "--short", "refs/remotes/origin/HEAD") or "main"
    base = _git("merge-base", branch, "HEAD~1") or commit_of("HEAD~1")
    if base is None:
        raise Refused("There is no commit before HEAD to compare with; fetch the whole history, or give --base REV.")
    return base


def regression(base: str | None, strategies: tuple[str, ...]) -> tuple[Variant, Variant]:
    """Return a revision and the working tree. Raise Refused for a revision that git does not know."""
    chosen = default_base() if base is None else base
    commit = commit_of(chosen)
    if commit is None:
        raise Refused(f"Git knows no revision {chosen!r} here; fetch it, or give another --base.")
    return Variant(f"base {commit[:12]}", commit, strategies), Variant("head", None, strategies)


def named(first: str, second: str, strategies: tuple[str, ...]) -> tuple[Variant, Variant]:
    """Return two strategies in the working tree, or two revisions. Raise Refused for names of neither or of each."""
    kinds = [_kind(name) for name in (first, second)]
    if kinds[0] != kinds[1]:
        raise Refused(f"{first} is a {kinds[0]} and {second} a {kinds[1]}; give two of one kind.")
    if kinds[0] == "strategy":
        return Variant(first, None, (first,)), Variant(second, None, (second,))
    return Variant(first, commit_of(first), strategies), Variant(second, commit_of(second), strategies)


def _kind(name: str) -> str:
    known, commit = name in mobile.strategies(), commit_of(name)
    if "+" in name and commit is None:
        resolve(name)  # a composed one, or a sentence that says why there is none
        return "strategy"
    if known and commit is not None:
        raise Refused(
            f"{name!r} is a strategy and a revision; write the revision as {commit[:12]} or refs/heads/{name}."
        )
    if not known and commit is None:
        listed = ", ".join(mobile.strategies())
        raise Refused(
            f"{name!r} is neither a strategy nor a revision of this repository; "
            f"{offer(name, mobile.strategies(), f'strategies are: {listed}')}."
        )
    return "strategy" if known else "revision"


@contextmanager
def trees(variants: tuple[Variant, Variant]) -> Iterator[list[list[Path]]]:
    """Yield, for each variant, the folders to put in front on PYTHONPATH: its code, and its own list of strategies.

    A commit is checked out with `git worktree` into a temporary folder, which is removed whatever happens.
    """
    with tempfile.TemporaryDirectory(prefix="mobile-abba-") as temporary:
        checked_out: list[Path] = []
        try:
            found = []
            for number, variant in enumerate(variants):
                tree = REPOSITORY
                if variant.commit is not None:
                    tree = Path(temporary) / f"tree-{number}"
                    checked_out.append(tree)
                    _check_out(variant.commit, tree)
                found.append([_entry_points(tree, Path(temporary) / f"names-{number}"), tree])
            yield found
        finally:
            for tree in checked_out:
                _git("worktree", "remove", "--force", str(tree))


def _check_out(commit: str, tree: Path) -> None:
    done = subprocess.run(
        ["git", "-C", REPOSITORY, "worktree", "add", "--quiet", "--detach", tree, commit],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        raise Refused(f"Git cannot check out {commit[:12]}: {done.stderr.strip()}")


def _entry_points(tree: Path, folder: Path) -> Path:
    """Write a folder that tells Python which strategies that tree has, and return it.

    The installed package lists those of the tree it was installed from, and maybe of no tree: a bare machine has none.
    """
    project = tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n", encoding="utf-8"
    )
    lines = [f"{name} = {value}" for name, value in project["entry-points"][GROUP].items()]
    (info / "entry_points.txt").write_text("\n".join((f"[{GROUP}]", *lines, "")), encoding="utf-8")
    return folder

#!/usr/bin/env -S python -m nox -f
"""Thin doors: `nox -l` lists them. The logic is in the packages; arguments after `--` go to them unread.

One session installs the tested set of packages and the others run in its environment. `nox --no-venv` installs
nothing and uses the interpreter nox runs in, for machines that bring their own torch.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["lint", "tests"]

PROJECT = nox.project.load_toml("pyproject.toml")
PREFLIGHT = """
import importlib.metadata as m, sys
try:
    import torch
    shown = {n: m.version(n) for n in ("torch", "transformers", "mobile-moe")}
except (ImportError, m.PackageNotFoundError) as error:
    sys.exit(f"{sys.executable} lacks what this needs ({error}); run: pip install --no-deps -e .")
print(sys.executable, shown, "CUDA", torch.version.cuda if torch.cuda.is_available() else None)
"""
COMPAT = [
    f"tests/test_{name}.py"
    for name in (
        "families",
        "exactness",
        "two_pass",
        "generation",
        "loading",
        "rows_end",
        "inert",
        "guards",
        "callers_modes",
        "odd_routing",
        "serve",
    )
]
interpreter = sys.executable
WORKFLOWS = sorted(str(path) for path in Path(".github/workflows").glob("*.yml"))
BENCHMARKS = Path("runs/benchmarks.json")


@nox.session(default=False, reuse_venv=True)
def environment(session: nox.Session) -> None:
    """Install the tested packages and this project once, for every other session."""
    global interpreter
    if session.venv_backend != "none":
        session.install(*nox.project.dependency_groups(PROJECT, "pinned", "test", "lint"))
        session.install("--no-deps", "-e", ".")
        interpreter = str(Path(session.bin) / "python")
    session.run(interpreter, "-c", PREFLIGHT, external=True)


def run(session: nox.Session, *arguments: str, **options: object) -> None:
    """Run a module in the shared environment."""
    session.run(interpreter, "-m", *arguments, external=True, **options)


def run_beside(session: nox.Session, program: str, *arguments: str) -> None:
    """Run a program that was installed beside the interpreter and has no module."""
    session.run(str(Path(interpreter).parent / program), *arguments, external=True)


@nox.session(venv_backend="none", requires=["environment"])
def lint(session: nox.Session) -> None:
    """ruff, mypy, the contract of the rooms, and the workflows: their schema, and what can be done to them."""
    run(session, "ruff", "check", ".")
    run(session, "ruff", "format", "--check", ".")
    run(session, "mypy")
    run_beside(session, "lint-imports")
    for schema in ("vendor.github-workflows", "custom.github-workflows-require-timeout"):
        run(session, "check_jsonschema", "--builtin-schema", schema, *WORKFLOWS)
    run_beside(session, "zizmor", "--offline", "--no-progress", "--quiet", "--pedantic", *WORKFLOWS)


@nox.session(venv_backend="none", requires=["environment"])
def tests(session: nox.Session) -> None:
    """Run all tests, a file at a time on each processor; arguments go to pytest, and then it runs alone."""
    run(session, "pytest", *(session.posargs or ("-n", "logical", "--dist", "loadfile")))


@nox.session(default=False, reuse_venv=True)
def compat(session: nox.Session) -> None:
    """Run the tests that touch Transformers on its oldest and its newest supported release, in one environment in turn.

    Arguments go to pip: `nox -s compat -- torch==2.15.0` tries another torch, whose own build brings CUDA along.
    """
    for end in ("oldest", "newest"):
        if session.venv_backend != "none":
            session.install(*nox.project.dependency_groups(PROJECT, "beside", end, "test"))
            if session.posargs:
                session.install(*session.posargs)
            session.install("--no-deps", "-e", ".")
        session.run("python", "-c", PREFLIGHT, external=True)
        session.run("python", "-m", "pytest", *COMPAT, external=True)
        if session.venv_backend == "none":
            return


@nox.session(venv_backend="none", requires=["environment"], default=False)
def bench(session: nox.Session) -> None:
    """Micro-benchmarks, into runs/benchmarks.json; arguments go to pytest. `python -m reports benchmarks` compares."""
    BENCHMARKS.parent.mkdir(exist_ok=True)
    run(session, "pytest", "tests/micro", "--benchmark-only", f"--benchmark-json={BENCHMARKS}", *session.posargs)


def abba(session: nox.Session, verb: str) -> None:
    """Time two sides and judge them; a run on a CI server shows the page there, too."""
    run(session, "suites.abba", verb, *session.posargs)
    if {"-h", "--help"}.isdisjoint(session.posargs):
        page = os.environ.get("GITHUB_STEP_SUMMARY")
        run(session, "reports", "abba", *(("--summary", page) if page else ()))


@nox.session(venv_backend="none", requires=["environment"], default=False)
def regression(session: nox.Session) -> None:
    """Is this tree slower than an earlier commit? Arguments go to `python -m suites.abba regression` (--base REV)."""
    abba(session, "regression")


@nox.session(venv_backend="none", requires=["environment"], default=False)
def compare(session: nox.Session) -> None:
    """Two strategies or two commits side by side: nox -s compare -- A B. `-- --help` says more."""
    abba(session, "compare")


@nox.session(venv_backend="none", requires=["environment"], default=False)
def reproduce(session: nox.Session) -> None:
    """Run the suite and write its report; arguments go to `python -m suites run` (--preset smoke, --out FOLDER)."""
    run(session, "suites", "run", *session.posargs, success_codes=[0, 1])  # 1: a cell failed, which the report says
    run(session, "reports", "build")


@nox.session(venv_backend="none", requires=["environment"], default=False)
def gate(session: nox.Session) -> None:
    """Hold the last run against what is expected of it, tolerance zero; arguments go to `python -m reports gate`."""
    run(session, "reports", "gate", *session.posargs)


if __name__ == "__main__":
    nox.main()

"""Filters, named in lm-eval's task files, that score written functions by running their tests.

A filter turns every completion into a verdict, "passed" or a reason; the files' metric then compares with "passed".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from suites.scoring.sandbox import run_all


def by_asserts(completions: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Judge the shipped task: `prompt` plus completion is the program, `answer` has an assert a line."""
    programs = [doc["prompt"] + texts[0] for texts, doc in zip(completions, docs, strict=True)]
    return _reasons(programs, [doc["answer"] for doc in docs])


def by_check(completions: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Judge HumanEval: `test` defines `check`, which is called with the function."""
    programs = [doc["prompt"] + texts[0] for texts, doc in zip(completions, docs, strict=True)]
    return _reasons(programs, [f"{doc['test']}\ncheck({doc['entry_point']})" for doc in docs])


def _reasons(programs: list[str], tests: list[str]) -> list[list[str]]:
    return [[outcome.reason] for outcome in run_all(list(zip(programs, tests, strict=True)))]

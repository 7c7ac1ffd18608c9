"""Filters, named in lm-eval's task files, that score written functions by running their tests.

A filter turns every completion into a verdict, "passed" or a reason; the files' metric then compares with "passed".
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from suites.scoring.sandbox.run import Submission, run_all


def by_asserts(completions: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Judge the shipped task: `prompt` plus completion is the program, `answer` has an assert a line."""
    return _reasons(completions, docs, [_defined(doc["prompt"]) for doc in docs], [doc["answer"] for doc in docs])


def by_check(completions: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Judge HumanEval: `test` defines `check`, which is called with the function; both may use the prompt's names."""
    functions = [doc["entry_point"] for doc in docs]
    return _reasons(
        completions, docs, functions, [f"{doc['test']}\ncheck({doc['entry_point']})" for doc in docs], given="prompt"
    )


def _defined(prompt: str) -> str:
    """Return the name of the last function that a prompt defines."""
    return [node.name for node in ast.parse(prompt).body if isinstance(node, ast.FunctionDef)][-1]


def _reasons(
    completions: Sequence[Sequence[str]],
    docs: Sequence[dict[str, Any]],
    functions: list[str],
    tests: list[str],
    given: str | None = None,
) -> list[list[str]]:
    submissions = [
        Submission(doc["prompt"] + texts[0], function, test, doc[given] if given else "")
        for texts, doc, function, test in zip(completions, docs, functions, tests, strict=True)
    ]
    return [[outcome.reason] for outcome in run_all(submissions)]

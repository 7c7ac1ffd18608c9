"""Scores of random answers by task, so that a table can show what a score means."""

from __future__ import annotations

CHANCE_LEVELS = {  # shares; tasks whose answers are open-ended have none
    "boolean_expressions": 1 / 2,
    "web_of_lies": 1 / 2,
    "navigate": 1 / 2,
    "sports_understanding": 1 / 2,
    "causal_judgement": 1 / 2,
    "formal_fallacies": 1 / 2,
}


def chance_level(task: str) -> float | None:
    """Return the share of items that random answers get right; None where answers are open-ended."""
    return next((share for name, share in CHANCE_LEVELS.items() if task == name or task.endswith(f"_{name}")), None)

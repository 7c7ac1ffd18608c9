"""Generative tasks: each has a generator here, a YAML for lm-eval and shipped test items."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

from suites.tasks import arithmetic, boolean_expressions, object_counting, python_functions, web_of_lies
from suites.tasks.item import Item

FOLDER = Path(__file__).parent
DATA = FOLDER / "data"

GENERATORS: dict[str, Callable[[Random], Item]] = {
    "arithmetic": arithmetic.generate,
    "boolean_expressions": boolean_expressions.generate,
    "object_counting": object_counting.generate,
    "python_functions": python_functions.generate,
    "web_of_lies": web_of_lies.generate,
}

# What is shipped to be answered: the shortest are for training alone, and where it saturates, tests are longer.
TESTED = GENERATORS | {
    "arithmetic": partial(arithmetic.generate, steps=arithmetic.TESTED),
    "boolean_expressions": partial(boolean_expressions.generate, operators=boolean_expressions.TESTED),
    "object_counting": partial(object_counting.generate, kinds=object_counting.TESTED),
    "web_of_lies": partial(web_of_lies.generate, people=web_of_lies.TESTED),
}

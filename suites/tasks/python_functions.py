"""Short Python functions from a signature and a docstring (HumanEval's style), judged by running their tests."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from suites.tasks.item import Item


@dataclass(frozen=True)
class Stage:
    """One step of a function: its line of code, and its wording as a noun phrase around `{it}` or as an order.

    `{k}` is a constant of the stage; `{v}` the list's name.
    """

    code: str
    phrases: tuple[str, ...]
    orders: tuple[str, ...]
    constants: tuple[int, int] | None = None


KEEP = "{v} = [x for x in {v} if "
KEEPS = (
    Stage(KEEP + "x % 2 == 0]", ("the even numbers of {it}", "all even values of {it}"), ("keep the even numbers",)),
    Stage(KEEP + "x % 2 == 1]", ("the odd numbers of {it}", "all odd values of {it}"), ("keep the odd numbers",)),
    Stage(KEEP + "x > 0]", ("the positive numbers of {it}",), ("keep what is positive", "keep numbers above zero")),
    Stage(KEEP + "x < 0]", ("the negative numbers of {it}",), ("keep what is negative", "keep numbers below zero")),
    Stage(KEEP + "x != 0]", ("{it} without zeros",), ("remove every zero", "drop the zeros")),
    Stage(
        KEEP + "x > {k}]",
        ("the numbers above {k} of {it}", "values of {it} greater than {k}"),
        ("keep numbers above {k}", "keep what is greater than {k}"),
        (2, 30),
    ),
    Stage(
        KEEP + "x < {k}]",
        ("the numbers below {k} of {it}", "values of {it} less than {k}"),
        ("keep numbers below {k}", "drop what is {k} or more"),
        (5, 40),
    ),
    Stage(KEEP + "x != {k}]", ("{it} without any {k}",), ("remove every {k}", "drop each {k}"), (1, 20)),
    Stage(
        KEEP + "x % {k} == 0]",
        ("the multiples of {k} of {it}", "values of {it} that {k} divides"),
        ("keep multiples of {k}", "keep what {k} divides"),
        (3, 9),
    ),
    Stage(
        KEEP + "x % {k} != 0]",
        ("{it} without multiples of {k}",),
        ("drop multiples of {k}", "keep what {k} does not divide"),
        (3, 9),
    ),
    Stage(KEEP + "x % 10 == {k}]", ("the numbers ending in {k} of {it}",), ("keep what ends in {k}",), (0, 9)),
)
MAP = "{v} = ["
MAPS = (
    Stage(MAP + "x * x for x in {v}]", ("the squares of {it}", "{it} squared"), ("square each number",)),
    Stage(MAP + "-x for x in {v}]", ("the negatives of {it}", "{it} negated"), ("flip the sign of each",)),
    Stage(MAP + "abs(x) for x in {v}]", ("the absolute values of {it}",), ("drop all signs", "take absolute values")),
    Stage(
        MAP + "x + {k} for x in {v}]",
        ("{it} plus {k} each", "{it} with {k} added to each"),
        ("add {k} to each number", "raise each by {k}"),
        (1, 30),
    ),
    Stage(
        MAP + "x - {k} for x in {v}]",
        ("{it} minus {k} each", "{it} with {k} taken from each"),
        ("subtract {k} from each number", "lower each by {k}"),
        (1, 30),
    ),
    Stage(
        MAP + "x * {k} for x in {v}]",
        ("{it} times {k} each", "the {k}-fold of {it}"),
        ("multiply each number by {k}",),
        (2, 12),
    ),
    Stage(
        MAP + "x // {k} for x in {v}]",
        ("{it} over {k} each, rounded down",),
        ("divide each by {k}, rounding down",),
        (2, 12),
    ),
    Stage(MAP + "x % {k} for x in {v}]", ("the remainders of {it} by {k}",), ("take remainders by {k}",), (2, 12)),
    Stage(
        MAP + "max(x, {k}) for x in {v}]", ("{it} with {k} as the least",), ("raise what is below {k} to {k}",), (1, 20)
    ),
    Stage(MAP + "min(x, {k}) for x in {v}]", ("{it} with {k} as the most",), ("cap each number at {k}",), (1, 20)),
)
ORDERS = (
    Stage("{v} = sorted({v})", ("{it} in rising order", "{it} sorted"), ("sort the list",)),
    Stage("{v} = sorted({v})[::-1]", ("{it} in falling order",), ("sort from high to low",)),
    Stage("{v} = {v}[::-1]", ("{it} in reverse",), ("reverse the list",)),
    Stage("{v} = {v}[:{k}]", ("the first {k} of {it}",), ("keep the first {k}",), (1, 5)),
    Stage("{v} = {v}[-{k}:]", ("the last {k} of {it}",), ("keep the last {k}",), (1, 5)),
    Stage("{v} = {v}[{k}:]", ("{it} without the first {k}",), ("skip the first {k}",), (1, 5)),
    Stage("{v} = {v}[::2]", ("every other one of {it}",), ("keep every other one",)),
    Stage("{v} = sorted(set({v}))", ("the different values of {it}, sorted",), ("drop repeats and sort",)),
)
ENDS = (
    Stage("return sum({v})", ("the sum of {it}", "the total of {it}"), ("return the sum", "return the total")),
    Stage("return len({v})", ("the count of {it}", "how many there are of {it}"), ("return how many are left",)),
    Stage("return max({v}, default=0)", ("the largest of {it}, or 0",), ("return the largest, or 0",)),
    Stage("return min({v}, default=0)", ("the smallest of {it}, or 0",), ("return the smallest, or 0",)),
    Stage("return {v}", ("{it}",), ("return the list",)),
    Stage("return sum({v}) % {k}", ("the sum of {it} modulo {k}",), ("return the sum modulo {k}",), (3, 12)),
    Stage(
        "return len({v}) > {k}",
        ("whether more than {k} remain of {it}",),
        ("return whether more than {k} are left",),
        (1, 5),
    ),
    Stage("return {k} in {v}", ("whether {k} is among {it}",), ("return whether {k} is there",), (1, 30)),
)
FUNCTIONS = "solve compute process pick result transform collect value answer find".split()
LISTS = "numbers values items data xs nums".split()
TESTS = 6


def _filled(stage: Stage, rng: Random) -> tuple[Stage, int | None]:
    return stage, rng.randint(*stage.constants) if stage.constants else None


def _described(stages: list[tuple[Stage, int | None]], name: str, rng: Random) -> str:
    """Return the docstring: nested noun phrases, the last stage first, or orders, the first stage first."""
    if rng.random() < 0.5:
        text = name
        for stage, k in stages:
            text = rng.choice(stage.phrases).format(it=text, k=k)
        return f"Return {text}."
    orders = [rng.choice(stage.orders).format(k=k) for stage, k in stages]
    text = ", then ".join(orders)
    return f"From {name}, {text}."


def _inputs(stages: list[tuple[Stage, int | None]], rng: Random) -> list[list[int]]:
    """Draw lists that reach into the stages: their constants and their neighbours are often among the numbers."""
    near = [k + d for _, k in stages if k is not None for d in (-1, 0, 1)]
    lists: list[list[int]] = [[]]
    while len(lists) < TESTS:
        lists.append(
            [
                rng.choice(near) if near and rng.random() < 0.3 else rng.randint(-30, 60)
                for _ in range(rng.randint(4, 9))
            ]
        )
    return lists


def generate(rng: Random) -> Item:
    """Draw one to three steps of filtering, mapping or ordering, one that returns, and tests whose results differ."""
    while True:
        kinds = rng.choices((KEEPS, MAPS, ORDERS), (4, 4, 2), k=rng.choice((1, 2, 2, 3, 3)))
        stages = [_filled(rng.choice(kind), rng) for kind in kinds]
        stages.append(_filled(rng.choice(ENDS), rng))
        function, name = rng.choice(FUNCTIONS), rng.choice(LISTS)
        body = "\n".join("    " + stage.code.format(v=name, k=k) for stage, k in stages)
        scope: dict = {}
        exec(f"def {function}({name}):\n{body}", scope)  # our own text
        given = _inputs(stages, rng)
        results = [repr(scope[function](list(numbers))) for numbers in given]
        if len(set(results)) >= (2 if results[0] in ("True", "False") else 3):
            break
    return Item(
        prompt=f'def {function}({name}):\n    """{_described(stages, name, rng)}"""\n',
        worked=body,
        answer="\n".join(f"assert {function}({a}) == {b}" for a, b in zip(given, results, strict=True)),
        key="python_functions:" + ";".join(stage.code.format(v="v", k=k) for stage, k in stages),
    )

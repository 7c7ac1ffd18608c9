"""Evaluating boolean expressions, in BIG-Bench-Hard's prompt format, answered by rewriting step by step."""

from __future__ import annotations

from random import Random

from suites.tasks.item import Item

Tree = str | tuple["Tree", ...]  # a literal, ("not", a), ("and", a, b), ("or", a, b), or ("(", a)


def _tree(rng: Random, operators: int) -> Tree:
    """Draw an expression with exactly this many operators, bracketed wherever precedence needs it."""
    if operators == 0:
        return rng.choice(("True", "False"))
    sign = rng.choice(("not", "and", "or"))
    if sign == "not":
        return ("not", _bracketed(_tree(rng, operators - 1), ("and", "or"), rng))
    left = rng.randint(0, operators - 1)
    loose = ("or", "and") if sign == "and" else ("or",)
    a, b = _tree(rng, left), _tree(rng, operators - 1 - left)
    return (sign, _bracketed(a, loose if sign == "and" else (), rng), _bracketed(b, loose, rng))


def _bracketed(tree: Tree, must: tuple[str, ...], rng: Random) -> Tree:
    if isinstance(tree, tuple) and tree[0] != "(" and (tree[0] in must or rng.random() < 0.4):
        return ("(", tree)
    return tree


def _text(tree: Tree) -> str:
    if isinstance(tree, str):
        return tree
    head, *rest = tree
    if head == "(":
        return f"( {_text(rest[0])} )"
    if head == "not":
        return f"not {_text(rest[0])}"
    return f"{_text(rest[0])} {head} {_text(rest[1])}"


def _reduce(tree: Tree) -> Tree:
    """Rewrite every operator whose operands are finished values, dropping the brackets around a finished value."""
    if isinstance(tree, str):
        return tree
    head, *rest = tree
    if any(isinstance(child, tuple) for child in rest):
        reduced = [_reduce(child) for child in rest]
        return reduced[0] if head == "(" and isinstance(reduced[0], str) else (head, *reduced)
    truth = [child == "True" for child in rest]
    value = not truth[0] if head == "not" else (all(truth) if head == "and" else any(truth))
    return rest[0] if head == "(" else str(value)


TRAINED, TESTED = (4, 13), (9, 14)  # operators
LONG = (14, 17)  # where nine answers in ten or more are right on those tested


def generate(rng: Random, operators: tuple[int, int] = TRAINED) -> Item:
    """Draw an expression; the worked answer rewrites it, all innermost operators at once."""
    tree = _tree(rng, rng.randint(*operators))
    lines = [_text(tree)]
    while isinstance(tree, tuple):
        tree = _reduce(tree)
        lines.append(_text(tree))
    return Item(
        prompt=f"Q: {lines[0]} is\nA:",
        worked=f" {' = '.join(lines[1:])}. So the answer is {lines[-1]}.",
        answer=lines[-1],
        key="boolean_expressions:" + lines[0],
    )

"""Fresh items of a shipped task, disjoint from its test items: what may be tuned on, and what a verdict is made of."""

from __future__ import annotations

from functools import cache
from random import Random

from suites.tasks.catalogue import SHIPPED
from suites.tasks.files import shipped
from suites.tasks.item import Item, held_out

SEED = 20260101


def training_side(task: str, count: int, seed: int = SEED) -> list[Item]:
    """Return `count` different items by the task's test generator, all on the training side of the split.

    More items begin with those of fewer. A model may have been trained on some of them.
    """
    rng = Random(f"{seed}:tune:{task}")
    items: dict[str, Item] = {}
    while len(items) < count:
        item = SHIPPED[task].test(rng)
        if not held_out(item.key):
            items.setdefault(item.prompt, item)
    return list(items.values())


@cache
def verdict_items(task: str, count: int, seed: int) -> tuple[Item, ...]:
    """Return `count` different items on the test side of the split, none of them shipped and none ever trained on.

    They are drawn by the task's generator for verdicts: where its test items are too easy, by harder ones. More items
    begin with those of fewer.
    """
    rng = Random(f"{seed}:verdict:{task}")
    draw, known = SHIPPED[task].verdict or SHIPPED[task].test, {item["prompt"] for item in shipped(task)}
    items: dict[str, Item] = {}
    while len(items) < count:
        item = draw(rng)
        if held_out(item.key) and item.prompt not in known:
            items.setdefault(item.prompt, item)
    return tuple(items.values())

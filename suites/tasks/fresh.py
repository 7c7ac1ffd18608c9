"""Fresh items of a shipped task, as hard as the test items and disjoint from them: what may be tuned on."""

from __future__ import annotations

from random import Random

from suites.tasks.catalogue import SHIPPED
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

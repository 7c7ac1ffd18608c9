"""Counting the members of one category in a list, in BIG-Bench-Hard's prompt format."""

from __future__ import annotations

from random import Random

from suites.tasks.item import Item

CATEGORIES = {
    "fruits": "apple banana grape orange peach plum nectarine strawberry raspberry blackberry lemon mango",
    "vegetables": "carrot onion potato yam cabbage lettuce turnip cauliflower broccoli celery garlic leek",
    "animals": "cat dog cow pig goat rabbit snake fish bear frog duck donkey snail mouse chicken goose",
    "musical instruments": "flute piano drum violin trumpet trombone clarinet accordion guitar harp cello oboe",
    "objects": "couch bed lamp table chair stove toaster microwave fridge car oven mirror",
}
PLURALS = {
    "strawberry": "strawberries",
    "raspberry": "raspberries",
    "blackberry": "blackberries",
    "potato": "potatoes",
    "mango": "mangoes",
    "peach": "peaches",
    "cabbage": "cabbages",
    "fish": "fish",
    "mouse": "mice",
    "goose": "geese",
    "couch": "couches",
    "piano": "pianos",
    "cello": "cellos",
    "broccoli": "broccoli",
    "celery": "celery",
    "garlic": "garlic",
}
TRAINED, TESTED = (2, 9), (4, 9)  # kinds of things: short lists teach the step
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]


def _phrase(noun: str, count: int) -> str:
    if count == 1:
        return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
    return f"{WORDS[count]} {PLURALS.get(noun, noun + 's')}"


def generate(rng: Random, kinds: tuple[int, int] = TRAINED) -> Item:
    """Draw a list of things from two or three categories; the question asks for one of the categories."""
    chosen = rng.sample(list(CATEGORIES), rng.randint(2, 3))
    pool = [(noun, category) for category in chosen for noun in CATEGORIES[category].split()]
    listed = rng.sample(pool, rng.randint(*kinds))
    counted = [(noun, category, rng.choice((1, 1, 1, 2, 3, 4, 5, 6))) for noun, category in listed]
    target = rng.choice(sorted({category for _, category in listed}))
    total, worked = 0, []
    for noun, category, count in counted:
        if category == target:
            total += count
            worked.append(f"{noun} {count}, {total}.")
    phrases = [_phrase(noun, count) for noun, _, count in counted]
    return Item(
        prompt=f"Q: I have {', '.join(phrases[:-1])}, and {phrases[-1]}. How many {target} do I have?\nA:",
        worked=f" {' '.join(worked)} So the answer is {total}.",
        answer=str(total),
        key=f"object_counting:{target}:" + " ".join(sorted(f"{noun} {count}" for noun, _, count in counted)),
    )

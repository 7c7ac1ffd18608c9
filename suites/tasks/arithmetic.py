"""Grade-school word problems of two to seven steps, answered with worked steps (GSM8K's style)."""

from __future__ import annotations

from random import Random

from suites.tasks.item import Item

NAMES = "Ava Ben Cleo Dan Eva Finn Gus Hana Ivan Jade Kai Lena Max Nina Omar Pia Quin Rosa Sam Tara".split()
THINGS = (
    "apples books coins stamps shells cards marbles pencils stickers cookies beads buttons "
    "ribbons stones tickets candles"
).split()
LIMIT = 400
TRAINED, TESTED = (1, 6), (2, 6)  # steps of one person's chain: short ones teach the step

GAINS = (
    "{n} finds {x} more.",
    "{n} buys {x} more.",
    "A friend gives {n} {x} more.",
    "Then {n} wins {x} {t}.",
)
LOSSES = (
    "{n} loses {x} of them.",
    "{n} gives away {x}.",
    "Then {n} sells {x} {t}.",
    "{x} of them break.",
)
GROWTHS = (
    "Then the number grows to {x} times as many.",
    "After a week {n} has {x} times as many.",
)
SHARES = (
    "{n} splits them evenly into {x} boxes and keeps one box.",
    "{n} shares them equally among {x} people and keeps one share.",
)


def _step(rng: Random, value: int) -> tuple[str, int, int, tuple[str, ...]]:
    """Draw an operation that keeps the running value between 1 and LIMIT: (sign, operand, result, phrasings)."""
    divisors = [d for d in range(2, 10) if value % d == 0 and value > d]
    signs = ["+", "-", "*"] + ["/"] * bool(divisors)
    phrasings: tuple[str, ...]
    while True:
        sign = rng.choice(signs)
        if sign == "+":
            x = rng.randint(2, 99)
            result, phrasings = value + x, GAINS
        elif sign == "-":
            x = rng.randint(2, 99)
            result, phrasings = value - x, LOSSES
        elif sign == "*":
            x = rng.randint(2, 9)
            result, phrasings = value * x, GROWTHS
        else:
            x = rng.choice(divisors)
            result, phrasings = value // x, SHARES
        if 1 <= result <= LIMIT:
            return sign, x, result, phrasings


def _story(rng: Random, name: str, thing: str, steps: int) -> tuple[list[str], list[str], int]:
    """Draw the sentences, worked steps and final count of one person's collection."""
    value = rng.randint(3, 60)
    sentences, worked = [f"{name} has {value} {thing}."], []
    for _ in range(steps):
        sign, x, result, phrasings = _step(rng, value)
        sentences.append(rng.choice(phrasings).format(n=name, x=x, t=thing))
        worked.append(f"{value}{sign}{x}={result}.")
        value = result
    return sentences, worked, value


def generate(rng: Random, steps: tuple[int, int] = TRAINED) -> Item:
    """Draw a chain about one person, or two people's chains whose results are added or compared."""
    thing = rng.choice(THINGS)
    first, second = rng.sample(NAMES, 2)
    if rng.random() < 0.6:
        sentences, worked, value = _story(rng, first, thing, rng.randint(*steps))
        question = f"How many {thing} does {first} have now?"
    else:
        sentences, worked, a = _story(rng, first, thing, rng.randint(1, 3))
        others, more, b = _story(rng, second, thing, rng.randint(1, 3))
        sentences, worked = sentences + others, worked + more
        if a > b and rng.random() < 0.5:
            value, question = a - b, f"How many more {thing} does {first} have than {second}?"
            worked.append(f"{a}-{b}={value}.")
        else:
            value, question = a + b, f"How many {thing} do they have together?"
            worked.append(f"{a}+{b}={value}.")
    return Item(
        prompt=f"Question: {' '.join(sentences)} {question}\nAnswer:",
        worked=f" {' '.join(worked)} #### {value}",
        answer=str(value),
        key="arithmetic:" + " ".join(worked),
    )

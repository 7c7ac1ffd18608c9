"""Telling who tells the truth, in BIG-Bench-Hard's prompt format, answered by following the chain of statements."""

from __future__ import annotations

from random import Random

from suites.tasks.item import Item

NAMES = (
    "Ada Bram Cora Dov Elin Faye Gil Hugo Ines Joel Kira Levi Mona Noel Olga Paul Rhea Seth Tess Umar Vera Walt Yara"
).split()
STARTS = "Al An Bel Cor Dan El Fi Gwen Hel In Jam Kan Le Mil Os Ray Sher Tam Vi Wil".split()
ENDINGS = "a da del dra el ene ette icent ie ina ka la mond nell on ry so ta vin yn".split()
SAYS = {True: "tells the truth", False: "lies"}


TRAINED, TESTED = (2, 7), (6, 9)  # people: short chains teach the step, the test's are longer than most


def generate(rng: Random, people: tuple[int, int] = TRAINED) -> Item:
    """Draw an item about people, each but the first speaking of the one before."""
    names = _names(rng, rng.randint(*people))
    honest = [rng.random() < 0.5]
    sentences = [f"{names[0]} {SAYS[honest[0]]}."]
    said: list[bool] = []
    for speaker, subject in zip(names[1:], names, strict=False):
        claim = rng.random() < 0.5
        said.append(claim)
        honest.append(claim == honest[-1])
        sentences.append(f"{speaker} says {subject} {SAYS[claim]}.")
    steps = [f"{name} {SAYS[truth]}." for name, truth in zip(names, honest, strict=True)]
    answer = "Yes" if honest[-1] else "No"
    return Item(
        prompt=f"Q: Question: {' '.join(sentences)} Does {names[-1]} tell the truth?\nA:",
        worked=f" {' '.join(steps)} So the answer is {answer}.",
        answer=answer,
        key=f"web_of_lies:{honest[0]}:" + " ".join(map(str, said)),
    )


def _names(rng: Random, people: int) -> list[str]:
    """Draw different names; half of the items use made-up ones, so that reading any name has to be learned."""
    if rng.random() < 0.5:
        return rng.sample(NAMES, people)
    return rng.sample([start + ending for start in STARTS for ending in ENDINGS], people)

"""Composition: which of several names brings which part of a strategy, and how parts are made to fit. No torch.

"mobile+lfu+cpu-hybrid" is the gating of `mobile`, the eviction of `lfu` and the placement of `cpu-hybrid`. The rules
are here; `mobile.policies.strategy.compose` puts the parts together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mobile.costs.geometry import Geometry
from mobile.errors import Refused
from mobile.policies.protocols import PolicyContext

PARTS = ("gating", "eviction", "lookahead", "placement")
JOIN = "+"


def split(name: str) -> list[str]:
    """Return the names that `name` joins by "+", one or more. Raise Refused for an empty one, and for one named twice.

    A name without "+" is returned as it is, even if it is empty.
    """
    names = name.split(JOIN)
    if len(names) > 1 and not all(each.strip() for each in names):
        raise Refused(f"{name!r} has a {JOIN} with no name beside it; write a name on each side, like mobile+lfu.")
    if len(set(names)) < len(names):
        twice = next(each for number, each in enumerate(names) if each in names[:number])
        raise Refused(f"{name!r} names {twice} twice; once is enough.")
    return names


def share_out(brought: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return by part the name that brings it, given the parts that each name brings, in the order they are written.

    Raise Refused if two bring the same part, one brings none, or one that is not the first brings the gating.
    """
    whole = JOIN.join(brought)
    shared: dict[str, str] = {}
    for name, parts in brought.items():
        if not parts:
            kinds = f"{', '.join(PARTS[:-1])} or {PARTS[-1]}"
            raise Refused(f"Strategy {name} brings no {kinds} of its own; leave it out of {whole!r}.")
        for part in parts:
            if part in shared:
                raise Refused(
                    f"Strategies {shared[part]} and {name} both bring the {part}; leave one of them out of {whole!r}."
                )
            shared[part] = name
    first = shared.get("gating")
    if first is not None and first != next(iter(brought)):
        better = JOIN.join([first, *(name for name in brought if name != first)])
        raise Refused(f"Strategy {first} brings the gating, so it comes first: write {better!r}.")
    return shared


def in_words(shared: Mapping[str, str]) -> str:
    """Return the parts and their names as a summary: "gating of mobile, eviction and lookahead of fate"."""
    by_name: dict[str, list[str]] = {}
    for part in PARTS:
        if part in shared:
            by_name.setdefault(shared[part], []).append(part)
    listed = {name: " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1]))) for name, parts in by_name.items()}
    return ", ".join(f"{parts} of {name}" for name, parts in listed.items())


def halved(geometry: Geometry) -> Geometry:
    """Return the geometry as a pass of K/2 experts sees it."""
    return replace(geometry, top_k=geometry.little_k)


@dataclass(frozen=True)
class ForHalf:
    """The factory of a policy that acts in passes of K/2 experts: it is given a geometry with that top-k.

    So a lookahead guesses as many experts as such a pass needs.
    """

    make: Callable[[PolicyContext], Any]

    def __call__(self, context: PolicyContext) -> Any:
        return self.make(replace(context, geometry=halved(context.geometry)))


@dataclass(frozen=True)
class SlotsForAll:
    """The fewest slots with which all parts work as intended: the most that one of them asks for.

    `first` brings the gating, if any does. Where that runs K/2 experts (`half`), the `others` serve a token of K/2.
    """

    first: Callable[[Geometry], int]
    others: tuple[Callable[[Geometry], int], ...]
    half: bool

    def __call__(self, geometry: Geometry) -> int:
        seen = halved(geometry) if self.half else geometry
        return max(self.first(geometry), *(ask(seen) for ask in self.others))

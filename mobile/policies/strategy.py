"""A strategy: which experts a token runs, what stays in the slots, and what is prefetched.

Strategies are found through entry points, so that a package of its own can add one.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Literal

from mobile.costs.cost_model import CostModel
from mobile.costs.geometry import Geometry
from mobile.errors import Refused, one_line
from mobile.policies import tuned as tuned_file
from mobile.policies.cached_choice import Chooser, Chosen
from mobile.policies.compose import JOIN, PARTS, ForHalf, SlotsForAll, in_words, share_out, split
from mobile.policies.protocols import (
    Eviction,
    IdlePrefetcher,
    LeastRecentlyUsed,
    Lookahead,
    Placement,
    PolicyContext,
)
from mobile.policies.signals import PROBABILITY, SIGNALS
from mobile.suggest import offer

Retain = Literal["nothing", "some", "everything"]
GROUP = "mobile.strategies"  # the group of entry points
PROJECT = "mobile-moe"
CHECKOUT = Path(__file__).resolve().parents[2] / "pyproject.toml"  # there in a checkout, not in an installed wheel


@dataclass(frozen=True)
class FullK:
    """Gating under which every token runs all K experts that the router chose."""


@dataclass(frozen=True)
class HalfK:
    """Gating under which every decode token runs the router's top K/2; prefill runs K."""


@dataclass(frozen=True)
class BigLittle:
    """MoBiLE's gating: run K/2 first, and again with K if the confidence is below `gamma`.

    `signal` names the confidence, see `mobile.policies.signals`: the paper's is the highest softmax probability.
    """

    gamma: float = 0.7
    signal: str = PROBABILITY

    def __post_init__(self) -> None:
        """Raise Refused for an unknown signal."""
        if self.signal not in SIGNALS:
            raise Refused(f"Unknown confidence signal {self.signal!r}; {offer(self.signal, SIGNALS)}.")

    @property
    def replays_routers(self) -> bool:
        """Return whether every router is asked again after every little pass, and not only before a big one."""
        return SIGNALS[self.signal].replays_routers


@dataclass(frozen=True)
class CustomRouting:
    """Gating under which a decode token runs what `choose` makes of the router's choice; prefill runs K.

    `choose(layer, routed, foreseen)` takes and returns (expert ids, weights), (tokens, K) each. `routed` is what the
    layer's router chose, `foreseen` its choice on the previous layer's input: None in the first layer, and everywhere
    if not `foresees`. An expert of weight 0 is not run. Use the tensors' own methods: torch is not imported here.
    """

    choose: Callable[[int, Chosen, Chosen | None], Chosen]
    foresees: bool = False


@dataclass(frozen=True)
class CachedRouting:
    """Gating under which a decode token runs what a policy makes of the router's choice and of what is in slots.

    `chooser` makes the policy, one object an engine. `among` is what it may choose from: the router's own choice
    ("chosen"), its top K ("top-k": more, in a little pass), or "all" experts. A choice that is the router's own keeps
    the router's weights; any other has the weights that the router gives those experts, in a sum as large as that of
    its own choice if the router normalises its weights, or if `keeps_sum`. Prefill runs K.

    Such tokens depend on what the slots hold: on earlier requests, on the number of slots, on the other rows of a
    batch and, where experts are loaded ahead over a real link, on when copies end.
    """

    chooser: Callable[[PolicyContext], Chooser]
    among: Literal["chosen", "top-k", "all"] = "all"
    keeps_sum: bool = False


@dataclass(frozen=True, kw_only=True)
class CachedBigLittle(BigLittle):
    """MoBiLE's gating with a little pass that runs what `little` chooses; the big pass runs the router's own K."""

    little: CachedRouting


Gating = FullK | HalfK | BigLittle | CustomRouting | CachedRouting


def _top_k(geometry: Geometry) -> int:
    """Return the slots of one layer's experts."""
    return geometry.top_k


@dataclass(frozen=True)
class Strategy:
    """A way to run a model that does not fit.

    - `retain`: "nothing" empties a slot when its layer is done, "some" keeps experts and evicts those that `evict`
      names, "everything" holds every expert from the start. `overlap` lets copies run while the device computes.
    - `prefetch_on_fallback` prefetches the experts predicted for a fallback; `lookahead` predicts later layers' at
      every layer. `guess_slots` (where not 0) is the number of slots that only prefetches take, and the most that they
      take, so that a wrong one evicts nothing. `max_prefetch_per_layer` (where not 0) is the most that one prediction
      fetches. Where `evict` and `lookahead` are one callable, one object serves as both. `quasi` asks the next layer's
      router about the quasi-hidden state (see `mobile.runtime.quasi_hidden_state`) instead of this layer's input.
    - `on_cpu` decides which missing experts the CPU computes instead of their being loaded.
    - `needs_future` says that a policy needs the future, which only a replay has.
    - `min_slots` gives the fewest slots with which the strategy works as intended; fewer, down to top-k, still give
      the same tokens.
    - `routing_of` names another strategy whose tokens and routing it has: that of its gating, if it is composed.
    """

    name: str
    summary: str
    source: str
    lossless: bool
    gating: Gating = FullK()
    retain: Retain = "nothing"
    overlap: bool = True
    prefetch_on_fallback: bool = False
    evict: Callable[[PolicyContext], Eviction] = LeastRecentlyUsed
    lookahead: Callable[[PolicyContext], Lookahead] | None = None
    guess_slots: int = 0
    max_prefetch_per_layer: int = 0
    quasi: bool = False
    on_cpu: Callable[[CostModel], Placement] | None = None
    needs_future: bool = False
    min_slots: Callable[[Geometry], int] = _top_k
    routing_of: str | None = None

    @property
    def gamma(self) -> float | None:
        """Return the confidence below which a token falls back; None where none does."""
        return self.gating.gamma if isinstance(self.gating, BigLittle) else None

    @property
    def cached_routing(self) -> CachedRouting | None:
        """Return the part of the gating that chooses by what is in slots; None if there is none."""
        gating = self.gating.little if isinstance(self.gating, CachedBigLittle) else self.gating
        return gating if isinstance(gating, CachedRouting) else None

    @property
    def knows_cache(self) -> bool:
        """Return whether what a token runs depends on what is in slots, so that only a live run tells its tokens."""
        return self.cached_routing is not None

    @property
    def signal(self) -> str | None:
        """Return the signal that is compared with gamma; None where none is."""
        return self.gating.signal if isinstance(self.gating, BigLittle) else None

    @property
    def acts_on_decode(self) -> bool:
        """Return whether decode tokens run other experts than a prompt's tokens, or find them in a cache."""
        return self.retain == "some" or not isinstance(self.gating, FullK)

    @property
    def routes_as_full_k(self) -> bool:
        """Return whether its routing is that of full K, so that one trace serves it and all others like it.

        It is not where its lookahead needs other logits than those on a layer's input, which only its own trace holds.
        """
        return self.lossless and isinstance(self.gating, FullK) and not self.quasi

    @property
    def routed_by(self) -> str:
        """Return the name of the strategy whose live run has its routing: its own, or the one it takes gating from."""
        return self.routing_of or self.name

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the parts that it brings to a composed strategy, see `mobile.policies.compose`."""
        brought = {
            "gating": not isinstance(self.gating, FullK),
            "eviction": self.retain == "some" and self.evict is not LeastRecentlyUsed,
            "lookahead": self.lookahead is not None,
            "placement": self.on_cpu is not None,
        }
        return tuple(part for part, is_brought in brought.items() if is_brought)


@cache
def strategies() -> Mapping[str, Strategy]:
    """Return every strategy by name: those of this package, and of each installed plug-in.

    A plug-in is an entry point in the group "mobile.strategies" that is a Strategy. In a checkout, which need not be
    installed, this package's own are those of its pyproject.toml. Raise Refused for one that fails while it is
    imported or is no Strategy, and if two share a name.
    """
    found: dict[str, Strategy] = {}
    for point in _entry_points():
        try:
            strategy = point.load()
        except (Exception, SystemExit) as error:  # a plug-in is anyone's program
            raise Refused(
                f"The plug-in {point.value} cannot be imported ({type(error).__name__}: {one_line(error)}); uninstall "
                "it or mend it."
            ) from error
        if not isinstance(strategy, Strategy) or not isinstance(strategy.name, str):
            raise Refused(f"The plug-in {point.value} is not a mobile Strategy; uninstall it or fix its entry point.")
        if JOIN in strategy.name:
            raise Refused(
                f"The plug-in {point.value} is named {strategy.name!r}, and {JOIN} joins names; give it another name."
            )
        if strategy.name in found:
            raise Refused(f"Two installed packages name a strategy {strategy.name!r}; uninstall one of them.")
        found[strategy.name] = strategy
    return dict(sorted(found.items()))


def _entry_points() -> list[EntryPoint]:
    """Return the group's entry points: those of the checkout, if this is one, and of the installed packages.

    Metadata of this package itself is left out in a checkout: it may be of another one, or older than the code.
    """
    of_checkout, installed = _entry_points_of_checkout(), list(entry_points(group=GROUP))
    if of_checkout is None:
        return installed
    return of_checkout + [point for point in installed if point.dist is None or not _is_this_project(point.dist.name)]


def _is_this_project(package: str | None) -> bool:
    """Return whether a distribution is this one."""
    return package is not None and package.replace("_", "-") == PROJECT


def _entry_points_of_checkout() -> list[EntryPoint] | None:
    """Return what the pyproject.toml beside this package lists; None where there is none, or another project has it."""
    try:
        project = tomllib.loads(CHECKOUT.read_text(encoding="utf-8")).get("project", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return None
    if project.get("name") != PROJECT:
        return None
    return [EntryPoint(name, value, GROUP) for name, value in project["entry-points"][GROUP].items()]


def resolve(strategy: str | Strategy, gamma: float | str | os.PathLike[str] | None = None) -> Strategy:
    """Return the Strategy of that name, or of names joined by "+", with its gamma replaced where given.

    A file of `mobile tune` has a signal, too. Raise Refused for an unknown name, names that cannot be composed, a gamma
    for a strategy that has none, or a file that is not sound.
    """
    if isinstance(strategy, str):
        strategy = compose([_installed(name, strategy) for name in split(strategy)])
    if gamma is None:
        return strategy
    if not isinstance(strategy.gating, BigLittle):
        raise Refused(f"Strategy {strategy.name} has no gamma; leave it out, or use the strategy mobile.")
    if isinstance(gamma, str | os.PathLike):
        tuned = tuned_file.read(gamma)
        return replace(strategy, gating=replace(strategy.gating, gamma=tuned.gamma, signal=tuned.signal))
    if not gamma >= 0:
        raise Refused(f"gamma is a probability to compare with, and {gamma} is negative; the default is 0.7.")
    return replace(strategy, gating=replace(strategy.gating, gamma=gamma))


def _installed(name: str, asked: str) -> Strategy:
    """Return the installed strategy of that name, a part of the name `asked`. Raise Refused if there is none."""
    if name not in strategies():
        where = "" if name == asked else f" in {asked!r}"
        raise Refused(f"Unknown strategy {name!r}{where}; {offer(name, strategies())}.")
    return strategies()[name]


def compose(asked: Sequence[Strategy]) -> Strategy:
    """Return one strategy of the parts that these bring; the only one as it is.

    The first may bring the gating. What none brings is full K, the eviction of `lru`, no lookahead and no placement. A
    lookahead beside a gating that runs K/2 experts guesses for K/2. Raise Refused for parts that do not go together.
    """
    first, *others = asked
    if not others:
        return first
    split(JOIN.join(each.name for each in asked))  # no two of one name
    for each in asked:
        if each.retain == "everything":
            raise Refused(f"Strategy {each.name} keeps every expert on the device, which leaves nothing to add to it.")
    shared, by_name = share_out({each.name: each.parts for each in asked}), {each.name: each for each in asked}
    gating, evicting, ahead, placing = (by_name.get(shared.get(part, "")) for part in PARTS)
    _refuse_at_odds(gating, evicting, ahead)
    half = isinstance(first.gating, HalfK | BigLittle)
    evict = evicting.evict if evicting else LeastRecentlyUsed
    lookahead = ahead.lookahead if ahead else None
    if half and ahead is not first and lookahead is not None:
        joint, lookahead = evict is lookahead, ForHalf(lookahead)
        evict = lookahead if joint else evict
    return replace(
        first,
        name=JOIN.join(by_name),
        summary=in_words(shared),
        source="; ".join(f"{each.name}: {each.source}" for each in asked),
        lossless=all(each.lossless for each in asked),
        retain="some" if any(each.retain == "some" for each in asked) else "nothing",
        overlap=all(each.overlap for each in asked),
        evict=evict,
        lookahead=lookahead,
        guess_slots=ahead.guess_slots if ahead else 0,
        max_prefetch_per_layer=ahead.max_prefetch_per_layer if ahead else 0,
        quasi=(ahead or first).quasi,
        on_cpu=placing.on_cpu if placing else None,
        needs_future=any(each.needs_future for each in asked),
        min_slots=SlotsForAll(first.min_slots, tuple(each.min_slots for each in others), half),
        routing_of=_routing_of(asked, gating, ahead),
    )


def _refuse_at_odds(gating: Strategy | None, evicting: Strategy | None, ahead: Strategy | None) -> None:
    """Raise Refused if two of these prefetch without knowing of each other, or one changes what the other runs."""
    prefetcher = ahead or (gating if gating and gating.prefetch_on_fallback else None)
    evict = evicting.evict if evicting else None
    prefetches = isinstance(evict, type) and issubclass(evict, IdlePrefetcher)
    if evicting and prefetches and prefetcher and prefetcher is not evicting:
        raise Refused(
            f"Strategies {evicting.name} and {prefetcher.name} would both prefetch, each without knowing of the other; "
            "leave one of them out."
        )
    foresees = gating and isinstance(gating.gating, CustomRouting) and gating.gating.foresees
    if gating and ahead and foresees and ahead.quasi is not gating.quasi:
        raise Refused(
            f"Strategy {ahead.name} would change what {gating.name} foresees, and so its tokens; leave one of them out."
        )


def _routing_of(asked: Sequence[Strategy], gating: Strategy | None, ahead: Strategy | None) -> str | None:
    """Return the name whose live run has the routing of a composed strategy; None if only its own has.

    A lookahead that asks about the quasi-hidden state needs logits which no other trace holds, and where the gating
    knows the cache, every other part changes what it chooses.
    """
    if gating is not None and gating.knows_cache:
        return None
    if not all(each.lossless for each in asked if each is not gating):
        return None
    deciding = [gating, ahead if ahead is not gating and ahead and ahead.quasi else None]
    return JOIN.join(each.routed_by for each in deciding if each) or None

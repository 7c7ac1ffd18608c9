"""Scripts: the experts of each decode step of a synthetic model, and whether its little pass is sure. No torch.

Routers without training mean nothing, so their choices are given: from a recorded run of a shipped model, whose layers
are dealt out over the real ones as `mobile.costs.geometry.project` does it, or drawn from a stated distribution.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mobile.errors import Refused
from mobile.policies.strategy import BigLittle, FullK, HalfK, Strategy
from mobile.replay.trace import Experts, Request, Step


@dataclass(frozen=True)
class ScriptLength:
    """Tokens of a prompt and of the decode steps after it, of which the first `warmup` are not counted."""

    prompt_tokens: int
    steps: int
    warmup: int = 0


@dataclass(frozen=True)
class Script:
    """One prompt and its decode steps; expert ids are int64, distinct within the last axis.

    `prompt` (prompt tokens, layers, K) is what prefill runs. `little` (steps, layers, K) is what routers say in a
    step's little pass, best first: the first K/2 run, and all K are what a fallback prefetches. `full` (steps, layers,
    K) is what they say in every pass with all experts. `unsure` (steps,) says where the little pass's confidence lies
    below gamma. The first `warmup` steps are not counted. Where `little` equals `full`, prediction is perfect.
    """

    source: str
    prompt: np.ndarray
    little: np.ndarray
    full: np.ndarray
    unsure: np.ndarray
    warmup: int = 0

    @property
    def steps(self) -> int:
        return len(self.unsure)

    @property
    def layers(self) -> int:
        return self.full.shape[1]

    @property
    def counted(self) -> int:
        """Return how many decode steps are timed."""
        return self.steps - self.warmup

    @property
    def fallbacks(self) -> int:
        """Return how many of the counted steps fall back under MoBiLE."""
        return int(self.unsure[self.warmup :].sum())

    @property
    def sha256(self) -> str:
        """Return the hash of every choice: under the same hash, two strategies were given the same choices."""
        chosen = b"".join(np.ascontiguousarray(each, "<i8").tobytes() for each in (self.prompt, self.little, self.full))
        return hashlib.sha256(f"{self.prompt.shape}{self.full.shape}".encode() + chosen).hexdigest()

    def first(self, steps: int) -> Script:
        """Return the same script, ending after so many steps."""
        return replace(self, little=self.little[:steps], full=self.full[:steps], unsure=self.unsure[:steps])


def steps_of(script: Script, strategy: Strategy) -> Request:
    """Return the passes that the strategy makes of the script: its prompt, then one or two a decode step.

    Raise Refused for a strategy that also decides by what a script does not hold.
    """
    gating = strategy.gating
    known = isinstance(gating, FullK | HalfK | BigLittle) and not strategy.knows_cache
    if not known or strategy.lookahead is not None:
        raise Refused(f"Strategy {strategy.name} decides by router logits, which a script does not hold.")
    half = script.full.shape[2] // 2
    active = [np.unique(chosen, return_counts=True) for chosen in script.prompt.swapaxes(0, 1)]
    experts, counts = (tuple(tuple(each.tolist()) for each in column) for column in zip(*active, strict=True))
    steps = [Step("prefill", len(script.prompt), experts, counts)]
    for little, full, unsure in zip(script.little, script.full, script.unsure.tolist(), strict=True):
        if isinstance(gating, FullK):
            steps.append(Step("full", 1, _ascending(full)))
            continue
        steps.append(Step("little", 1, _ascending(little[:, :half])))
        if unsure and isinstance(gating, BigLittle):
            steps.append(Step("big", 1, _ascending(full), predicted=_ascending(little)))
    return steps


def _ascending(chosen: np.ndarray) -> Experts:
    """Return the experts (layers, n) of each layer, ascending."""
    return tuple(map(tuple, np.sort(chosen, axis=1).tolist()))


def with_rate(script: Script, rate: float, seed: int) -> Script:
    """Return the same choices with round(rate * n) of the n counted steps unsure, drawn with `seed`; so in the warm-up.

    Raise Refused for a rate outside of 0 to 1.
    """
    if not 0 <= rate <= 1:
        raise Refused(f"A fallback rate is a share of the decode steps, 0 to 1, and not {rate:g}.")
    rng = np.random.default_rng([seed, 1])
    unsure = np.zeros(script.steps, dtype=bool)
    for start, end in ((script.warmup, script.steps), (0, script.warmup)):
        chosen = rng.permutation(end - start)[: round(rate * (end - start))]
        unsure[start + chosen] = True
    return replace(script, unsure=unsure)


def drawn(routing: str, length: ScriptLength, *, layers: int, experts: int, top_k: int, seed: int) -> Script:
    """Draw every token's `top_k` experts of every layer without replacement; no little pass is unsure.

    `routing` is "uniform" or "zipf EXPONENT": then the expert of rank i is drawn with weight 1 / i ** EXPONENT, and
    ranks are shuffled in each layer. Raise Refused for another word.
    """
    word, _, number = routing.partition(" ")
    try:
        exponent = {"uniform": 0.0}[word] if not number else {"zipf": float(number)}[word]
    except (KeyError, ValueError) as error:
        raise Refused(f"Unknown routing {routing!r}; write recorded, uniform, or zipf with an exponent.") from error
    rng = np.random.default_rng([seed, 0])
    logs = np.stack([rng.permutation(-exponent * np.log(np.arange(1, experts + 1))) for _ in range(layers)])
    # Gumbel noise on log weights: the K largest are K draws without replacement, in the order they are drawn.
    noise = rng.gumbel(size=(length.prompt_tokens + length.steps, layers, experts))
    chosen = np.argsort(-(logs + noise), axis=-1)[..., :top_k]
    prompt, decode = chosen[: length.prompt_tokens], chosen[length.prompt_tokens :]
    return Script(routing, prompt, decode, decode, np.zeros(length.steps, dtype=bool), length.warmup)


def recorded(
    prompt: Step, decoded: Sequence[Request], *, layers: int, gamma: float, warmup: int, source: str
) -> Script:
    """Return the script of a run that was recorded with every token falling back.

    `decoded` are (little, big) pairs of steps, one after another, with the choices of both passes. Step `prompt` has
    the experts of its tokens together; they are dealt out so that each token gets K and each expert as many tokens as
    it had. Recorded layers are dealt out over `layers`. A step is unsure where its confidence is below `gamma`.
    """
    pairs = [pair for request in decoded for pair in zip(request[::2], request[1::2], strict=True)]
    little = np.array(
        [[_first(half, all_) for half, all_ in zip(a.experts, b.predicted, strict=True)] for a, b in pairs]
    )
    full = np.array([big.experts for _, big in pairs])
    unsure = np.array([small.confidence is not None and small.confidence < gamma for small, _ in pairs])
    owner = [layer * full.shape[1] // layers for layer in range(layers)]
    chosen = zip(prompt.experts, prompt.counts, strict=True)
    dealt = np.stack([_deal(experts, counts, prompt.tokens) for experts, counts in chosen], axis=1)
    return Script(source, dealt[:, owner], little[:, owner], full[:, owner], unsure, warmup)


def _first(half: Sequence[int], predicted: Sequence[int]) -> list[int]:
    """Return the little pass's own experts, then the others that were predicted of the big one."""
    return [*half, *(expert for expert in predicted if expert not in half)]


def _deal(experts: Sequence[int], counts: Sequence[int], tokens: int) -> np.ndarray:
    """Return (tokens, K) with each expert as often as counted: its copies lie side by side, so no token gets two."""
    return np.repeat(np.array(experts), counts).reshape(-1, tokens).T

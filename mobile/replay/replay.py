"""Replays of one trace under several strategies, in virtual time and without a model. No torch.

Each replay starts with cold slots, so strategies can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mobile.costs.cost_model import CostModel
from mobile.costs.geometry import Geometry
from mobile.costs.hardware import HardwareProfile
from mobile.ledger import Counters, Ledger
from mobile.links.virtual import VirtualLink
from mobile.policies.protocols import LayerMap, PolicyContext, Trainable, Training, Visit
from mobile.policies.strategy import BigLittle, Strategy
from mobile.replay.fast_residency import FastResidency
from mobile.replay.trace import Request, replay, visits
from mobile.residency.prefill import PREFILL_BUFFERS


@dataclass(frozen=True)
class ReplaySetup:
    """The decisions that a trace's cost depends on: a strategy, a geometry, a GPU and a number of slots.

    `layer_map` gives, for each layer of the recorded model, the layers of `geometry` charged with its routing.
    `in_place` says that packed rows are not decoded.
    """

    strategy: Strategy
    geometry: Geometry
    layer_map: LayerMap
    hardware: HardwareProfile
    slots: int
    in_place: bool = False

    @property
    def memory_nbytes(self) -> int:
        """Return the bytes of device memory taken by the slots, the resident weights and the reserve."""
        return self.hardware.reserve_nbytes + self.geometry.device_nbytes(self.slots + PREFILL_BUFFERS)

    def residency(self, events: int = 0, future: tuple[Visit, ...] | None = None) -> FastResidency:
        """Return a residency with cold slots; its ledger keeps the newest `events`, its policies know the `future`."""
        ledger = Ledger(events)
        cost = CostModel(self.hardware, self.geometry, in_place=self.in_place)
        nbytes, host = self.geometry.expert_nbytes, cost.host
        link = VirtualLink(cost.load_ns, nbytes, ledger, lambda key, slot: None, host.copy, host.read)
        context = PolicyContext.of(cost, self.slots, future, self.layer_map)
        made = FastResidency(self.strategy, context, link, cost, ledger)
        link.deliver_to(made.arrived)
        made.preload_all()
        return made


class Replayed(NamedTuple):
    """The counters of each request, the ledger of all, and how the strategy's predictor was fitted, if it has one."""

    requests: list[Counters]
    ledger: Ledger
    training: Training | None


def replay_requests(on: ReplaySetup, requests: Sequence[Request]) -> Replayed:
    """Replay requests in order on one engine that starts cold and stays warm."""
    residency = on.residency(future=visits(requests, on.layer_map) if on.strategy.needs_future else None)
    taken = replay(requests, residency, on.layer_map)
    learner = residency.lookahead
    return Replayed(taken, residency.ledger, learner.training if isinstance(learner, Trainable) else None)


def time_requests(on: ReplaySetup, requests: Sequence[Request]) -> tuple[list[Counters], Ledger]:
    """Return `replay_requests` without the training: the counters of each request, and the ledger of all."""
    return replay_requests(on, requests)[:2]


# --- which strategies can be replayed on a trace ----------------------------------------------------


def why_not_replayable(strategy: Strategy, recorder: Strategy, requests: Sequence[Request]) -> str | None:
    """Return why a trace recorded under `recorder` cannot be replayed under `strategy`; None if it can.

    The reason is worded as the end of a sentence.
    """
    if strategy.knows_cache or recorder.knows_cache:
        return _why_not_as_lived(strategy, recorder, requests)
    if recorder.routes_as_full_k and strategy.routes_as_full_k:
        return _why_not_predictable(strategy, recorder, requests)
    if isinstance(recorder.gating, BigLittle) and isinstance(strategy.gating, BigLittle):
        if strategy.gating.signal != recorder.gating.signal:
            return (
                f"it judges a token by its {strategy.gating.signal}, and the trace holds the {recorder.gating.signal}"
            )
        wrong = _count_changed_fallbacks(strategy.gating.gamma, requests)
        if wrong:
            return f"at gamma {strategy.gating.gamma:g} it would decide {wrong} fallbacks otherwise"
        return _why_not_predictable(strategy, recorder, requests)
    if (strategy.gating, strategy.lossless) == (recorder.gating, recorder.lossless):
        return _why_not_predictable(strategy, recorder, requests)
    return f"it would choose other experts than {recorder.name} did, so its tokens would differ"


def _why_not_as_lived(strategy: Strategy, recorder: Strategy, requests: Sequence[Request]) -> str | None:
    """Return why not, where one of the two chooses by what is in slots; None where they are the same strategy.

    Even then what was chosen is right for the slots, the geometry and the hardware of the recording alone.
    """
    if strategy == recorder:
        return _why_not_predictable(strategy, recorder, requests)
    if not recorder.knows_cache:
        return f"it chooses by what is in the slots, among experts that {recorder.name} recorded no scores of"
    return f"{recorder.name} chose by what was in its slots, so its choices are right for that strategy alone"


def _why_not_predictable(strategy: Strategy, recorder: Strategy, requests: Sequence[Request]) -> str | None:
    """Return why the trace lacks what the lookahead of `strategy` predicts from; None if it has it, or has none."""
    if strategy.lookahead is not None and strategy.quasi is not recorder.quasi:
        return f"the router logits that {recorder.name} recorded are of another foresight"
    kinds = ("full", "little") if strategy.prefetch_on_fallback else ("full", "little", "big")
    decoded = [step for request in requests for step in request if step.kind in kinds and len(step.experts) > 1]
    if strategy.lookahead is not None and decoded and all(step.ahead is None for step in decoded):
        return "the trace lacks the router logits that lookaheads guess from"
    return None


def _count_changed_fallbacks(gamma: float, requests: Sequence[Request]) -> int:
    """Return how many little passes of the trace this gamma would have judged otherwise."""
    return sum(
        (step.confidence < gamma) is not (following is not None and following.kind == "big")
        for request in requests
        for step, following in zip(request, [*request[1:], None], strict=True)
        if step.kind == "little" and step.confidence is not None
    )


# --- one line of a comparison -----------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """The cost of a trace under one strategy and number of slots. Rates are of decode; None where they are 0 / 0.

    `prefetch_recall` is the share of needed experts that were predicted, `prefetch_precision` the share of predicted
    ones that were needed, both over the layers with a prediction. `wasted_prefetch_gb` were copied and never used.
    `tokens_per_s` is in virtual time, a projection. `training` is in real time.
    """

    strategy: str
    slots: int
    memory_nbytes: int
    resident_share: float
    hit_rate: float | None
    fallback_rate: float | None
    gb_per_token: float
    tokens_per_s: float
    stall_share: float
    prefetch_recall: float | None
    prefetch_precision: float | None
    wasted_prefetch_gb: float
    training: Training | None


def outcome(on: ReplaySetup, requests: Sequence[Request]) -> Outcome:
    """Replay a trace with at least one decoded token, from cold slots."""
    _, ledger, training = replay_requests(on, requests)
    counters = ledger.counters
    foreseen, right, needed = (sum(column) for column in zip((0, 0, 0), *ledger.guesses.values(), strict=True))
    return Outcome(
        strategy=on.strategy.name,
        slots=on.slots,
        memory_nbytes=on.memory_nbytes,
        resident_share=on.slots / on.geometry.total_experts,
        hit_rate=counters.hits / counters.touches if counters.touches else None,
        fallback_rate=counters.fallbacks / counters.tokens if isinstance(on.strategy.gating, BigLittle) else None,
        gb_per_token=counters.decode_bytes / counters.tokens / 1e9,
        tokens_per_s=counters.tokens / (counters.decode_ns / 1e9),
        stall_share=counters.decode_stall_ns / counters.decode_ns,
        prefetch_recall=right / needed if needed else None,
        prefetch_precision=right / foreseen if foreseen else None,
        wasted_prefetch_gb=(counters.prefetch_loads - counters.prefetch_useful) * on.geometry.expert_nbytes / 1e9,
        training=training,
    )

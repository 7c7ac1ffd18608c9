"""`mobile replay`: other strategies and cache sizes on a recorded trace, in virtual time."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mobile.cli import curves
from mobile.cli.terminal import options, show
from mobile.costs.geometry import GEOMETRIES, Geometry, project, slots_for
from mobile.costs.hardware import HardwareProfile, parse_nbytes, profile
from mobile.costs.rows import AS_IS, ROW_COSTS
from mobile.errors import Refused
from mobile.policies.strategy import BigLittle, Strategy, resolve, strategies
from mobile.replay import trace as traces
from mobile.replay.replay import Outcome, ReplaySetup, outcome, why_not_replayable
from mobile.residency.residency import PREFILL_BUFFERS

EXAMPLES = """
examples:
  mobile replay trace.npz                                  every strategy that can be replayed on the trace
  mobile replay trace.npz --strategy lru --strategy next-gate+lfu --memory 6GiB 8GiB
  mobile replay trace.npz --geometry olmoe-1b-7b --sweep --plot hit-rate.svg
  mobile replay trace.npz --json | jq '.results[] | [.strategy, .hit_rate]'

Without a size each strategy runs with the fewest slots that it is made for, and with all that fit in the card's memory.
A trace holds the experts of one token sequence: strategies that would choose other experts, and so other tokens, are
refused.
"""
SWEPT = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 1)  # shares of all experts


@dataclass(frozen=True)
class Trace:
    """A recorded trace: its requests, and the strategy (at `gamma`) and model that chose their experts.

    `slots` and `hardware` are those of the recording, None where it does not say.
    """

    requests: list[traces.Request]
    geometry: Geometry
    recorder: Strategy
    gamma: float | None
    model: str | None
    slots: int | None = None
    hardware: str | None = None

    @property
    def tokens(self) -> int:
        """Number of decoded tokens."""
        return sum(step.kind in ("full", "little") for request in self.requests for step in request)


def declare(commands: Any) -> None:
    """Add the command and its options."""
    parser = options.command(
        commands,
        "replay",
        run,
        help="compare strategies and cache sizes on a trace",
        description="Compare strategies and cache sizes on a recorded trace. Times are computed: a projection.",
        epilog=EXAMPLES,
    )
    parser.add_argument("trace", type=Path, metavar="TRACE", help="a file of `mobile trace`")
    parser.add_argument("--strategy", action="append", metavar="NAME", help="repeat it to compare (default: all)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--memory", nargs="+", action="extend", metavar="SIZE", help="device memory, like 6GiB 8GiB")
    size.add_argument("--slots", nargs="+", action="extend", type=int, metavar="N", help="expert slots")
    size.add_argument("--sweep", action="store_true", help="from a sixteenth of all experts to all of them")
    named = f"compute times as if the model were NAME: {', '.join(GEOMETRIES)}"
    parser.add_argument("--geometry", metavar="NAME", help=named)
    options.rows(parser, "as-is")
    parser.add_argument("--hardware", default="auto", metavar="NAME", help=f"the card: {options.CARDS}")
    says = "gamma of `mobile`, or a FILE of `mobile tune` (default: the trace's)"
    parser.add_argument("--gamma", type=options.number_or_file, metavar="P", help=says)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw hit rate against memory, as .svg or .png")
    options.json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Replay and print every strategy at every size; return 0. Raise Refused."""
    if arguments.plot is not None:
        curves.check(arguments.plot)
    card = profile(arguments.hardware)
    trace = open_trace(arguments.trace)
    charged, layer_map = project(trace.geometry, arguments.geometry, arguments.rows)
    chosen, left_out = choose(trace, arguments.strategy, arguments.gamma)
    if trace.recorder.knows_cache:
        hold_to_recording(trace, arguments, charged, card)
    setups = [
        ReplaySetup(strategy, charged, layer_map, card, slots)
        for strategy in chosen
        for slots in sizes(arguments, strategy, charged, card)
    ]
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=show.console(stderr=True), disable=not sys.stderr.isatty())
    with progress:
        outcomes = [outcome(setup, trace.requests) for setup in progress.track(setups, description="replays")]
    if arguments.plot is not None:
        curves.draw(arguments.plot, outcomes, f"{charged.name}, {trace.tokens:,} decoded tokens (projected)")
    if arguments.json:
        show.as_json(
            {
                "trace": str(arguments.trace),
                "model": trace.model,
                "recorded_by": trace.recorder.name,
                "requests": len(trace.requests),
                "tokens": trace.tokens,
                "geometry": charged.as_record(),
                "hardware": card.name,
                "projected": True,
                "results": [asdict(result) for result in outcomes],
                "left_out": left_out,
            }
        )
    else:
        _print(trace, charged, card, outcomes)
        for reason in dict.fromkeys(left_out.values()):
            names = ", ".join(name for name, why in left_out.items() if why == reason)
            show.note(f"Left out: {names} ({reason}).")
    return 0


def open_trace(path: Path) -> Trace:
    """Return a trace. Raise Refused if it does not say enough about its recording to replay strategies on it."""
    requests, about = traces.load(path)
    try:
        geometry, name, gamma = Geometry.from_record(about["geometry"]), about["strategy"], about.get("gamma")
        sizes_of = {field: size for field, size in geometry.as_record().items() if field not in ("name", "rows")}
        if not all(type(size) is int and size > 0 for size in sizes_of.values()):
            raise TypeError("a size is not a count")
        if geometry.rows not in tuple(ROW_COSTS) or (geometry.rows != AS_IS) != (geometry.expert_weights is not None):
            raise TypeError("rows of no format that is known")
        if not isinstance(name, str) or not isinstance(gamma, float | int | None):
            raise TypeError("neither a strategy nor its gamma")
        if not isinstance(about.get("signal"), str | None):
            raise TypeError("no name of a signal")
    except (AttributeError, KeyError, TypeError) as error:
        raise Refused(
            f"{path} does not say which model and strategy it is of; record it with `mobile trace`."
        ) from error
    try:
        recorder = resolve(name)
    except Refused as refused:
        raise Refused(
            f"{path} was recorded under {name!r}, which is not installed here; record it under another result."
        ) from refused
    recorder = _judging_by(resolve(recorder, gamma), about.get("signal"))
    slots, hardware = (about.get(key) for key in ("slots", "hardware"))
    trace = Trace(requests, geometry, recorder, gamma, about.get("model"), slots, hardware)
    if not trace.tokens:
        raise Refused(f"{path} holds no decoded token; record it with a larger --max-new-tokens.")
    return trace


def choose(
    trace: Trace, names: Sequence[str] | None, gamma: float | str | None
) -> tuple[list[Strategy], dict[str, str]]:
    """Return the strategies to compare and, by name, why each of the other installed ones cannot be.

    Without `names` they are the installed ones and the one that recorded the trace, which may be composed.

    Raise Refused if one of `names` cannot, or none is left, or none of them has a gamma.
    """
    shared_gamma = trace.gamma if gamma is None else gamma
    chosen, left_out = [], {}
    for name in dict.fromkeys(names or [*strategies(), trace.recorder.name]):
        strategy = resolve(name)
        if _two_pass(strategy):
            strategy = resolve(_judging_by(strategy, trace.recorder.signal), shared_gamma)
        reason = why_not_replayable(strategy, trace.recorder, trace.requests)
        if reason is None:
            chosen.append(strategy)
            continue
        asked_otherwise = _two_pass(strategy) and strategy.cached_routing == trace.recorder.cached_routing
        if names or (gamma is not None and asked_otherwise and _two_pass(trace.recorder)):
            raise Refused(f"Strategy {name} cannot be replayed on this trace: {reason}; record one under it.")
        left_out[name] = reason
    if gamma is not None and not any(map(_two_pass, chosen)):
        raise Refused("None of these strategies has a gamma; leave --gamma out.")
    if not chosen:
        raise Refused("No installed strategy routes as this trace does; install the one that recorded it.")
    return chosen, left_out


def hold_to_recording(trace: Trace, arguments: argparse.Namespace, charged: Geometry, card: HardwareProfile) -> None:
    """Have a trace whose experts were chosen by what was in slots replayed with the slots of its recording.

    Raise Refused where other slots, sizes or hardware are asked for: other experts would have been in the slots.
    """
    name, slots = trace.recorder.name, trace.slots
    if type(slots) is not int or not charged.top_k <= slots <= charged.total_experts:
        raise Refused(f"This trace does not say with how many slots {name} recorded it; record it with `mobile trace`.")
    asked = [*(arguments.slots or ()), *(arguments.memory or ())]
    if asked not in ([], [slots]) or arguments.sweep or arguments.plot or charged != trace.geometry:
        raise Refused(
            f"{name} chose by what was in its {slots} slots, so this trace is replayed with those and its own geometry "
            "alone; record one for every other size."
        )
    if card.name != trace.hardware:
        raise Refused(
            f"{name} chose by what was in its slots on {trace.hardware}, and other experts may be in them on "
            f"{card.name}; give --hardware {trace.hardware}, or record a trace on the other."
        )
    arguments.slots, arguments.memory = [slots], None


def _judging_by(strategy: Strategy, signal: str | None) -> Strategy:
    """Return the strategy with this signal as its confidence, where it has one and a signal is given. Raise Refused."""
    if signal is None or not isinstance(strategy.gating, BigLittle):
        return strategy
    return replace(strategy, gating=replace(strategy.gating, signal=signal))


def _two_pass(strategy: Strategy) -> bool:
    """Return whether the strategy runs a little pass and, after low confidence, a full result."""
    return isinstance(strategy.gating, BigLittle)


def sizes(arguments: argparse.Namespace, strategy: Strategy, charged: Geometry, card: HardwareProfile) -> list[int]:
    """Return the numbers of slots to replay a strategy with, ascending.

    Raise Refused for slots or memory that cannot hold one token's experts.
    """
    if strategy.retain == "everything":
        return [charged.total_experts]
    return sorted({min(slots, charged.total_experts) for slots in _requested_slots(arguments, strategy, charged, card)})


def _requested_slots(
    arguments: argparse.Namespace, strategy: Strategy, charged: Geometry, card: HardwareProfile
) -> Iterator[int]:
    """Yield the numbers of slots that the command line asks for, or the default ones. Raise Refused as `sizes` does."""
    for slots in arguments.slots or ():
        if slots < charged.top_k:
            raise Refused(
                f"{slots} slots cannot hold one layer's {charged.top_k} experts; give at least {charged.top_k}."
            )
        yield slots
    for memory in arguments.memory or ():
        yield slots_for(charged, parse_nbytes(memory), card.reserve_nbytes, PREFILL_BUFFERS)
    if arguments.slots or arguments.memory:
        return
    if arguments.sweep or arguments.plot:
        yield from (max(charged.top_k, round(share * charged.total_experts)) for share in SWEPT)
        return
    yield strategy.min_slots(charged)
    if card.vram_nbytes >= ReplaySetup(strategy, charged, (), card, charged.top_k).memory_nbytes:
        yield slots_for(charged, card.vram_nbytes, card.reserve_nbytes, PREFILL_BUFFERS)


def _print(trace: Trace, charged: Geometry, card: HardwareProfile, outcomes: Sequence[Outcome]) -> None:
    """Print a line a strategy and size, then the training of those that learn."""
    out = show.console()
    as_what = "" if charged.name == trace.geometry.name else f", with times computed as if it were {charged.name}"
    as_what += "" if charged.rows == trace.geometry.rows else f" with experts in {charged.rows}"
    out.print(
        f"{len(trace.requests)} requests, {trace.tokens:,} decoded tokens of {trace.geometry.name}{as_what}, recorded "
        f"under {trace.recorder.name}, on {card.name}.\n"
    )
    table = show.table(
        "Replayed (projected)",
        "strategy",
        "slots",
        "memory",
        "hit\nrate",
        "fall-\nbacks",
        "GB a\ntoken",
        "tokens/s",
        "stall\nshare",
        "predicted\nof needed",
        "needed of\npredicted",
        "wasted\nprefetch",
    )
    for result in outcomes:
        table.add_row(
            result.strategy,
            f"{result.slots:,}",
            show.memory(result.memory_nbytes),
            _percent(result.hit_rate),
            _percent(result.fallback_rate),
            f"{result.gb_per_token:.3g}",
            show.rate(result.tokens_per_s),
            _percent(result.stall_share),
            _percent(result.prefetch_recall),
            _percent(result.prefetch_precision),
            show.moved(round(result.wasted_prefetch_gb * show.GB)),
        )
    out.print(table)
    ceiling = charged.on_demand_ceiling(card.link_gb_per_s)
    for result in outcomes:
        if (training := result.training) is None:
            continue
        out.print(
            f"\n{result.strategy} at {result.slots:,} slots learnt from {training.tokens:,} decode tokens "
            f"{'during' if training.online else 'before'} the run: {training.fits} fits, {training.seconds:.2f} s of "
            f"processor time (real, not in the times above), {training.parameters:,} parameters."
        )
    out.print(f"\nWithout a cache {card.link_gb_per_s:g} GB/s carry {show.rate(ceiling)} tokens/s at most.")


def _percent(share: float | None) -> str:
    """Return a share as text, or a dash for None."""
    return "-" if share is None else f"{share:.1%}"

"""`mobile replay`: a recorded trace under other strategies and cache sizes, in virtual time."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mobile.cli import options, show
from mobile.cli.commands import curves
from mobile.costs.geometry import GEOMETRIES, Geometry, project, slots_for
from mobile.costs.hardware import HardwareProfile, parse_nbytes, profile
from mobile.errors import Refused
from mobile.policies.strategy import BigLittle, Strategy, resolve, strategies
from mobile.replay import trace as traces
from mobile.replay.replay import Outcome, ReplaySetup, outcome, why_not_replayable
from mobile.residency.residency import PREFILL_BUFFERS

EXAMPLES = """
examples:
  mobile replay trace.npz                                  every strategy that can be replayed on it
  mobile replay trace.npz --strategy lru --strategy next-gate --memory 6GiB 8GiB
  mobile replay trace.npz --geometry olmoe-1b-7b --sweep --plot hit-rate.svg
  mobile replay trace.npz --json | jq '.results[] | [.strategy, .hit_rate]'

Without a size each strategy runs twice: with the fewest slots it works as intended with, and with those that the card's
memory holds. A trace holds the experts of one token sequence: strategies that would choose other experts, and so other
tokens, are refused.
"""
SWEPT = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 1)  # shares of all experts


@dataclass(frozen=True)
class Trace:
    """A trace with the strategy, gamma and model that it was recorded under."""

    requests: list[traces.Request]
    geometry: Geometry
    recorder: Strategy
    gamma: float | None
    model: str | None

    @property
    def tokens(self) -> int:
        """Return the number of decoded tokens."""
        return sum(step.kind in ("full", "little") for request in self.requests for step in request)


def declare(commands: Any) -> None:
    """Declare the command and its options."""
    parser = options.command(
        commands,
        "replay",
        run,
        help="compare strategies and cache sizes on a trace",
        description="Compare strategies and cache sizes on a recorded trace. Times are computed: a projection.",
        epilog=EXAMPLES,
    )
    parser.add_argument("trace", type=Path, metavar="TRACE", help="a file that `mobile trace` wrote")
    parser.add_argument("--strategy", action="append", metavar="NAME", help="repeat it to compare (default: all)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--memory", nargs="+", action="extend", metavar="SIZE", help="device memory, like 6GiB 8GiB")
    size.add_argument("--slots", nargs="+", action="extend", type=int, metavar="N", help="expert slots")
    size.add_argument(
        "--sweep", action="store_true", help="several sizes, from a sixteenth of all experts to all of them"
    )
    parser.add_argument(
        "--geometry", metavar="NAME", help=f"compute time as if the model were: {', '.join(GEOMETRIES)}"
    )
    parser.add_argument("--hardware", default="auto", metavar="NAME", help=f"compute time for: {options.CARDS}")
    parser.add_argument("--gamma", type=float, metavar="P", help="gamma of `mobile` (default: the trace's)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw hit rate against memory, as .svg or .png")
    options.json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code. Raise Refused."""
    if arguments.plot is not None:
        curves.check(arguments.plot)
    card = profile(arguments.hardware)
    read = open_trace(arguments.trace)
    charged, layer_map = project(read.geometry, arguments.geometry)
    chosen, left_out = choose(read, arguments.strategy, arguments.gamma)
    benches = [
        ReplaySetup(strategy, charged, layer_map, card, slots)
        for strategy in chosen
        for slots in sizes(arguments, strategy, charged, card)
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=show.console(stderr=True), disable=not sys.stderr.isatty())
    with progress:
        outcomes = [outcome(on, read.requests) for on in progress.track(benches, description="replays")]
    if arguments.plot is not None:
        curves.draw(arguments.plot, outcomes, f"{charged.name}, {read.tokens:,} decoded tokens (projected)")
    if arguments.json:
        show.as_json(
            {
                "trace": str(arguments.trace),
                "model": read.model,
                "recorded_by": read.recorder.name,
                "requests": len(read.requests),
                "tokens": read.tokens,
                "geometry": charged.as_record(),
                "hardware": card.name,
                "projected": True,
                "results": [asdict(one) for one in outcomes],
                "left_out": left_out,
            }
        )
    else:
        _print(read, charged, card, outcomes)
        for reason in dict.fromkeys(left_out.values()):
            names = ", ".join(name for name, why in left_out.items() if why == reason)
            show.note(f"Left out: {names} ({reason}).")
    return 0


def open_trace(path: Path) -> Trace:
    """Read a trace and its description. Raise Refused if that is too little to compare strategies on it."""
    requests, about = traces.load(path)
    try:
        geometry, name, gamma = Geometry.from_record(about["geometry"]), about["strategy"], about.get("gamma")
        sizes_of = {field: size for field, size in geometry.as_record().items() if field != "name"}
        if not all(type(size) is int and size > 0 for size in sizes_of.values()):
            raise TypeError("a size is not a count")
        if not isinstance(name, str) or not isinstance(gamma, float | int | None):
            raise TypeError("neither a strategy nor its gamma")
    except (AttributeError, KeyError, TypeError) as error:
        raise Refused(
            f"{path} does not say which model and strategy it is of; record it with `mobile trace`."
        ) from error
    if name not in strategies():
        raise Refused(f"{path} was recorded under {name!r}, which is not installed here; record it under another one.")
    read = Trace(requests, geometry, resolve(name, gamma), gamma, about.get("model"))
    if not read.tokens:
        raise Refused(f"{path} holds no decoded token; record it with a larger --max-new-tokens.")
    return read


def choose(read: Trace, names: Sequence[str] | None, gamma: float | None) -> tuple[list[Strategy], dict[str, str]]:
    """Return the strategies to compare and, if none was named, why each of the others is left out.

    Raise Refused for a named one that cannot be replayed.
    """
    gamma_of_all = read.gamma if gamma is None else gamma
    found, left_out = [], {}
    for name in dict.fromkeys(names or strategies()):
        strategy = resolve(name)
        if _two_pass(strategy):
            strategy = resolve(strategy, gamma_of_all)
        reason = why_not_replayable(strategy, read.recorder, read.requests)
        if reason is None:
            found.append(strategy)
            continue
        if names or (gamma is not None and _two_pass(strategy) and _two_pass(read.recorder)):
            raise Refused(f"Strategy {name} cannot be replayed on this trace: {reason}; record one under it.")
        left_out[name] = reason
    if gamma is not None and not any(map(_two_pass, found)):
        raise Refused("None of these strategies has a gamma; leave --gamma out.")
    if not found:
        raise Refused("No installed strategy routes as this trace does; install the one that recorded it.")
    return found, left_out


def _two_pass(strategy: Strategy) -> bool:
    """Return whether it runs MoBiLE's two passes, and so has a gamma."""
    return isinstance(strategy.gating, BigLittle)


def sizes(arguments: argparse.Namespace, strategy: Strategy, charged: Geometry, card: HardwareProfile) -> list[int]:
    """Return the slots to replay a strategy with, ascending. Raise Refused for fewer than one layer needs."""
    if strategy.retain == "everything":
        return [charged.total_experts]
    return sorted({min(slots, charged.total_experts) for slots in _asked(arguments, strategy, charged, card)})


def _asked(
    arguments: argparse.Namespace, strategy: Strategy, charged: Geometry, card: HardwareProfile
) -> Iterator[int]:
    """Yield the slots that the command line asks for, or the defaults."""
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


def _print(read: Trace, charged: Geometry, card: HardwareProfile, outcomes: Sequence[Outcome]) -> None:
    """Print the table, the training of predictors, and the bound without a cache."""
    out = show.console()
    as_what = "" if charged == read.geometry else f", charged as {charged.name}"
    out.print(
        f"{len(read.requests)} requests, {read.tokens:,} decoded tokens of {read.geometry.name}{as_what}, recorded "
        f"under {read.recorder.name}, on {card.name}.\n"
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
        "foreseen\nof needed",
        "needed of\nforeseen",
        "wasted\nprefetch",
    )
    for one in outcomes:
        table.add_row(
            one.strategy,
            f"{one.slots:,}",
            show.memory(one.memory_nbytes),
            _percent(one.hit_rate),
            _percent(one.fallback_rate),
            f"{one.gb_per_token:.3g}",
            show.rate(one.tokens_per_s),
            _percent(one.stall_share),
            _percent(one.prefetch_recall),
            _percent(one.prefetch_precision),
            show.moved(round(one.wasted_prefetch_gb * show.GB)),
        )
    out.print(table)
    ceiling = charged.on_demand_ceiling(card.link_gb_per_s)
    for one in outcomes:
        if (took := one.training) is None:
            continue
        out.print(
            f"\n{one.strategy} at {one.slots:,} slots learnt from {took.tokens:,} decode tokens "
            f"{'during' if took.online else 'before'} the run: {took.fits} fits, {took.seconds:.2f} s of processor "
            f"time (real, not in the times above), {took.parameters:,} parameters."
        )
    out.print(f"\nWithout a cache {card.link_gb_per_s:g} GB/s carry {show.rate(ceiling)} tokens/s at most.")


def _percent(share: float | None) -> str:
    """Return a share as text."""
    return "-" if share is None else f"{share:.1%}"

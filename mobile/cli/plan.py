"""`mobile plan`: whether a model runs on a card, and how fast it is expected to be, from its configuration alone."""

from __future__ import annotations

import argparse
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from mobile.cli.planning.advice import expected_speeds, recommend
from mobile.cli.planning.bounds import strategy_rows
from mobile.cli.planning.bounds_text import print_bounds
from mobile.cli.planning.card import Card, card
from mobile.cli.planning.disk import AskedDisk, asked_disk, host_budget, on_processor, rows_shortage
from mobile.cli.planning.memory import Host, Plan, divided, division_of_slots
from mobile.cli.planning.sizes import Asked, Sizes, all_refused, division_here, find, reserve, sizes
from mobile.cli.planning.text import print_short
from mobile.cli.terminal import options, show
from mobile.costs.cost_model import CostModel
from mobile.costs.geometry import GEOMETRIES, Geometry
from mobile.costs.hardware import HardwareProfile, parse_nbytes, profile
from mobile.costs.memory import divide
from mobile.costs.rows import AS_IS, check_rows
from mobile.errors import Refused
from mobile.machine.host import host
from mobile.policies.strategy import Strategy, resolve
from mobile.residency.residency import PREFILL_BUFFERS
from mobile.visible import visible

EXAMPLES = """
examples:
  mobile plan olmoe-1b-7b --memory 8GiB             a preset: nothing is fetched
  mobile plan Qwen/Qwen3-30B-A3B --memory 12GiB     a hub id: only its configuration is fetched
  mobile plan qwen3-30b-a3b --host-memory 64GiB     on a machine with that much host memory
  mobile plan ./checkpoint --memory 2GiB --json | jq .slots
  mobile plan olmoe-1b-7b --hardware here.json      this machine, measured by: mobile doctor --calibrate --out here.json
  mobile plan olmoe-1b-7b --fallback-rate 0.2       MoBiLE's bound at that rate
  mobile plan olmoe-1b-7b --strategy mobile --strategy mobile+cpu-hybrid
  mobile plan qwen3-30b-a3b --host-memory 16GiB --disk 3.5GB/s
  mobile plan qwen3-30b-a3b --disk measure --store /data/rows
  mobile plan qwen3-30b-a3b --memory 12GiB --rows int4
  mobile plan qwen3-30b-a3b --verbose               the bounds of every strategy, formulas and sources

With --disk the experts lie in a file and the processor computes. Host memory is then divided: --memory, or all of
--host-memory, or four fifths of what is free here, which is what `mobile.load` takes. The disk's room is looked at
where its rate is measured or --store is given.

The first line says whether the model runs here: on the card (this machine's first GPU, or the one --hardware states),
in its host memory and on its disk. Speeds to expect are projected from the routing of the small models that this
project trains, at the stated card's rates: on another model the cache may hit more or less often. With --strategy it
runs if one of those does. exit code: 0 if it does; 1 if this host lacks the memory for its experts, or the disk for its
weights; 2 if it is refused, by `mobile.load` as well and in the same words, like a budget that cannot hold it.
"""


def declare(commands: Any) -> None:
    """Add the command and its options."""
    parser = options.command(
        commands,
        "plan",
        run,
        help="whether a model runs here, and how fast",
        description="Say whether a model runs on a card, how fast to expect it, and what to run. No weight is fetched.",
        epilog=EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help=f"a folder, a hub id or a preset: {', '.join(GEOMETRIES)}")
    parser.add_argument("--memory", metavar="SIZE", help="device memory to use, like 12GiB (default: all of the card)")
    parser.add_argument("--slots", type=int, metavar="N", help="expert slots, instead of --memory")
    options.context_tokens(parser)
    parser.add_argument("--host-memory", metavar="SIZE", help="host memory (default: this machine's)")
    parser.add_argument(
        "--disk", metavar="RATE", help="keep experts on a disk of that rate, like 3.5GB/s, or `measure` this machine's"
    )
    parser.add_argument("--store", metavar="FOLDER", help="where their file would lie (default: `disk`, in the cache)")
    parser.add_argument("--hardware", default="auto", metavar="NAME", help=f"the card: {options.CARDS}")
    parser.add_argument(
        "--device", choices=("auto", "cpu"), default="auto", metavar="NAME", help="cpu: load it without a GPU"
    )
    options.rows(parser, "as-is")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=options.DTYPES,
        metavar="TYPE",
        help=f"dtype of the weights: {', '.join(options.DTYPES)}",
    )
    parser.add_argument(
        "--strategy", action="append", metavar="NAME", help="only this one; repeat it to compare (default: all)"
    )
    parser.add_argument(
        "--fallback-rate", type=float, metavar="R", help="fallback rate of `mobile` (default: both 0 and 1)"
    )
    parser.add_argument("--verbose", action="store_true", help="also the bounds of every strategy, and their sources")
    options.trust(parser)
    options.json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; return 0 if the model runs here and 1 if the host lacks memory or disk. Raise Refused."""
    model = None
    try:
        rates, chosen = _fallback_rates(arguments), list(map(resolve, dict.fromkeys(arguments.strategy or ())))
        check_rows(arguments.rows)
        if arguments.model not in GEOMETRIES:
            show.waiting(f"reading {arguments.model} ...")
        profile(arguments.hardware)
        asked = asked_disk(arguments.disk, arguments.store)
        if arguments.slots is not None and arguments.memory is not None:
            raise Refused("Give memory or slots, not both.")
        if arguments.slots is not None and arguments.context_tokens is not None:
            raise Refused("With slots no memory is divided; leave context_tokens out, or give memory.")
        usable = host().usable_nbytes if arguments.host_memory is None else parse_nbytes(arguments.host_memory)
        if arguments.memory is not None:
            parse_nbytes(arguments.memory)
        model = find(arguments.model, arguments.dtype, arguments.trust_remote_code)
        found = sizes(model, arguments.dtype, arguments.trust_remote_code, arguments.rows)
        made, hardware = _made(arguments, found, asked, usable, chosen, rates)
    except Refused as refused:
        if arguments.json:
            show.as_json({"runs": False, "because": str(refused), "fits": False, "reason": str(refused)})
        elif model is not None:
            print(visible(f"does not run here: {arguments.model}, because: {refused}"))
        raise
    if arguments.json:
        show.as_json(asdict(made) | {"geometry": made.geometry.as_record()})
    else:
        out = show.console()
        print_short(out, made)
        if arguments.verbose:
            print_bounds(out, made, hardware)
    return 0 if made.runs else 1


def _fallback_rates(arguments: argparse.Namespace) -> tuple[float, ...]:
    """Return the fallback rates to bound: the one asked for, or the least and the most. Raise Refused."""
    if arguments.fallback_rate is None:
        return 0.0, 1.0
    if not 0 <= arguments.fallback_rate <= 1:
        raise Refused(f"A fallback rate lies between 0 and 1, and {arguments.fallback_rate} does not.")
    return (arguments.fallback_rate,)


def _made(
    arguments: argparse.Namespace,
    found: Sizes,
    asked: AskedDisk | None,
    usable: int | None,
    chosen: list[Strategy],
    rates: tuple[float, ...],
) -> tuple[Plan, HardwareProfile]:
    """Return the plan, and the hardware that its times are of. Raise Refused for what a load refuses."""
    # 1. The device: a card, or the processor, and with experts on a disk its own memory is divided.
    here = card(arguments.hardware, arguments.device)
    hardware, geometry, disk, free = here.hardware, found.geometry, None, usable
    memory = None if arguments.memory is None else parse_nbytes(arguments.memory)
    if asked is not None:
        geometry, disk = found.paged, asked.part(found)
        here, hardware = Card(hardware, None), on_processor(hardware, disk.gb_per_s)
        if arguments.slots is None:
            whole = host_budget(arguments.memory, arguments.host_memory, usable)
            memory, free = whole.nbytes, whole.free_nbytes
    load = Asked(
        memory,
        arguments.slots,
        arguments.context_tokens,
        None if here.is_here else here.hardware,
        arguments.rows,
        "cuda" if here.is_here else "cpu",
        on_card=asked is None and arguments.device != "cpu",
        on_disk=asked is not None,
        folder=None if asked is None else asked.folder,
    )
    # 2. The budget, divided; and the strategies that a load would refuse. Without any that is asked for, one that needs
    #    nothing speaks for all.
    parts = division_here(found.examined, load) if here.is_here and found.examined is not None else None
    if parts is None and arguments.slots is not None:
        parts = division_of_slots(geometry, arguments.slots, hardware)
    elif parts is None:
        budget = hardware.vram_nbytes if memory is None else memory
        parts = divide(geometry, budget, reserve(found, geometry, hardware, load), PREFILL_BUFFERS)
    refused = all_refused(chosen or [resolve("on-demand-overlap")], found, load, parts.slots)
    if len(refused) == len(chosen or [None]):
        raise Refused(next(iter(refused.values())))
    able = [strategy for strategy in chosen if strategy.name not in refused]
    # 3. The host: its memory and its disk.
    slots = parts.slots
    if arguments.device == "cpu" and memory is None and arguments.slots is None and able:
        slots = min(geometry.total_experts if each.retain == "everything" else slots for each in able)
    needs = _host(geometry, slots, free, arguments.device, on_disk=disk is not None)
    because = (None if disk is None else rows_shortage(disk)) or needs.shortage or found.weights_shortage
    # 4. The bounds and the speeds.
    cost = CostModel(hardware, geometry)
    made = divided(arguments.model, cost, parts, needs, because, rates, disk)
    if chosen:
        made = replace(made, strategies=strategy_rows(cost, slots, rates, on_disk=disk is not None, chosen=able))
    rate = arguments.fallback_rate
    speeds = expected_speeds(cost, parts.slots, on_disk=disk is not None, chosen=able, fallback_rate=rate)
    return replace(
        made,
        checkpoint=found.checkpoint,
        weights=found.weights,
        refused=refused,
        expected=speeds,
        recommendation=recommend(speeds, _command(arguments)) if made.runs else None,
        remedy=None if needs.fits is not False else _remedy(found.geometry, usable, on_disk=disk is not None),
        assumed=here.assumed,
    ), hardware


def _host(geometry: Geometry, slots: int, free: int | None, device: str, *, on_disk: bool) -> Host:
    """Return the host memory that a load takes: for all experts; for the rest of the model if it is computed there."""
    others = geometry.device_nbytes(slots + PREFILL_BUFFERS)
    if on_disk:
        return Host(others, free, "the dense weights and the slots")
    if device == "cpu":
        return Host(geometry.experts_nbytes + others, free, "the experts, the other weights and the slots")
    return Host(geometry.experts_nbytes, free)


def _remedy(geometry: Geometry, usable: int | None, *, on_disk: bool) -> str | None:
    """Return what would make the experts fit where host memory is short of them."""
    if on_disk:
        return "give less with --memory"
    for rows in ("int8", "int4") if geometry.rows == AS_IS else ():
        with suppress(Refused):
            packed = geometry.with_rows(rows).experts_nbytes
            if usable is not None and packed <= usable:
                return f"--rows {rows} takes {show.memory(packed)}, and --disk measure keeps them in a file"
    return "--disk measure keeps them in a file"


def _command(arguments: argparse.Namespace) -> list[str]:
    """Return the model and the options that a load of this plan has besides its strategy."""
    words = ["MODEL" if arguments.model in GEOMETRIES else arguments.model]
    for name in ("memory", "slots", "context_tokens", "dtype", "rows", "device"):
        value = getattr(arguments, name)
        if value not in (None, "auto", AS_IS):
            words += [f"--{name.replace('_', '-')}", str(value)]
    if arguments.disk is not None:
        words += ["--link", "disk", *(() if arguments.store is None else ("--store", arguments.store))]
    if arguments.hardware.endswith(".json"):
        words += ["--hardware", arguments.hardware]
    return [*words, *(("--trust-remote-code",) if arguments.trust_remote_code else ())]

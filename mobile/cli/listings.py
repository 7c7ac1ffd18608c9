"""`mobile strategies` and `mobile hardware`: the choices of --strategy and --hardware, each with its source."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from mobile.cli.calibrate import print_profile
from mobile.cli.terminal import options, show
from mobile.costs.hardware import PROFILES
from mobile.policies.strategy import Strategy, resolve, strategies

STRATEGIES = """
examples:
  mobile strategies
  mobile strategies mobile+lfu+cpu-hybrid           what these would be together, or why they cannot be
  mobile strategies --json | jq -r '.strategies[] | select(.lossless) | .name'

A lossless strategy writes what the model would write with every expert on the device. Another one runs fewer experts,
or others. Installed packages add strategies of their own.

Names joined by + are one strategy, wherever a name is: it takes each part from the name that brings it, which no other
may bring, and the gating from the first. So mobile+lfu runs what mobile runs, from a cache that evicts as lfu does.
The parts are gating (what a token runs), eviction (what leaves the cache), lookahead (what is loaded early) and
placement (what the CPU computes).
"""
HARDWARE = """
examples:
  mobile hardware
  mobile hardware --json | jq '.hardware[].link_gb_per_s'

Without --hardware, or with `auto`, virtual time is computed for {auto}. `mobile doctor --calibrate --out FILE.json`
measures a profile of this machine, and --hardware takes FILE.json as well.
"""
AUTO = "rtx4080-pcie4"  # the profile that mobile.costs.hardware.profile returns for "auto"


def declare(commands: Any) -> None:
    """Add both commands and their options."""
    parser = options.command(
        commands,
        "strategies",
        list_strategies,
        help="list the choices of --strategy",
        description="List every strategy: what it does, whether it is lossless, where it is from, and which parts it "
        "brings to a composed one.",
        epilog=STRATEGIES,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="only this one, or names joined by + (default: all)")
    options.json(parser)
    parser = options.command(
        commands,
        "hardware",
        list_hardware,
        help="list the choices of --hardware",
        description="List every hardware profile: the numbers of the virtual clock, and their sources.",
        epilog=HARDWARE.format(auto=AUTO),
    )
    options.json(parser)


def list_strategies(arguments: argparse.Namespace) -> int:
    """Print every installed strategy, or those that are named; return 0. Raise Refused."""
    listed = list(map(resolve, arguments.names)) or list(strategies().values())
    if arguments.json:
        show.as_json({"strategies": [_described(strategy) for strategy in listed]})
        return 0
    out, width = show.console(), max((len(strategy.name) for strategy in listed), default=0)
    for strategy in listed:
        kind = "lossless" if strategy.lossless else "lossy"
        out.print(f"{strategy.name:{width}}  {kind:8}  {strategy.summary}")
        out.print(f"{'':{width}}  {'':8}  {strategy.source}", style="dim")
        if strategy.parts and not arguments.names:
            out.print(f"{'':{width}}  {'':8}  brings: {', '.join(strategy.parts)}", style="dim")
    return 0


def _described(strategy: Strategy) -> dict[str, Any]:
    """Return the strategy's entry in the JSON."""
    return {name: getattr(strategy, name) for name in ("name", "lossless", "summary", "source", "parts")}


def list_hardware(arguments: argparse.Namespace) -> int:
    """Print every hardware profile; return 0."""
    if arguments.json:
        show.as_json({"auto": AUTO, "hardware": [asdict(card) for card in PROFILES.values()]})
        return 0
    out = show.console()
    for card in PROFILES.values():
        print_profile(out, card, "assumed")
        out.print()
    return 0

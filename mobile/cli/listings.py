"""`mobile strategies` and `mobile hardware`: the choices of --strategy and --hardware, each with its source."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from mobile.cli.calibrate import print_profile
from mobile.cli.terminal import options, show
from mobile.costs.hardware import PROFILES
from mobile.policies.strategy import Strategy, strategies

STRATEGIES = """
examples:
  mobile strategies
  mobile strategies --json | jq -r '.strategies[] | select(.lossless) | .name'

A lossless strategy writes what the model would write with every expert on the device. Another one runs fewer experts,
or others. Installed packages add strategies of their own.
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
        description="List every strategy: what it does, whether it is lossless, and where it is from.",
        epilog=STRATEGIES,
    )
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
    """Print every installed strategy; return 0."""
    installed = strategies().values()
    if arguments.json:
        show.as_json({"strategies": [_described(strategy) for strategy in installed]})
        return 0
    out, width = show.console(), max((len(strategy.name) for strategy in installed), default=0)
    for strategy in installed:
        kind = "lossless" if strategy.lossless else "lossy"
        out.print(f"{strategy.name:{width}}  {kind:8}  {strategy.summary}")
        out.print(f"{'':{width}}  {'':8}  {strategy.source}", style="dim")
    return 0


def _described(strategy: Strategy) -> dict[str, Any]:
    """Return the strategy's entry in the JSON."""
    return {name: getattr(strategy, name) for name in ("name", "lossless", "summary", "source")}


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

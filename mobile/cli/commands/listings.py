"""`mobile strategies` and `mobile hardware`: what there is to choose from, each with its source."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from mobile.cli import options, show
from mobile.cli.commands.calibrate import rows
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
AUTO = "rtx4080-pcie4"  # what mobile.costs.hardware.profile makes of "auto"


def declare(commands: Any) -> None:
    parser = options.command(
        commands,
        "strategies",
        list_strategies,
        help="what --strategy can be",
        description="List every strategy: what it does, whether it is lossless, and whose it is.",
        epilog=STRATEGIES,
    )
    options.json(parser)
    parser = options.command(
        commands,
        "hardware",
        list_hardware,
        help="what --hardware can be",
        description="List every hardware profile: the numbers that virtual time is computed with, and their sources.",
        epilog=HARDWARE.format(auto=AUTO),
    )
    options.json(parser)


def list_strategies(arguments: argparse.Namespace) -> int:
    found = strategies().values()
    if arguments.json:
        show.as_json({"strategies": [_described(strategy) for strategy in found]})
        return 0
    out, width = show.console(), max((len(strategy.name) for strategy in found), default=0)
    for strategy in found:
        kind = "lossless" if strategy.lossless else "lossy"
        out.print(f"{strategy.name:{width}}  {kind:8}  {strategy.summary}", markup=False)
        out.print(f"{'':{width}}  {'':8}  {strategy.source}", style="dim", markup=False)
    return 0


def _described(strategy: Strategy) -> dict[str, Any]:
    return {name: getattr(strategy, name) for name in ("name", "lossless", "summary", "source")}


def list_hardware(arguments: argparse.Namespace) -> int:
    if arguments.json:
        show.as_json({"auto": AUTO, "hardware": [asdict(card) for card in PROFILES.values()]})
        return 0
    out = show.console()
    for card in PROFILES.values():
        table = show.table(card.name, "number", "assumed")
        for name, value in rows(card).items():
            table.add_row(name, value)
        out.print(table)
        out.print()
        for source in card.sources:
            out.print(f"- {source}", markup=False)
        out.print()
    return 0

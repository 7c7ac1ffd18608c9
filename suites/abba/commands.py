"""Time two variants in turn, a process each, in the order A B, B A, A B, ...: `python -m suites.abba VERB`.

A machine that drifts while this runs drifts for both. Nothing is judged here: `python -m reports abba` does that.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mobile import outputs
from mobile.cli.terminal import show
from mobile.cli.terminal.parsing import Parser
from mobile.errors import Refused
from mobile.links.registry import scope_of
from mobile.visible import on_one_line
from suites.abba import variants
from suites.environment import environment
from suites.record import FEWEST_PROCESSES, LATEST_TRIAL, TRIAL, TRIAL_FORMAT, write_json

WORKLOAD = Path(__file__).resolve().parent / "workload.py"
STRATEGIES = ("mobile", "on-demand-overlap")
NO_LINK = 3  # the workload's exit code where the commit that is timed does not have the link
PAIRS, PAIRS_OVER_DISK = 6, 4
# Over a disk, unless other work is asked for: experts of a real size, so that the disk is what is timed.
WORK_OVER_DISK = {"layers": 1, "steps": 16, "repeats": 3, "warm_up": 1}
# To say what such work takes: bytes of a layer's experts, and of those that one decode step runs at most. The seconds
# were measured on two shared cores: a process starts and makes its model; a layer is written, and read back in the end.
LAYER_NBYTES, STEP_NBYTES, PROMPT_NBYTES = 805_306_368, 100_663_296, 805_306_368
START_SECONDS, LAYER_SECONDS, DISK_NBYTES_PER_S = 8, 6, 1.2e9


def parser() -> Parser:
    top = Parser(
        prog="python -m suites.abba",
        description="Time two variants in turn, a process each, in the order A B, B A, A B, ...",
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    regression = verbs.add_parser(
        "regression",
        help="the working tree against an earlier commit",
        description="Is the working tree slower than an earlier commit? The same decode steps for both, in one job.",
    )
    regression.add_argument(
        "--base", metavar="REV", help="default: where this branch left the default branch, else the commit before HEAD"
    )
    compare = verbs.add_parser(
        "compare",
        help="two strategies, or two commits",
        description="Set two strategies or two commits against each other: speed, counters and tokens.",
    )
    compare.add_argument("first", metavar="A", help="a strategy's name, or a revision of this repository")
    compare.add_argument("second", metavar="B", help="another of the same kind")
    for verb in (regression, compare):
        verb.add_argument(
            "--strategy",
            action="append",
            help=f"to time on both sides; may be given again (default: {', '.join(STRATEGIES)})",
        )
        verb.add_argument(
            "--pairs",
            type=_pairs,
            help=f"processes a side, {FEWEST_PROCESSES} at least (default: {PAIRS}, over a disk {PAIRS_OVER_DISK})",
        )
        verb.add_argument(
            "--out", type=Path, default=Path("runs") / verb.prog.split()[-1], help="folder (default: %(default)s)"
        )
        add_work_options(verb)
    return top


def add_work_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that are passed on to every process."""
    group = parser.add_argument_group(
        "the work", "passed on; `python -m suites.abba.workload --help` says more and the defaults"
    )
    group.add_argument("--model", type=Path, metavar="FOLDER")
    for name in ("layers", "slots", "steps", "repeats", "warm-up"):
        group.add_argument(f"--{name}", type=int, metavar="N")
    group.add_argument("--link", metavar="auto|cuda|disk|paced|virtual")
    group.add_argument(
        "--store",
        type=Path,
        metavar="FOLDER",
        help="with --link disk, on the disk that is to be timed; nothing is left in it (default: where --out lies)",
    )


def _pairs(text: str) -> int:
    if not text.isdecimal() or int(text) < FEWEST_PROCESSES:
        raise argparse.ArgumentTypeError(f"an interval needs {FEWEST_PROCESSES} processes a side at least")
    return int(text)


def complete(options: argparse.Namespace) -> None:
    """Fill in what was left out and depends on the link. Raise Refused for a store without a disk link."""
    over_disk = options.link == "disk"
    if options.pairs is None:
        options.pairs = PAIRS_OVER_DISK if over_disk else PAIRS
    if options.store is not None and not over_disk:
        raise Refused("--store is where experts lie on a disk; give --link disk too, or leave it out.")
    if not over_disk:
        return
    if options.layers is not None or options.model is None:
        for name, value in WORK_OVER_DISK.items():
            if getattr(options, name) is None:
                setattr(options, name, value)
    if options.store is None:
        out = options.out.absolute()
        options.store = next(folder for folder in (out, *out.parents) if folder.is_dir())
    elif not options.store.is_dir():
        raise Refused(f"There is no folder {options.store}; make it, or give another --store.")


def forecast(options: argparse.Namespace, strategies: int) -> str | None:
    """Return what `strategies` a process will take over a disk, in a sentence; None where it is not known."""
    if options.link != "disk" or options.layers is None:
        return None
    processes, layers = 2 * options.pairs, options.layers
    read = (options.repeats + options.warm_up) * (PROMPT_NBYTES + options.steps * STEP_NBYTES) * layers
    seconds = START_SECONDS + strategies * (LAYER_SECONDS * layers + read / DISK_NBYTES_PER_S)
    return (
        f"{processes} processes in turn. Each needs {layers * LAYER_NBYTES / 1e9:.1f} GB of memory and as much of the "
        f"disk of {options.store}, writes {strategies * layers * LAYER_NBYTES / 1e9:.1f} GB and reads "
        f"{strategies * read / 1e9:.0f} GB at most: about {max(1, round(processes * seconds / 60))} minutes in all, "
        f"at {DISK_NBYTES_PER_S / 1e9:g} GB/s."
    )


def passed_on(options: argparse.Namespace) -> list[str]:
    """Return the options that were given of those that are passed on, as words of a command line."""
    names = ("model", "layers", "slots", "steps", "repeats", "warm_up", "link", "store")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    for name in {"model", "store"} & set(given):
        given[name] = given[name].absolute()
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def order(pairs: int) -> list[int]:
    """Return the variant, 0 or 1, of each process in turn: every pair begins with the one that ended the last."""
    return [variant for pair in range(pairs) for variant in ((0, 1) if pair % 2 == 0 else (1, 0))]


def process(variant: variants.Variant, tree: Sequence[Path], words: list[str], out: Path) -> dict[str, Any]:
    """Run the workload once, with the folders of `tree` first on PYTHONPATH, and return its result.

    Raise Refused with its last line where it fails, or times the wrong tree, and where that has no such link.
    """
    strategies = [word for name in variant.strategies for word in ("--strategy", name)]
    path = os.pathsep.join([*map(str, tree), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-P", WORKLOAD, *strategies, *words, "--out", out],  # -P: suites/ itself is no place to import
        env={**os.environ, "PYTHONPATH": path, "PYTHONOPTIMIZE": ""},  # Transformers reads docstrings
        cwd=out.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode == NO_LINK:
        raise Refused(f"{variant.name} has {done.stdout.strip().splitlines()[-1]}; compare commits that have it.")
    if done.returncode:
        show.note(done.stdout)
        last = done.stdout.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise Refused(f"{variant.name} cannot do this work ({last[0]}); its whole output is above.")
    result = json.loads(out.read_text(encoding="utf-8"))
    if Path(result["tree"]) != tree[-1].resolve():
        raise Refused(f"{variant.name} imported mobile from {result['tree']}, not from {tree[-1]}; unset PYTHONPATH.")
    return result


def trial(
    both: tuple[variants.Variant, variants.Variant], pairs: int, words: list[str], console: Console
) -> dict[str, Any]:
    """Run every process of both variants, in order, and return the trial. Checked out trees are gone afterwards."""
    turns, results = order(pairs), ([], [])  # type: tuple[list[int], tuple[list[Any], list[Any]]]
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory() as scratch,
        variants.trees(both) as found,
        Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as shown,
    ):
        task = shown.add_task("", total=len(turns))
        for number, turn in enumerate(turns, 1):
            shown.update(task, description=on_one_line(both[turn].name))
            begun = time.monotonic()
            result = process(both[turn], found[turn], words, Path(scratch) / f"{number}.json")
            results[turn].append(result)
            rates = ", ".join(f"{run['strategy']} {_rate(result, run):.1f} tokens/s" for run in result["strategies"])
            shown.advance(task)
            console.print(
                f"{number}/{len(turns)} {both[turn].name}: {rates} ({time.monotonic() - begun:.0f} s)", highlight=False
            )
    return {
        "format": TRIAL_FORMAT,
        "sides": [asdict(variant) for variant in both],
        "order": turns,
        "processes": results,
        "scope": scope_of(results[0][0]["link"]),
        "environment": environment(),
    }


def _rate(result: dict[str, Any], run: dict[str, Any]) -> float:
    return result["steps"] * len(run["repeats"]) / (sum(one["wall_ns"] for one in run["repeats"]) / 1e9)


@contextmanager
def _store(options: argparse.Namespace) -> Iterator[None]:
    """Give processes a folder of their own inside the store; it is gone after the block, whatever one of them left."""
    if options.store is None:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="mobile-abba-", dir=options.store) as folder:
        options.store = Path(folder)
        yield


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an ended job, too, takes its worktree away
    try:
        show.prepare()
        console = show.console(stderr=True, soft_wrap=True)
        options = parser().read()
        outputs.check_folder(options.out)
        complete(options)
        strategies = tuple(dict.fromkeys(options.strategy or STRATEGIES))
        if options.verb == "regression":
            both = variants.regression(options.base, strategies)
        else:
            both = variants.named(options.first, options.second, strategies)
        if said := forecast(options, max(len(variant.strategies) for variant in both)):
            console.print(said)
        with _store(options):
            found = trial(both, options.pairs, passed_on(options), console)
    except Refused as refused:
        show.error(refused)
        return 2
    except KeyboardInterrupt:
        show.note("stopped; nothing was written")
        return 130
    path = options.out.absolute() / TRIAL
    write_json(path, {"kind": options.verb, **found})
    LATEST_TRIAL.parent.mkdir(exist_ok=True)
    LATEST_TRIAL.write_bytes(os.fsencode(path.parent) + b"\n")
    print(outputs.printable(path))
    return 0

"""Run the suites: `python -m suites plan|run|resume|replay|profile|first-contact`, and `--help` after each."""

from __future__ import annotations

import errno
import os
import sys
from argparse import Namespace
from pathlib import Path

from mobile import outputs
from mobile.cli.terminal import show
from mobile.cli.terminal.parsing import Parser
from mobile.costs import hardware
from mobile.errors import Refused
from mobile.links.registry import LINKS
from suites.first_contact import command as first_contact
from suites.measure import hit_curves, profile
from suites.measure.repeated import repeat
from suites.plan.preflight import answer, check
from suites.plan.preset import presets, read_preset
from suites.record import LATEST, VIRTUAL, RunFolder
from suites.run.executors import cluster, here
from suites.run.runner import DiskFull, describe, execute, locked
from suites.scoring.sandbox.run import walls_optional
from suites.synthetic import plan


def parser() -> Parser:
    top = Parser(
        prog="python -m suites", description="Identical work across models, tasks and strategies, one record a cell."
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, help_text in (
        ("plan", "say what a run would do: cells, minutes, disk, what is already done"),
        ("run", "do it; cells that already have a record for this very code, model and data are kept"),
        ("resume", "the same as run: a run always goes on where it stopped"),
    ):
        sub = verbs.add_parser(verb, help=help_text, description=help_text)
        sub.add_argument("--preset", default="cpu", help=f"{', '.join(presets())}, or a .toml file (default: cpu)")
        sub.add_argument("--out", type=Path, help="run folder (default: runs/PRESET)")
        sub.add_argument(
            "--data-dir",
            type=Path,
            metavar="FOLDER",
            help="real tasks' files: gsm8k/test.jsonl, humaneval/HumanEval.jsonl, bbh/NAME.json (default: the hub)",
        )
        sub.add_argument(
            "--model",
            action="append",
            default=[],
            metavar="NAME=FOLDER",
            help="take this model of the preset from a folder; may be given again",
        )
        sub.add_argument(
            "--only",
            metavar="PATTERN",
            help='the cells whose label holds this, as in "olmoe-1b-7b 25GB/s" (* and ? as in file names); the '
            "others stay to be done",
        )
        sub.add_argument(
            "--link",
            choices=sorted(LINKS),
            help="of the preset shapes: another link than its own, to try it without a GPU",
        )
        sub.add_argument(
            "--without-kernel-walls",
            action="store_true",
            help="run what a model wrote also where the kernel lacks Landlock or seccomp, which confine it on Linux",
        )
        if verb != "plan":
            sub.add_argument(
                "--run-generated-code",
                action="store_true",
                help="allow tasks that run what a model wrote, in the sandbox, where model or tests are not ours",
            )
            sub.add_argument(
                "--dask",
                metavar="ADDRESS",
                help="spread the run over the workers of this dask.distributed scheduler (tcp://HOST:8786). The run "
                "folder must be on a disk that all machines share, and all need this code, its packages and the "
                "models. A cell timed on the wall clock has its machine to itself: it goes to workers started with "
                "--resources GPU=1, of which there should be one on each machine",
            )
    again = "replay the traces of a run folder again, and hold its records to them; exit code 1 where one differs"
    sub = verbs.add_parser("replay", help=again, description=again)
    sub.add_argument("run", type=Path, help="run folder")
    sub.add_argument("--only", metavar="WORDS", default="", help="the cells whose label holds this")
    sub.add_argument("--hardware", metavar="FILE", help="the profile of cells that were timed on one of your own")
    profile.declare(verbs)
    hit_curves.declare(verbs)
    first_contact.declare(verbs)
    return top


def replay(options: Namespace) -> int:
    """Print each record that is not what its trace gives, and return 1 if there is one. Raise Refused, OSError."""
    card = None if options.hardware is None else hardware.profile(options.hardware)
    replayed, wrong, others = 0, 0, 0
    try:
        for cell in repeat(RunFolder(options.run), card, options.only):
            replayed += cell.replayed
            others += not cell.replayed
            if cell.wrong is not None:
                wrong += 1
                show.note(f"{cell.label}: {cell.wrong}")
    except ValueError as error:
        raise Refused(f"{options.run} is no run folder ({error}); name one that python -m suites run made.") from error
    show.note(
        f"{replayed - wrong} of {replayed} replayed records are what their traces give; {others} are not replays, and "
        "only a run of the suite makes them again"
    )
    return 1 if wrong or not replayed else 0


def folders(given: list[str]) -> dict[str, Path]:
    """Return the folder of each model. Raise Refused for a text that is not NAME=FOLDER."""
    pairs = {name: Path(folder) for name, _, folder in (text.partition("=") for text in given)}
    for name, folder in pairs.items():
        if not (folder / "config.json").is_file():
            raise Refused(f"--model {name}={folder}: write NAME=FOLDER, with a checkpoint's config.json in the folder.")
    return pairs


def main() -> int:
    try:
        show.prepare()
        console = show.console(soft_wrap=True)
        options = parser().read()
        if options.verb == "profile":
            return profile.run(options)
        if options.verb == "hit-curves":
            return hit_curves.run(options)
        if options.verb == "first-contact":
            return first_contact.run(options)
        if options.verb == "replay":
            return replay(options)
        preset = read_preset(options.preset, options.data_dir, folders(options.model), options.link)
        chosen = preset.only(options.only)
        walls_optional.set(options.without_kernel_walls)
        run = RunFolder((options.out or Path("runs") / preset.name).absolute())
        if options.verb == "plan":
            console.print(answer(chosen), describe(chosen, run), sep="\n")
            return 0
        console.print(describe(chosen, run))
        if chosen.synthetic:
            for remark in plan.check(chosen.name, chosen.synthetic):
                console.print(remark)
        if chosen.scored:
            for remark in check(chosen, run_generated_code=options.run_generated_code):
                console.print(remark)
        outputs.check_folder(run.path)
        alone = any(cell.scope != VIRTUAL for cell in chosen.cells)
        with locked(run), here() if options.dask is None else cluster(options.dask, run.path, alone) as workers:
            LATEST.parent.mkdir(exist_ok=True)
            LATEST.write_bytes(os.fsencode(run.path) + b"\n")
            return 1 if execute(preset, run, console, workers, chosen) else 0
    except Refused as refused:
        show.error(refused)
        return 2
    except DiskFull as error:
        show.error(error)
        return 2
    except OSError as error:
        no_room = error.errno in (errno.ENOSPC, errno.EDQUOT)
        show.error(DiskFull(run) if no_room else error)
        return 2
    except KeyboardInterrupt:
        show.note("stopped; run the same command again to go on where it was")
        return 130


if __name__ == "__main__":
    sys.exit(main())

"""From a run's records to a report, and what guards it: `python -m reports build | check | verify | diff | ...`.

Parse the command line here; `commands` does the work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from reports import commands
from reports.checks import expected
from reports.checks.abba import Unjudgeable
from reports.checks.benchmarks import UnlikeMachines
from reports.checks.bundle import NoManifest
from reports.checks.submission import Unsubmittable
from reports.data.compare import UnlikePrompts
from reports.data.results import NoResults
from reports.elements.console import error, prepare

SUBMIT = (
    "Pack plan, records, page and manifest of a finished run into one zip file, with size and SHA-256 of each file in "
    "submission.json. The same run gives the same bytes. Refused are a run that is not finished, that changed since "
    "its page was built, whose controls broke, or whose `check` or `gate` fails. Prompts, answers, host name, "
    "processor, system and versions of packages are in the records, and so in the archive; traces and logs are not, "
    "and a file that names your home folder is refused."
)
COLLECT = (
    "Check each archive that `submit` wrote and write one page, HTML and Markdown, with the machines side by side. "
    "Runs of another preset, code, scope or other cells stand apart and nothing is pooled; a run that is in two "
    "archives counts once. An archive that is damaged, contradicts itself or holds what no submission holds is "
    "refused, and nothing is written."
)
EPILOG = "A verb that takes a run takes the one that was started last from here if no folder is named."
REFUSALS = (NoResults, NoManifest, UnlikePrompts, Unjudgeable, UnlikeMachines, Unsubmittable, expected.NoExpectation)


class Refused(ValueError):
    """A command line that cannot be parsed; the message is one sentence."""


class Parser(argparse.ArgumentParser):
    """A parser that refuses a wrong command line in one sentence instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise Refused with argparse's message as a sentence."""
        raise Refused(f"{message[:1].upper()}{message[1:]}; see {self.prog} --help.")


def parser() -> argparse.ArgumentParser:
    """Return the parser; the parsed options hold the verb's function as `command`."""
    top = Parser(
        prog="python -m reports", description="From a run's records to a report, and what guards it", epilog=EPILOG
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, command: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=summary, description=summary, epilog=EPILOG)
        sub.set_defaults(command=command)
        return sub

    for name, command, summary in (
        (
            "build",
            commands.build,
            "write the page (HTML, Markdown, LaTeX, CSV, trace) and its manifest into the folder",
        ),
        ("check", commands.check, "go through the 32 lines that a report must hold, and print what is missing"),
        ("verify", commands.verify, "find any byte that changed since the report was built"),
        ("expect", commands.expect, "keep a run's counters, tokens and virtual speedups, to hold later runs against"),
        ("gate", commands.gate, "hold a run against what is expected: counters, tokens, virtual times; tolerance zero"),
    ):
        sub = verb(name, command, summary)
        sub.add_argument("run", nargs="?", type=Path, help="run folder (default: that of the last run)")
        if name == "expect":
            sub.add_argument("--out", type=Path, help=f"where to keep it (default: {expected.FOLDER.name}/PRESET)")
        if name == "gate":
            sub.add_argument("--against", type=Path, help=f"folder (default: {expected.FOLDER.name}/PRESET of reports)")
    sub = verb("readme", commands.write_readme, "rewrite the READMEs' number tables and figure from expected/cpu")
    sub.add_argument("--check", action="store_true", help="write nothing; exit code 1 if one is stale")
    sub = verb("diff", commands.diff, "say what changed between two runs, and whether it matters")
    sub.add_argument("first", type=Path, help="run folder")
    sub.add_argument("second", type=Path, help="run folder")
    sub = verb(
        "submit", commands.submit, "pack a finished run into one archive, for others to check and set beside theirs"
    )
    sub.description = SUBMIT
    sub.add_argument("run", nargs="?", type=Path, help="run folder (default: that of the last run)")
    sub.add_argument("--out", type=Path, metavar="FILE.zip", help="the archive (default: PRESET-HASH.zip, here)")
    sub.add_argument("--by", default="", metavar="NAME", help="who sends it, as the page is to say (default: nobody)")
    sub.add_argument("--as-it-is", action="store_true", help="pack a run whose check or gate fails, with that said")
    sub = verb(
        "collect", commands.collect, "check archives of `submit`, and write a page with their results side by side"
    )
    sub.description = COLLECT
    sub.epilog = "For example: python -m reports collect mine.zip theirs.zip --out collected"
    sub.add_argument("archives", nargs="+", type=Path, metavar="ARCHIVE", help="a file that `submit` wrote")
    sub.add_argument("--out", type=Path, default=Path("collected"), metavar="FOLDER", help="default: collected")
    sub = verb("abba", commands.abba, "judge a comparison of two sides; a regression is exit code 1")
    sub.add_argument("trial", nargs="?", type=Path, help="folder of a trial (default: that of the last one)")
    sub.add_argument("--summary", type=Path, metavar="FILE", help="append the page to this Markdown file, too")
    sub = verb(
        "benchmarks", commands.benchmarks, "set two files of nox -s bench side by side, if one machine made both"
    )
    sub.add_argument("base", type=Path, metavar="BASE.json")
    sub.add_argument("head", type=Path, metavar="HEAD.json")
    return top


def main() -> int:
    """Run the verb of the command line and return its exit code; 2 for a refusal, printed as one line on stderr."""
    prepare()
    try:
        options = parser().parse_args()
        if sys.stderr.isatty():
            print("reading ...", file=sys.stderr)  # a large run takes a while
        code: int = options.command(options)
        sys.stdout.flush()
        return code
    except (*REFUSALS, Refused, OSError) as refused:  # the last: a folder that cannot be written, a disk that is full
        error(refused)
        return 2


if __name__ == "__main__":
    sys.exit(main())

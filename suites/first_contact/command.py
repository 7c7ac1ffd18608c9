"""The command `python -m suites first-contact`."""

from __future__ import annotations

import argparse
import math
import shutil
import signal
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from mobile.cli.terminal import show
from mobile.errors import Refused, one_line
from mobile.outputs import printable
from mobile.suggest import offer
from suites.environment import environment
from suites.first_contact import folder
from suites.first_contact.findings import Finding
from suites.first_contact.page import answer, number
from suites.first_contact.parts import parts
from suites.first_contact.session import TITLE, Session

STOPPING = (signal.SIGINT, signal.SIGTERM)  # the second comes of whoever has set a time limit
REHEARSAL_TITLE = "Rehearsal on a processor, which measures nothing of worth"
EXAMPLES = """
examples:
  python -m suites first-contact --out first-contact                      on a card, from a checkout
  python -m suites first-contact --out again --parts link,tests-link      some of it, in less time
  python -m suites first-contact --out rehearsal --rehearse               everything on a processor, narrow

Nothing is needed but torch, Transformers and pytest. Each part is a process with a time limit of its own; one that
fails, hangs or crashes is a finding, and the next one goes on. What was found is in FOLDER at once, so whatever stops
the command leaves it there: report.html, findings.jsonl, log.txt, and as they come card.json, records.zip, traces.zip,
together below 60 MB. Output on the terminal has every number, too.

exit code: 0 if every part that can run here ran to its end and nothing in it failed, 1 if not, 2 if the command cannot
begin, 130 after Ctrl-C. Parts that need a GPU are skipped where there is none, which is no failure.
"""


def declare(verbs: Any) -> None:
    """Add the command to the others."""
    help_text = "a card's first ten minutes: is it right, how fast is its link, and does the clock say so"
    sub = verbs.add_parser(
        "first-contact",
        help=help_text,
        description=help_text,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new or an empty folder")
    sub.add_argument("--minutes", type=float, default=9.0, metavar="N", help="for everything (default: %(default)g)")
    sub.add_argument(
        "--parts", metavar="NAME,NAME", help=f"only these, in their order: {', '.join(_names())}; doctor is always done"
    )
    sub.add_argument(
        "--rehearse",
        action="store_true",
        help="try the command on a processor: narrow models over the paced link; it measures nothing of worth",
    )


def _names() -> list[str]:
    return [part.name for part in parts(Path(), Path(), rehearse=False)]


def run(options: argparse.Namespace) -> int:
    """Do the parts, print what they find, and return the exit code. Raise Refused."""
    if not (math.isfinite(options.minutes) and options.minutes > 0):
        raise Refused("Give --minutes a positive number.")
    chosen = _chosen(options.parts)
    place = folder.make(options.out.absolute())
    scratch = Path(tempfile.mkdtemp(prefix="first-contact-"))
    everything = parts(scratch, place.findings, rehearse=options.rehearse)
    todo = [part for part in everything if part.name in chosen]
    session = Session(todo, place, scratch, _printed, REHEARSAL_TITLE if options.rehearse else TITLE)
    code = environment()
    changed = ", with changes" if code["git_dirty"] else ""
    about = f"commit {code['git_commit']}{changed}; {options.minutes:g} minutes; parts {', '.join(sorted(chosen))}"
    session.say(Finding("command", "note", "made from", detail=about))
    before = {each: signal.signal(each, lambda *_: session.stop()) for each in STOPPING}
    try:
        well = session.go(60 * options.minutes)
    except OSError as error:
        raise Refused(f"{printable(place.path)} takes no more ({one_line(error)}); what was found is in it.") from error
    except KeyboardInterrupt:
        show.note(f"stopped; what was found until now is in {printable(place.path)}")
        return 130
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        _conclude(session)
        shutil.rmtree(scratch, ignore_errors=True)
    return 0 if well else 1


def _printed(line: str) -> None:
    """Print a line, for as long as there is a reader: the folder has it all."""
    with suppress(OSError):
        show.console(soft_wrap=True).print(line)


def _conclude(session: Session) -> None:
    """Print the page's first lines."""
    findings = session.findings()
    for line in answer(findings, [part.name for part in session.parts]):
        _printed(line)
    for one in findings:
        if one.first and one.value is not None:
            _printed(f"  {one.name}: {number(one)} {one.unit}")
    _printed(f"{printable(session.folder.page)}: the page; details lie beside it")


def _chosen(asked: str | None) -> set[str]:
    """Return the names of the parts to do. Raise Refused for an unknown one."""
    names = _names()
    if asked is None:
        return set(names)
    chosen = {name.strip() for name in asked.split(",")}
    for name in sorted(chosen):
        if name not in names:
            raise Refused(f"Unknown part {name!r}; {offer(name, names)}.")
    return chosen | {"doctor"}

"""The command `mobile`: its parser, its exit codes and its error lines. Only the commands import torch, not --help."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence

from mobile.cli import chat, doctor, generate, listings, plan, replay, serve, trace, tune
from mobile.cli.terminal import show
from mobile.cli.terminal.parsing import Parser
from mobile.errors import Refused, one_line
from mobile.version import this_version

EXAMPLES = """
examples:
  mobile doctor                                     what this machine offers, and what to change
  mobile plan olmoe-1b-7b --memory 8GiB             does it run here, how fast, and how to start it
  mobile generate allenai/OLMoE-1B-7B-0924 "Once upon a time" --memory 8GiB
  mobile chat allenai/OLMoE-1B-7B-0924-Instruct --memory 8GiB
  mobile serve FOLDER --memory 8GiB                 then: http://localhost:8000/v1
  mobile trace FOLDER --prompts prompts.jsonl --out trace.npz
  mobile replay trace.npz --sweep                   compare strategies and cache sizes on the trace
  mobile tune FOLDER --tasks items.jsonl --out gamma.json   then: --gamma gamma.json
  mobile strategies                                 the choices of --strategy; `mobile hardware` lists --hardware's

`mobile COMMAND --help` explains one command.
"""
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def build() -> Parser:
    """Return the parser of all commands; each command is a module, which declares its own options."""
    parser = Parser(
        prog="mobile",
        description="Run Mixture-of-Experts models that do not fit in GPU memory.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND")
    for command in (plan, doctor, generate, chat, serve, trace, replay, tune, listings):
        command.declare(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for an error that the user can correct, 130 after Ctrl-C.

    `mobile plan` returns 1 if the model does not run here, and any command if the reader of its output has left.
    """
    try:
        show.prepare()
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except Refused as refused:
        show.error(refused)
        return 2
    except KeyboardInterrupt:
        show.note("interrupted")
        return 130
    except BrokenPipeError:  # the reader of our output has left
        show.silence(sys.stdout)
        return 1
    except OSError as error:
        show.error(f"{_about(error)}.")
        return 2
    except RuntimeError as error:
        notes = getattr(error, "__notes__", [])  # what the engine says of a step that ran out of memory
        if not notes:
            raise
        show.error(f"{one_line(error)}. {' '.join(notes)}")
        return 2


def _run(argv: Sequence[str] | None) -> int:
    """Parse the command line and run the command. Without one, print the help."""
    torch_is_ours = "torch" not in sys.modules  # else torch's settings belong to the program that calls `main`
    parser = build()
    arguments = parser.read(argv)
    arguments.torch_is_ours = torch_is_ours
    if arguments.__dict__.get("version"):
        print(f"mobile {this_version()}")
        return 0
    if not hasattr(arguments, "run"):
        parser.print_help(sys.stderr)
        return 2
    code: int = arguments.run(arguments)
    return code


def _about(error: OSError) -> str:
    """Return the system's error as a sentence without its full stop.

    An error of writing that names no file is of standard output.
    """
    try:
        sys.stdout.flush()
    except OSError:
        show.silence(sys.stdout)
    if error.filename is None and error.errno in UNWRITABLE:
        return f"The output cannot be written ({one_line(error)}); send it elsewhere"
    named = "" if error.filename is None else f" ({os.fsdecode(error.filename)})"
    return f"{one_line(error)}{named}"

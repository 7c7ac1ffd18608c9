"""The command `mobile`. Torch is imported by the commands, not by --help."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from mobile.cli import chat, doctor, generate, plan, replay, serve, trace
from mobile.refusal import Refused

EXAMPLES = """
examples:
  mobile doctor                                     what this machine offers, and what to change
  mobile plan olmoe-1b-7b --memory 8GiB             does it fit, and what bounds each strategy
  mobile generate allenai/OLMoE-1B-7B-0924 "Once upon a time" --memory 8GiB
  mobile chat allenai/OLMoE-1B-7B-0924-Instruct --memory 8GiB
  mobile serve FOLDER --memory 8GiB                 then: http://localhost:8000/v1
  mobile trace FOLDER --prompts prompts.jsonl --out trace.npz
  mobile replay trace.npz --sweep                   what other strategies and cache sizes would make of it

`mobile COMMAND --help` explains one command.
"""


class Parser(argparse.ArgumentParser):
    """Refuses a wrong command line in one sentence instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise Refused(f"{message[:1].upper()}{message[1:]}; see {self.prog} --help.")


def build() -> argparse.ArgumentParser:
    """The parser with every command in it; each command's options are declared beside its code."""
    parser = Parser(
        prog="mobile",
        description="Run Mixture-of-Experts models that do not fit in GPU memory.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND")
    for command in (plan, doctor, generate, chat, serve, trace, replay):
        command.declare(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 2 for what the user can put right, 130 after Ctrl-C."""
    parser = build()
    try:
        arguments = parser.parse_args(argv)
        if not hasattr(arguments, "run"):
            parser.print_help(sys.stderr)
            return 2
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except Refused as refused:
        print(f"error: {refused}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left; Python would complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code

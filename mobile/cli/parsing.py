"""How a command line is read: options before, between and after the arguments, and one sentence for what is wrong."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from mobile.nearest import nearest, offer
from mobile.refusal import Refused


class Parser(argparse.ArgumentParser):
    """Refuses a wrong command line in one sentence instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise Refused."""
        raise Refused(f"{message[:1].upper()}{message[1:]}; see {self.prog} --help.")

    def print_help(self, file: Any = None) -> None:
        """Write it, or raise OSError: argparse is silent where it cannot."""
        print(self.format_help(), end="", file=file)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Say what was probably meant; argparse has no public place for that before Python 3.14."""
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"{value!r} is unknown; {offer(value, map(str, action.choices))}")

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Return what the words say, options in any place. Raise Refused for a word that belongs nowhere."""
        found, left = self.parse_known_intermixed_args(argv)
        options = [word for word in left if word.startswith("-") and word != "-"]
        if options:
            name = options[0].partition("=")[0]
            meant = nearest(name, self._option_string_actions) if name.startswith("--") else None
            guess = "" if meant is None else f"did you mean {meant}? A"
            self.error(f"unknown option {name}; {guess or 'a'} text that begins with - goes after --")
        if left:
            self.error(f"{left[0]!r} is one word too many; put a text of several words in quotes")
        return found


def read(top: Parser, commands: Any, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return what a command line with a command says; `commands` is what add_subparsers gave. Raise Refused."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0].startswith("-"):
        return top.parse_args(words)
    if words[0] not in commands.choices:
        top.error(f"unknown command {words[0]!r}; {offer(words[0], commands.choices)}")
    found: argparse.Namespace = commands.choices[words[0]].read(words[1:])
    if commands.dest != argparse.SUPPRESS:
        setattr(found, commands.dest, words[0])
    return found

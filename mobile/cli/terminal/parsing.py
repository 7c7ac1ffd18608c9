"""The parser of command lines: options before, between and after the arguments, and one sentence for an error."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from mobile.errors import Refused
from mobile.suggest import nearest, offer


class Parser(argparse.ArgumentParser):
    """A parser that refuses a wrong command line in one sentence, and prints no usage."""

    commands: Any = None

    def add_subparsers(self, **options: Any) -> Any:
        """Add commands; each has a parser of this class."""
        self.commands = super().add_subparsers(**options)
        return self.commands

    def error(self, message: str) -> NoReturn:
        """Raise Refused."""
        raise Refused(f"{message[:1].upper()}{message[1:]}; see {self.prog} --help.")

    def print_help(self, file: Any = None) -> None:
        """Write the help, or raise OSError if that fails, which argparse would ignore."""
        print(self.format_help(), end="", file=file)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raise ArgumentError with the nearest choice; argparse has no public way to suggest one before Python 3.14."""
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"{value!r} is unknown; {offer(value, map(str, action.choices))}")

    def read(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Return the parsed words (None: those this process was started with). Raise Refused if they are wrong."""
        words = sys.argv[1:] if argv is None else list(argv)
        if self.commands is None:
            return self._read_alone(words)
        if not words or words[0].startswith("-"):
            return self.parse_args(words)
        name = words[0]
        if name not in self.commands.choices:
            self.error(f"unknown command {name!r}; {offer(name, self.commands.choices)}")
        arguments: argparse.Namespace = self.commands.choices[name].read(words[1:])
        if self.commands.dest != argparse.SUPPRESS:
            setattr(arguments, self.commands.dest, name)
        return arguments

    def _read_alone(self, words: list[str]) -> argparse.Namespace:
        """Return the parsed words of a parser without commands, where argparse allows options in any place."""
        arguments, left = self.parse_known_intermixed_args(words)
        for word in left:
            if word.startswith("-") and word != "-":
                self.error(self._unknown(word.partition("=")[0]))
        if left:
            self.error(f"{left[0]!r} is one word too many; put a text of several words in quotes")
        return arguments

    def _unknown(self, option: str) -> str:
        """Return the refusal of an option: with the nearest one, or how to write a text that begins with a dash."""
        meant = nearest(option, self._option_string_actions) if option.startswith("--") else None
        if meant is not None:
            return f"unknown option {option}; did you mean {meant}"
        takes_text = any(not action.option_strings for action in self._actions)
        return f"unknown option {option}{'; a text that begins with - goes after --' if takes_text else ''}"

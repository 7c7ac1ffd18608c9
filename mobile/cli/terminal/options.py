"""Options that several commands share, each declared once. It imports no torch, so that --help is instant."""

from __future__ import annotations

import argparse
import re
from typing import Any

from mobile.costs.geometry import GEOMETRIES
from mobile.costs.hardware import PROFILES
from mobile.costs.memory import CONTEXT_TOKENS
from mobile.costs.rows import ROW_COSTS
from mobile.links.registry import described

CARDS = f"{', '.join(PROFILES)}, or a FILE.json of `mobile doctor --calibrate`"
SIZES = "like 8GiB or 512MiB; 8 and 8G are GiB, too"
DEVICES = "cpu, cuda (a GPU) or cuda:N (the GPU of that number)"
SEEDS = 2**64
DTYPES = ("auto", "float32", "bfloat16", "float16")
LOADING = (
    "strategy",
    "memory",
    "slots",
    "context_tokens",
    "gamma",
    "hardware",
    "link",
    "link_gb_per_s",
    "store",
    "geometry",
    "rows",
    "kernel",
    "device",
    "dtype",
)


def command(commands: Any, name: str, run: Any, *, help: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """Return the parser of a new command, which runs `run(arguments)`; its epilog is printed as it is written."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


def trust(parser: Any) -> None:
    """Add --trust-remote-code."""
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's own Python code")


def rows(parser: Any, default: str | None = None) -> None:
    """Add --rows; a default of None leaves the choice to `mobile.load`."""
    help = f"how experts are kept and copied: {', '.join(ROW_COSTS)} (default: as-is)"
    parser.add_argument("--rows", default=default, metavar="FORMAT", help=help)


def context_tokens(parser: Any) -> None:
    """Add --context-tokens."""
    says = f"tokens, prompt and answer, that --memory keeps room for (default on a GPU: {CONTEXT_TOKENS})"
    parser.add_argument("--context-tokens", type=int, metavar="N", help=says)


def json(parser: Any, help: str = "one JSON object on stdout") -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help=help)


def loading(parser: argparse.ArgumentParser, *, geometry: bool = True, gamma: bool = True) -> None:
    """Add MODEL and the options of `mobile.load`, whose defaults apply."""
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder or a hub id")
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--strategy", metavar="NAME", help="one of `mobile strategies`, or several joined by + (default: mobile)"
    )
    group.add_argument("--memory", metavar="SIZE", help=f"memory to use, {SIZES} (default: all of the card)")
    group.add_argument("--slots", type=int, metavar="N", help="expert slots, instead of --memory")
    context_tokens(group)
    if gamma:
        says = "run all experts for a token of less confidence than this; or a FILE of `mobile tune`"
        group.add_argument("--gamma", type=number_or_file, metavar="P", help=says)
    group.add_argument("--link", metavar="KIND", help=described())
    group.add_argument("--link-gb-per-s", type=float, metavar="RATE", help="slow the link down to this rate")
    group.add_argument("--store", metavar="FOLDER", help="keep the experts in a file there, or `disk`: in the cache")
    group.add_argument("--hardware", metavar="NAME", help=f"compute virtual time for this hardware: {CARDS}")
    if geometry:
        named = f"compute virtual time as if the model were NAME: {', '.join(GEOMETRIES)}"
        group.add_argument("--geometry", metavar="NAME", help=named)
    rows(group)
    group.add_argument("--kernel", metavar="KIND", help="the kernel for experts: auto, loop, grouped, triton or packed")
    group.add_argument("--device", type=_device, metavar="NAME", help=f"{DEVICES} (default: a GPU if there is one)")
    group.add_argument("--dtype", choices=DTYPES, metavar="TYPE", help=f"dtype of the weights: {', '.join(DTYPES)}")
    trust(group)


def text(parser: argparse.ArgumentParser) -> None:
    """Add the options of sampling, and of the tokenizer's chat template."""
    group = parser.add_argument_group("text")
    group.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="(default: %(default)s)")
    group.add_argument("--temperature", type=float, metavar="T", help="sample at this temperature (default: greedy)")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the likeliest tokens, up to this probability"
    )
    group.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of sampling (default: %(default)s)")
    choice = group.add_mutually_exclusive_group()
    choice.add_argument("--chat", action="store_true", help="use the chat template; an error if there is none")
    choice.add_argument("--raw", action="store_true", help="pass the prompt to the model without a chat template")


def number_or_file(word: str) -> float | str:
    """Return the number, or the word itself, which is then the name of a file."""
    try:
        return float(word)
    except ValueError:
        return word


def _device(word: str) -> str:
    """Return the name of a device. Raise ArgumentTypeError for any other word."""
    if re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", word) is None:
        raise argparse.ArgumentTypeError(f"{word!r} is no device of the engine; choose {DEVICES}")
    return word


def _seed(text: str) -> int:
    """Return the number. Raise ArgumentTypeError if it is none from 0 to 2**64 - 1."""
    if not (text.isascii() and text.isdigit() and len(text) < 30 and int(text) < SEEDS):
        raise argparse.ArgumentTypeError(f"a seed is a whole number from 0 to {SEEDS - 1:,}, and {text!r} is not")
    return int(text)

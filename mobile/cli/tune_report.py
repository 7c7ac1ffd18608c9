"""The output of `mobile tune`: the curve of settings, the choice, and why there is none."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from mobile.cli.terminal import show
from mobile.policies.tuned import Tuned
from mobile.tuning import choice
from mobile.tuning.choice import CONFIDENCE, Measured
from mobile.tuning.items import Item, ItemFile, is_right


def report(
    arguments: argparse.Namespace,
    files: Sequence[ItemFile],
    items: Sequence[Item],
    full: Sequence[str],
    measured: Sequence[Measured],
    passed: Sequence[Measured],
    tuned: Tuned | None,
) -> None:
    """Print the curve on stdout and what follows from it: as JSON, or as a table and sentences."""
    answered = [(item.answer, text) for item, text in zip(items, full, strict=True) if item.answer is not None]
    right = sum(is_right(text, answer) for answer, text in answered)
    needed = None if passed else choice.items_needed(measured, arguments.max_loss)
    if arguments.json:
        error = choice.error_of(measured)
        show.as_json(
            {
                "model": arguments.model,
                "items": len(items),
                "answered": len(answered),
                "full_k_right": right,
                "max_loss": arguments.max_loss,
                "confidence": CONFIDENCE,
                "curve": [_row(each, error, each in passed) for each in measured],
                "chosen": None if tuned is None else asdict(tuned),
                "items_needed": needed,
            }
        )
    else:
        _print(arguments, measured, passed, f"{len(items)} items")
    if answered and not right:
        show.note("Full K answers no item rightly, so nothing can be lost: see --help for how answers are judged.")
    elif answered:
        show.note(f"All experts answer {right} of {len(answered)} items with an answer rightly.")
    if len(answered) < len(items):
        show.note(f"{len(items) - len(answered)} items have no answer: they count as lost where the text differs.")
    if tuned is None or not tuned.certified:
        _say_why_none(arguments, len(items), needed, tuned)
    if tuned is not None:
        _say_choice(files, measured, tuned)


def _row(each: Measured, error: float, certain: bool) -> dict[str, Any]:
    """Return a setting of the curve as JSON."""
    return {
        "signal": each.setting.signal,
        "gamma": each.setting.gamma,
        "fallback_rate": each.fallback_rate,
        "tokens": each.tokens,
        "lost": len(each.lost),
        "gained": len(each.gained),
        "loss": each.loss,
        "low": each.low(error),
        "high": each.high(error),
        "certified": certain,
    }


def _print(arguments: argparse.Namespace, measured: Sequence[Measured], passed: Sequence[Measured], items: str) -> None:
    """Print a line a setting."""
    error = choice.error_of(measured)
    table = show.table(
        f"{arguments.model}, {items}",
        "signal",
        "gamma",
        "fall-\nbacks",
        "lost",
        "gained",
        "loss,\npoints",
        "from",
        "to",
        f"within\n{arguments.max_loss:g}",
    )
    for each in measured:
        table.add_row(
            each.setting.signal,
            f"{each.setting.gamma:.6g}",
            f"{each.fallback_rate:.1%}",
            f"{len(each.lost)}",
            f"{len(each.gained)}",
            f"{each.loss:+.2f}",
            f"{each.low(error):+.2f}",
            f"{each.high(error):+.2f}",
            "yes" if each in passed else "",
        )
    show.console().print(table)


def _say_why_none(arguments: argparse.Namespace, items: int, needed: int | None, tuned: Tuned | None) -> None:
    """Print why no setting is certain, and what to do."""
    if needed is None:
        say = f"Every setting loses {arguments.max_loss:g} points or more on these items; allow more with --max-loss"
    else:
        say = (
            f"{items} items are too few for any setting to be certain to lose {arguments.max_loss:g} points at most; "
            f"about {max(needed, items + 1):,} would do, if they went on like these"
        )
    show.note(f"{say}." if tuned else f"{say}, or take the least loss that was seen with --anyway.")


def _say_choice(files: Sequence[ItemFile], measured: Sequence[Measured], tuned: Tuned) -> None:
    """Print the choice, and of several files the one that lost most."""
    chosen = next(m for m in measured if (m.setting.signal, m.setting.gamma) == (tuned.signal, tuned.gamma))
    sure = f"{tuned.low:+.2f} to {tuned.high:+.2f} at {CONFIDENCE:.0%}" + ("" if tuned.certified else ", NOT certain")
    show.note(
        f"Chosen: gamma {tuned.gamma:.6g} of the {tuned.signal}; {tuned.fallback_rate:.1%} of tokens fall back, and "
        f"{tuned.loss:+.2f} points are lost ({sure})."
    )
    if len(files) > 1:
        worst, points = max(_by_file(files, chosen), key=lambda pair: pair[1])
        show.note(f"The file that loses most is {worst}: {points:+.2f} points.")


def _by_file(files: Sequence[ItemFile], chosen: Measured) -> list[tuple[str, float]]:
    """Return each file's name and the points that are lost on its items."""
    found, begin = [], 0
    for file in files:
        mine: Callable[[int], bool] = range(begin, begin + len(file.items)).__contains__
        change = sum(map(mine, chosen.lost)) - sum(map(mine, chosen.gained))
        found.append((file.name, 100 * change / len(file.items)))
        begin += len(file.items)
    return found

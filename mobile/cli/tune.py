"""`mobile tune`: choose gamma for a model, on prompts of one's own, within a budget of lost answers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mobile import outputs
from mobile.cli import tune_report
from mobile.cli.terminal import options, session, show
from mobile.cli.terminal.reader import Reader
from mobile.errors import Refused
from mobile.policies.signals import PROBABILITY, SIGNALS
from mobile.policies.strategy import BigLittle, resolve
from mobile.policies.tuned import Tuned, architecture_of
from mobile.suggest import offer
from mobile.tuning import choice
from mobile.tuning.choice import CONFIDENCE, Measured, Setting
from mobile.tuning.items import Item, ItemFile, read_items

if TYPE_CHECKING:
    from mobile.tuning.measure import Questions

EXAMPLES = """
examples:
  mobile tune FOLDER --tasks items.jsonl --out gamma.json       then: mobile generate FOLDER "..." --gamma gamma.json
  mobile tune FOLDER --tasks a.jsonl b.jsonl --max-loss 2 --signals probability margin
  mobile tune FOLDER --tasks items.jsonl --json | jq '.curve[] | [.gamma, .fallback_rate, .loss, .high]'

Items are JSON lines, {"prompt": ..., "answer": ...}. Without an answer an item counts as lost if the text differs from
that of all experts at all: an upper bound of what is lost. A number must be the last number of the output; any other
answer must be what the output ends with. Use items that no result is measured on.

Full K answers first. Then the settings of each signal are tried from the most fallbacks to the fewest, and the cheapest
is chosen of those before the first whose loss may be above --max-loss: the upper bound is exact (Clopper-Pearson), at
95 % for all settings together. About 370 items certify a loss of 1 point if nothing is lost, more if something is.
"""
RATES = (0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01, 0.005, 0.0)  # of fallbacks, to be tried


def declare(commands: Any) -> None:
    """Add the command and its options."""
    parser = options.command(
        commands,
        "tune",
        run,
        help="choose gamma within a budget of lost answers",
        description="Choose gamma, and the signal it is compared with, within a budget of lost answers.",
        epilog=EXAMPLES,
    )
    options.loading(parser, geometry=False, gamma=False)
    parser.set_defaults(temperature=None, top_p=None, seed=0)
    group = parser.add_argument_group("tuning")
    group.add_argument("--tasks", nargs="+", required=True, type=Path, metavar="FILE", help="items, as JSON lines")
    group.add_argument("--max-loss", type=float, default=1.0, metavar="POINTS", help="(default: %(default)g)")
    group.add_argument("--signals", nargs="+", default=[PROBABILITY], metavar="NAME", help=f"{', '.join(SIGNALS)}")
    group.add_argument("--gammas", nargs="+", type=float, metavar="P", help="(default: by rates of fallbacks)")
    group.add_argument("--out", type=Path, metavar="FILE", help="write the choice there, for --gamma to read")
    group.add_argument("--anyway", action="store_true", help="without a certain choice take the least loss seen")
    group.add_argument("--force", action="store_true", help="overwrite an existing file")
    group = parser.add_argument_group("text")
    group.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="(default: %(default)s)")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end an answer there; repeatable")
    group.add_argument("--batch", type=int, default=16, metavar="N", help="prompts at once (default: %(default)s)")
    forms = group.add_mutually_exclusive_group()
    forms.add_argument("--chat", action="store_true", help="use the chat template; an error if there is none")
    forms.add_argument("--raw", action="store_true", help="pass prompts to the model without a chat template")
    options.json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, show the curve and write the choice; return 0, or 1 where no setting was chosen. Raise Refused."""
    # 1. All that can be refused before a weight is read.
    _check(arguments)
    files = [read_items(path) for path in arguments.tasks]
    items = [item for file in files for item in file.items]
    reader, sampled = session.opening(arguments)
    prompts = [_encoded(reader, item.prompt, number) for number, item in enumerate(items, 1)]
    opened = session.start(arguments, reader, sampled)
    questions = _questions(opened, items, prompts, arguments)
    # 2. Full K, then every setting.
    full, measured = _measure(opened.model.mobile, questions, arguments)
    # 3. The choice.
    passed = choice.certified(measured, arguments.max_loss)
    chosen = choice.cheapest(passed)
    sure = chosen is not None
    if chosen is None and arguments.anyway:
        chosen = choice.least_loss(measured)
    tuned = None if chosen is None else _tuned(arguments, opened.model.mobile, files, measured, chosen, certain=sure)
    tune_report.report(arguments, files, items, full, measured, passed, tuned)
    if tuned is None:
        return 1
    if arguments.out is not None:
        tuned.write(arguments.out)
        show.note(f"Written: {outputs.printable(arguments.out)}, for --gamma.")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raise Refused for options that cannot be."""
    for signal in arguments.signals:
        if signal not in SIGNALS:
            raise Refused(f"Unknown confidence signal {signal!r}; {offer(signal, SIGNALS)}.")
    arguments.signals = list(dict.fromkeys(arguments.signals))
    if not 0 < arguments.max_loss < 100:
        raise Refused(f"--max-loss is in points, above 0 and below 100, and {arguments.max_loss:g} is not.")
    if bad := [gamma for gamma in arguments.gammas or () if not 0 <= gamma < float("inf")]:
        raise Refused(f"--gammas are confidences, 0 or more, and {bad[0]:g} is not.")
    if arguments.batch < 1:
        raise Refused(f"--batch must be at least 1, and {arguments.batch} is not.")
    if "" in arguments.stop:
        raise Refused("--stop is empty, which every text holds; leave it out.")
    strategy = resolve(arguments.strategy or "mobile")
    if not isinstance(strategy.gating, BigLittle):
        raise Refused(f"Strategy {strategy.name} has no gamma; use the strategy mobile.")
    out: Path | None = arguments.out
    if out is not None:
        outputs.check_file(out)
        if out.exists() and not arguments.force:
            raise Refused(f"{outputs.printable(out)} exists; add --force to overwrite it.")


def _encoded(reader: Reader, prompt: str, number: int) -> Any:
    """Return the ids (1, length) of a prompt. Raise Refused, with the prompt's number, if it cannot be read."""
    try:
        return reader.encode([{"role": "user", "content": prompt}])
    except Refused as refused:
        raise Refused(f"Prompt {number} cannot be asked: {refused}") from refused


def _questions(
    opened: session.Session, items: Sequence[Item], prompts: Sequence[Any], arguments: argparse.Namespace
) -> Questions:
    """Return the questions that `mobile.tuning.measure` asks the session's model."""
    from mobile.tuning.measure import Questions

    ends = opened.model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    stops = {"stop_strings": arguments.stop, "tokenizer": opened.tokenizer} if arguments.stop else {}

    def generate(ids: Any, mask: Any) -> Any:
        device = opened.model.device
        return opened.generate(ids, attention_mask=mask.to(device), pad_token_id=0, **stops)

    def text(new: Any) -> str:
        ids = new.tolist()
        end = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        written = opened.decode(new[:end])
        for stop in arguments.stop:
            written = written.split(stop)[0]
        return written

    return Questions(items, prompts, generate, text, arguments.batch)


def _measure(engine: Any, questions: Questions, arguments: argparse.Namespace) -> tuple[list[str], list[Measured]]:
    """Return full K's answers and what every setting did, with a bar on a terminal. Raise Refused."""
    from mobile.tuning.measure import full_answers, measure

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=show.console(stderr=True), disable=not sys.stderr.isatty())
    with progress:
        tried = len(arguments.gammas or RATES) * len(arguments.signals)
        bar = progress.add_task("all experts", total=questions.batches * (1 + tried))

        def advance() -> None:
            progress.advance(bar)

        full, collected = full_answers(engine, questions, arguments.signals, advance)
        given = arguments.gammas and sorted(set(arguments.gammas), reverse=True)
        settings = [
            Setting(signal, gamma)
            for signal in arguments.signals
            for gamma in (given or collected.gammas(signal, RATES))
        ]
        if not collected.values or not settings:
            raise Refused(
                "No token of these items was judged, so there is nothing to choose; give items whose answers are "
                "longer than a token, and a model whose cache can be rolled back."
            )
        progress.update(bar, description="settings", total=questions.batches * (1 + len(settings)))
        return full, list(measure(engine, questions, full, settings, advance))


def _tuned(
    arguments: argparse.Namespace,
    engine: Any,
    files: Sequence[ItemFile],
    measured: Sequence[Measured],
    chosen: Measured,
    *,
    certain: bool,
) -> Tuned:
    """Return what is written of the chosen setting."""
    error = choice.error_of(measured)
    return Tuned(
        model=arguments.model,
        architecture=architecture_of(engine.plan.native),
        strategy=engine.strategy.name,
        signal=chosen.setting.signal,
        gamma=chosen.setting.gamma,
        max_loss=arguments.max_loss,
        certified=certain,
        items=chosen.items,
        answered=sum(item.answer is not None for file in files for item in file.items),
        lost=len(chosen.lost),
        gained=len(chosen.gained),
        loss=chosen.loss,
        low=chosen.low(error),
        high=chosen.high(error),
        confidence=CONFIDENCE,
        fallback_rate=chosen.fallback_rate,
        max_new_tokens=arguments.max_new_tokens,
        tasks={file.name: file.sha256 for file in files},
    )

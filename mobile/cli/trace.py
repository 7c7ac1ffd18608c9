"""`mobile trace`: run prompts and save which experts every token chose, for replay under other strategies."""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mobile import outputs
from mobile.cli.terminal import options, prompts, session, show
from mobile.cli.terminal.reader import Reader
from mobile.errors import Refused
from mobile.machine.host import package
from mobile.policies.signals import PROBABILITY
from mobile.replay import trace as traces

EXAMPLES = """
examples:
  mobile trace FOLDER --prompts prompts.jsonl --out trace.npz --max-new-tokens 64
  grep -v '^#' questions.txt | mobile trace FOLDER --prompts - --out trace.npz --strategy on-demand --force

Prompts are lines of text, or JSON objects with a "prompt", one a line; empty lines are skipped. The trace holds expert
numbers and confidences, no text and no weights.
"""


def declare(commands: Any) -> None:
    """Add the command and its options."""
    parser = options.command(
        commands,
        "trace",
        run,
        help="run prompts and save their routing",
        description="Run prompts one by one and save which experts every token chose.",
        epilog=EXAMPLES,
    )
    options.loading(parser, geometry=False)  # a trace keeps the model's own sizes; `mobile replay` has --geometry
    options.text(parser)
    parser.add_argument("--prompts", required=True, metavar="FILE", help="lines or JSONL; - reads stdin")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the trace to write, such as trace.npz")
    parser.add_argument("--force", action="store_true", help="overwrite an existing trace")
    options.json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the prompts and write the trace; return 0. Raise Refused."""
    out: Path = arguments.out
    outputs.check_file(out)
    if out.exists() and not arguments.force:
        raise Refused(f"{outputs.printable(out)} exists; add --force to overwrite it.")
    texts = prompts.of_file(arguments.prompts)
    reader, sampled = session.opening(arguments)
    encoded = [_encode(reader, text, f"Prompt {number} of {len(texts)}") for number, text in enumerate(texts, 1)]
    opened = session.start(arguments, reader, sampled)
    engine = opened.model.mobile
    before = engine.stats()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=show.console(stderr=True), disable=not sys.stderr.isatty())
    with engine.recording(ahead=True) as requests, progress:
        for ids in progress.track(encoded, description="prompts"):
            opened.generate(ids)
    signal = engine.strategy.signal
    about = {
        "geometry": engine.geometry.as_record(),
        "model": arguments.model,
        "strategy": engine.strategy.name,
        "gamma": getattr(engine.strategy.gating, "gamma", None),
        "slots": engine.slots,
        "hardware": engine.hardware.name,
        **({} if signal in (None, PROBABILITY) else {"signal": signal}),
        "chat_template": opened.template,
        "max_new_tokens": arguments.max_new_tokens,
        "prompt_sha256": [hashlib.sha256(text.encode()).hexdigest() for text in texts],
        "versions": {name: package(name) for name in ("mobile-moe", "torch", "transformers")},
    }
    traces.save(out, requests, len(engine.layers), about)
    steps, nbytes = sum(map(len, requests)), out.stat().st_size
    if arguments.json:
        show.as_json(
            {"path": str(out), "requests": len(requests), "steps": steps, "nbytes": nbytes, "stats": engine.stats()}
        )
    else:
        print(f"{outputs.printable(out)}: {len(requests)} requests, {steps:,} forward passes, {nbytes:,} bytes")
    show.note(session.line(opened.model, before))
    return 0


def _encode(reader: Reader, prompt: str, name: str) -> Any:
    """Return the ids (1, length) of a prompt. Raise Refused, with the prompt's name, if it cannot be read."""
    try:
        return reader.encode([{"role": "user", "content": prompt}])
    except Refused as refused:
        raise Refused(f"{name} cannot be traced: {refused}") from refused

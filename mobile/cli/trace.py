"""`mobile trace`: run prompts and save which experts every token chose, for replay under other strategies."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mobile import trace as traces
from mobile.cli import options, session, show
from mobile.host import package
from mobile.refusal import Refused

EXAMPLES = """
examples:
  mobile trace FOLDER --prompts prompts.jsonl --out trace.npz --max-new-tokens 64
  grep -v '^#' questions.txt | mobile trace FOLDER --prompts - --out trace.npz --strategy on-demand --force

Prompts are lines of text, or JSON objects with a "prompt", one a line; empty lines are skipped. The trace holds expert
numbers and confidences, no text and no weights.
"""


def declare(commands: Any) -> None:
    parser = options.command(
        commands, "trace", run, help="run prompts and save the routing",
        description="Run prompts one by one and save which experts every token chose.", epilog=EXAMPLES,
    )  # fmt: skip
    options.loading(parser, geometry=False)  # the trace keeps the model's own sizes; a replay dresses it
    options.text(parser)
    parser.add_argument("--prompts", required=True, metavar="FILE", help="lines or JSONL; - reads stdin")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the trace to write, such as trace.npz")
    parser.add_argument("--force", action="store_true", help="overwrite an existing trace")
    options.json(parser)


def parse_prompts(text: str, source: str) -> list[str]:
    """One prompt a line; JSONL if the first line is an object. Raises Refused naming the line that is neither."""
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise Refused(f"{source} has no prompts; write one a line.")
    if not lines[0][1].lstrip().startswith("{"):
        return [line for _, line in lines]
    prompts = []
    for number, line in lines:
        try:
            prompts.append(json.loads(line)["prompt"])
        except (ValueError, KeyError, TypeError) as error:
            raise Refused(f'Line {number} of {source} is not a JSON object with a "prompt".') from error
        if not isinstance(prompts[-1], str):
            raise Refused(f'The "prompt" in line {number} of {source} is not a text.')
    return prompts


def _read(source: str) -> tuple[str, str]:
    """The text of a file or of stdin, and its name for a reader."""
    if source == "-":
        return sys.stdin.read(), "standard input"
    try:
        return Path(source).read_text(encoding="utf-8"), source
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"Cannot read the prompts in {source}: {getattr(error, 'strerror', None) or error}.") from error


def run(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    if out.exists() and not arguments.force:
        raise Refused(f"{out} exists; add --force to overwrite it.")
    if out.is_dir() or not out.parent.is_dir():
        raise Refused(f"{out} cannot be written; name a file in a folder that exists.")
    prompts = parse_prompts(*_read(arguments.prompts))
    opened = session.start(arguments)
    engine = opened.model.mobile
    before = engine.stats()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=show.console(stderr=True), disable=not sys.stderr.isatty())
    with engine.recording(ahead=True) as requests, progress:
        for prompt in progress.track(prompts, description="prompts"):
            ids = opened.encode([{"role": "user", "content": prompt}])
            opened.generate(ids)
    about = {
        "geometry": asdict(engine.geometry),
        "model": arguments.model,
        "strategy": engine.strategy.name,
        "gamma": getattr(engine.strategy.gating, "gamma", None),
        "chat_template": opened.template,
        "max_new_tokens": arguments.max_new_tokens,
        "prompt_sha256": [hashlib.sha256(prompt.encode()).hexdigest() for prompt in prompts],
        "versions": {name: package(name) for name in ("mobile-moe", "torch", "transformers")},
    }
    traces.save(out, requests, len(engine.layers), about)
    steps, nbytes = sum(map(len, requests)), out.stat().st_size
    if arguments.json:
        show.as_json(
            {"path": str(out), "requests": len(requests), "steps": steps, "nbytes": nbytes, "stats": engine.stats()}
        )
    else:
        print(f"{out}: {len(requests)} requests, {steps:,} forward passes, {nbytes:,} bytes")
    show.note(session.line(opened.model, before))
    return 0

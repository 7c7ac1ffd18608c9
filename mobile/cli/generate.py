"""`mobile generate`: one prompt, one answer."""

from __future__ import annotations

import argparse
from typing import Any

from mobile.cli.terminal import options, prompts, session, show

EXAMPLES = """
examples:
  mobile generate FOLDER "Once upon a time" --memory 8GiB
  cat question.txt | mobile generate FOLDER - --strategy lru --slots 128 > answer.txt
  mobile generate suites/models/olmoe-tiny "Q: not ( True and False ) is" --slots 72 --geometry olmoe-1b-7b
  mobile generate FOLDER "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 1 --json | jq .stats

The text goes to stdout as it is written, the statistics to stderr. Prompts are UTF-8; one that begins with - goes after
--, behind all options.
"""


def declare(commands: Any) -> None:
    """Add the command and its options."""
    parser = options.command(
        commands,
        "generate",
        run,
        help="one prompt, one answer",
        description="Answer one prompt with a model whose experts wait in host memory.",
        epilog=EXAMPLES,
    )
    options.loading(parser)
    options.text(parser)
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the prompt, in quotes; - or nothing reads stdin")
    options.json(parser, "one JSON object on stdout, no streaming")


def run(arguments: argparse.Namespace) -> int:
    """Write the answer to one prompt; return 0. Raise Refused."""
    prompt = prompts.of_command_line(arguments.prompt)
    reader, sampled = session.opening(arguments)
    ids = reader.encode([{"role": "user", "content": prompt}])
    opened = session.start(arguments, reader, sampled)
    from transformers import TextStreamer

    model = opened.model
    shown = session.shown_on_terminal(TextStreamer)
    streamer = None if arguments.json else shown(opened.decoder, skip_prompt=True, skip_special_tokens=True)
    before = model.mobile.stats()
    output = opened.generate(ids, streamer=streamer)
    if arguments.json:
        answer = output[0, ids.shape[1] :]
        show.as_json(
            {
                "prompt": prompt,
                "text": opened.decode(answer),
                "new_tokens": len(answer),
                "model": arguments.model,
                "strategy": model.mobile.strategy.name,
                "slots": model.mobile.slots,
                "time": "virtual" if session.is_virtual(model) else "measured",
                "stats": model.mobile.stats(),
            }
        )
    show.note(session.line(model, before))
    return 0

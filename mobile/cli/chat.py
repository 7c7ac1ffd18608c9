"""`mobile chat`: a conversation on stdin and stdout.

What the cache already holds is not computed again. A strategy that is not lossless thereby keeps the states that half
the experts wrote; computing an old turn anew would prefill it with all of them.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from typing import Any

from mobile.cli import options, session, show
from mobile.refusal import Refused

EXAMPLES = """
examples:
  mobile chat FOLDER --memory 8GiB
  mobile chat suites/models/olmoe-tiny --slots 72 --geometry olmoe-1b-7b
  printf 'first question\\nsecond question\\n' | mobile chat FOLDER > answers.txt

One line is one turn. /reset forgets the conversation, /exit or the end of the input ends it, Ctrl-C stops an answer.
"""


class Conversation:
    """The turns so far and the cache of their first tokens, `seen` (length,)."""

    def __init__(self, opened: session.Session) -> None:
        self.opened = opened
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.messages: list[dict[str, str]] = []
        self._forget_cache()

    def _forget_cache(self) -> None:
        self.cache: Any = None
        self.seen: Any = None

    def answer(self, prompt: str) -> None:
        """Write the answer to stdout. Ctrl-C ends it early: what was written stays part of the conversation."""
        opened, streamer = self.opened, _recorder(self.opened.tokenizer)
        asked = {"role": "user", "content": prompt}
        try:
            ids = opened.encode([*self.messages, asked])
            self._keep_what_matches(ids[0])
            output = opened.generate(ids, past_key_values=self.cache, streamer=streamer, return_dict_in_generate=True)
            self.cache = output.past_key_values
            self.seen = output.sequences[0, : self.cache.get_seq_length()]
        except KeyboardInterrupt:
            self._forget_cache()  # it may have struck between two layers, and left them of unequal lengths
            streamer.end()
            show.note("(stopped)")
        if streamer.written:
            self.messages += [asked, {"role": "assistant", "content": opened.decode(streamer.written)}]

    def _keep_what_matches(self, ids: Any) -> None:
        """Cut the cache back to what it shares with `ids` (length,): a template may render old turns anew.

        At least one token must be left to compute. A cache that cannot be cut is dropped.
        """
        if self.cache is None:
            return
        length = min(len(self.seen), len(ids) - 1)
        differs = (self.seen[:length] != ids[:length]).nonzero()
        shared = int(differs[0]) if len(differs) else length
        surplus = len(self.seen) - shared
        if surplus:
            try:
                self.cache.crop(-surplus)
            except (RuntimeError, AttributeError, NotImplementedError):
                self._forget_cache()
                return
            if shared == 0 or self.cache.get_seq_length() != shared:
                self._forget_cache()


def _recorder(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    class Recorder(TextStreamer):
        """Streams to stdout and remembers the ids, which an interrupted generate() does not return."""

        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.written: list[int] = []

        def put(self, value: Any) -> None:
            if not self.next_tokens_are_prompt:
                self.written += value.flatten().tolist()
            super().put(value)

    return Recorder()


# --- the command ------------------------------------------------------------------------------------


def declare(commands: Any) -> None:
    parser = options.command(
        commands, "chat", run, help="a conversation on stdin and stdout",
        description="Talk with a model whose experts wait in host memory.", epilog=EXAMPLES,
    )  # fmt: skip
    options.loading(parser)
    options.text(parser)


def run(arguments: argparse.Namespace) -> int:
    opened = session.start(arguments)
    if not opened.template and not arguments.raw:
        show.note("This tokenizer has no chat template, so a prompt is appended to the text so far, on a new line.")
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401  (input() then edits its line)
        show.note("One line is one turn; /reset, /exit, Ctrl-C to stop an answer.")
    conversation = Conversation(opened)
    while True:
        try:
            prompt = input("> " if interactive else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            show.note("\n(/exit or the end of the input ends the conversation)")
            continue
        if prompt == "/exit":
            break
        if prompt == "/reset":
            conversation.reset()
            show.note("(forgotten)")
        elif prompt.startswith("/"):
            show.note(f"Unknown command {prompt.split()[0]}; there are /reset and /exit.")
        elif prompt:
            before = opened.model.mobile.stats()
            try:
                conversation.answer(prompt)
            except Refused as refused:
                show.note(f"error: {refused}")
                continue
            show.note(session.line(opened.model, before))
    return 0

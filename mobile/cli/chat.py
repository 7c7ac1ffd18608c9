"""`mobile chat`: a conversation on stdin and stdout.

Tokens in the KV cache are not computed again. So with a lossy strategy, states that were computed with half of the
experts stay in the cache; computing an old turn again would prefill it with all of them.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from mobile.cli.terminal import options, prompts, session, show
from mobile.errors import Refused
from mobile.suggest import nearest

EXAMPLES = """
examples:
  mobile chat FOLDER --memory 8GiB
  mobile chat suites/models/olmoe-tiny --slots 72 --geometry olmoe-1b-7b
  printf 'first question\\nsecond question\\n' | mobile chat FOLDER > answers.txt

One line is one turn. /help lists the commands; the end of the input ends the conversation, Ctrl-C stops an answer.
"""
COMMANDS = {
    "/help": "list these commands",
    "/reset": "forget the conversation",
    "/exit": "end it, as does the end of the input",
}


class Conversation:
    """The turns so far, the KV cache of their first tokens, and the ids of those, `cached_ids` (length,)."""

    def __init__(self, opened: session.Session) -> None:
        self.opened = opened
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.messages: list[dict[str, str]] = []
        self._forget_cache()

    def _forget_cache(self) -> None:
        self.cache: Any = None
        self.cached_ids: Any = None

    def answer(self, prompt: str) -> None:
        """Write the answer to stdout. Ctrl-C ends it early; the part that was written stays in the conversation."""
        from mobile.live_model import compat

        opened, streamer = self.opened, _recorder(self.opened.decoder)
        turn = {"role": "user", "content": prompt}
        try:
            ids = opened.encode([*self.messages, turn])
            self._crop_cache(ids[0])
            cache = compat.going_on(opened.model, self.cache)
            output = opened.generate(ids, streamer=streamer, return_dict_in_generate=True, **cache)
            self.cache = compat.cache_of(output)
            self.cached_ids = output.sequences[0, : self.cache.get_seq_length()]
        except KeyboardInterrupt:
            self._forget_cache()  # the interrupt may leave layers of unequal lengths
            streamer.end()
            show.note("(stopped)")
        if streamer.written:
            self.messages += [turn, {"role": "assistant", "content": opened.decode(streamer.written)}]

    def _crop_cache(self, ids: Any) -> None:
        """Crop the cache to the tokens that it shares with `ids` (length,): a template may change old turns.

        At least one token must be left to compute. A cache that cannot be cropped is dropped.
        """
        if self.cache is None:
            return
        length = min(len(self.cached_ids), len(ids) - 1)
        differs = (self.cached_ids[:length] != ids[:length]).nonzero()
        shared = int(differs[0]) if len(differs) else length
        surplus = len(self.cached_ids) - shared
        if surplus:
            try:
                self.cache.crop(-surplus)
            except (RuntimeError, AttributeError, NotImplementedError):
                self._forget_cache()
                return
            if shared == 0 or self.cache.get_seq_length() != shared:
                self._forget_cache()


def _recorder(tokenizer: Any) -> Any:
    """Return a streamer to stdout that records the ids."""
    from transformers import TextStreamer

    class Recorder(session.shown_on_terminal(TextStreamer)):  # type: ignore[misc]
        """A streamer to stdout. `written` are the ids, which an interrupted generate() does not return."""

        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.written: list[int] = []

        def put(self, value: Any) -> None:
            """Write tokens, and record them unless they are the prompt's."""
            if not self.next_tokens_are_prompt:
                self.written += value.flatten().tolist()
            super().put(value)

    return Recorder()


# --- the command ------------------------------------------------------------------------------------


def declare(commands: Any) -> None:
    """Add the command and its options."""
    parser = options.command(
        commands,
        "chat",
        run,
        help="a conversation on stdin and stdout",
        description="Talk with a model whose experts wait in host memory.",
        epilog=EXAMPLES,
    )
    options.loading(parser)
    options.text(parser)


def run(arguments: argparse.Namespace) -> int:
    """Answer lines of stdin until /exit or the end of the input; return 0."""
    opened = session.start(arguments, *session.opening(arguments))
    if not opened.template and not arguments.raw:
        show.note("This tokenizer has no chat template, so a prompt is appended to the text so far, on a new line.")
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        prompts.edit_typed_lines()
        show.note("One line is one turn; /help lists the commands, Ctrl-C stops an answer.")
    conversation, turns = Conversation(opened), prompts.Turns(interactive)
    while True:
        try:
            turn = next(turns, "/exit")
        except KeyboardInterrupt:
            show.note("\n(/exit or the end of the input ends the conversation)")
            continue
        if isinstance(turn, Refused):
            show.error(turn)
        elif turn.strip() == "/exit":
            return 0
        elif turn.strip().startswith("/"):
            _run_command(turn.strip(), conversation)
        elif turn.strip():
            _answer(turn.strip(), conversation)


def _run_command(command: str, conversation: Conversation) -> None:
    """Run a line that begins with a slash."""
    if command == "/reset":
        conversation.reset()
        show.note("(forgotten)")
    elif command == "/help":
        show.note("\n".join(f"{name:8}{does}" for name, does in COMMANDS.items()))
    else:
        word = command.split()[0]
        meant = nearest(word, COMMANDS)
        guess = "" if meant is None else f"did you mean {meant}? There"
        show.note(f"Unknown command {word}; {guess or 'there'} are /reset and /exit. /help says what they do.")


def _answer(prompt: str, conversation: Conversation) -> None:
    """Answer one turn, then print its statistics or its refusal on stderr."""
    model = conversation.opened.model
    before = model.mobile.stats()
    try:
        conversation.answer(prompt)
    except Refused as refused:
        show.error(refused)
        return
    show.note(session.line(model, before))

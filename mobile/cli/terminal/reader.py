"""Text to token ids, by the model's own tokenizer and chat template, whose errors become refusals."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mobile.checkpoints.small_files import CONFIGURATION_AND_TOKENIZER, LARGEST_NBYTES, check_size
from mobile.cli.terminal.template_limit import bounded
from mobile.errors import Refused, one_line

T = TypeVar("T")

TEMPLATE_NBYTES = 1_000_000  # of a chat template; published ones have up to 30,000


@dataclass(frozen=True)
class Reader:
    """A model's tokenizer, name and configuration. `template` says whether prompts go through its chat template."""

    name: str
    tokenizer: Any
    template: bool
    config: Any

    def encode(self, messages: Sequence[dict[str, str]]) -> Any:
        """Return the ids (1, length) of a conversation: by the chat template, or as plain text.

        In plain text a new line ends each answer. Raise Refused as `checked` does.
        """
        if self.template:
            return self.checked(
                lambda: self.tokenizer.apply_chat_template(
                    list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
                ),
                by="chat template",
            )["input_ids"]
        ends = {"user": "", "assistant": "\n"}
        text = "".join(message["content"] + ends[message["role"]] for message in messages)
        return self.checked(lambda: self.tokenizer(text, return_tensors="pt"), by="tokenizer")["input_ids"]

    def decode(self, ids: Any, **options: Any) -> str:
        """Return the text of token ids (length,), with `options` of the tokenizer's decode. Raise Refused if it fails.

        A streamer of Transformers takes a reader for a tokenizer, since this is all that it calls.
        """
        try:
            return _without_panics(lambda: str(self.tokenizer.decode(ids, **options)))
        except Exception as error:
            raise Refused(
                f"The tokenizer of {self.name} has no text for tokens of the model ({one_line(error)}); it is another "
                "model's, so copy the right one."
            ) from error

    def checked(self, read: Callable[[], Any], *, by: str) -> Any:
        """Return the result of `read`, a mapping with `input_ids` (1, length).

        `by` says whether it calls the chat template or the tokenizer. Raise Refused if that raises (a template is code
        of the checkpoint, so any exception may come), gives no ids, ids that the model does not have, or more of them
        than it has positions. A template that does not come to an end is stopped.
        """
        try:
            inputs = _without_panics(lambda: bounded(read) if by == "chat template" else read())
        except ImportError as error:  # Jinja is not among the packages that the engine needs
            raise Refused(f"The {by} of {self.name} needs a package that is missing: {one_line(error)}.") from error
        except Exception as error:
            raise Refused(f"The {by} of {self.name} does not take this ({one_line(error)}); ask otherwise.") from error
        ids = inputs["input_ids"]
        if ids.shape[-1] == 0:
            if by == "tokenizer":
                raise Refused("The prompt is empty; give it some text.")
            raise Refused(f"The {by} of {self.name} makes no text of the prompt; ask without it.")
        vocabulary, positions = self.vocabulary, self.positions
        if vocabulary is not None and int(ids.max()) >= vocabulary:
            raise Refused(
                f"The tokenizer of {self.name} writes token {int(ids.max())}, and the model knows {vocabulary} tokens; "
                "it is another model's, so copy the right one."
            )
        if positions is not None and ids.shape[-1] > positions:
            raise Refused(f"The prompt is {ids.shape[-1]} tokens long and {self.name} takes {positions}; shorten it.")
        return inputs

    @property
    def vocabulary(self) -> int | None:
        """Number of tokens that the model knows, or None if its configuration does not say."""
        return self._size("vocab_size")

    @property
    def positions(self) -> int | None:
        """Tokens of the longest text that the model can read; None if unknown, or if RoPE is dynamic."""
        rope = getattr(self.config.get_text_config(), "rope_parameters", None)
        if isinstance(rope, dict) and rope.get("rope_type") == "dynamic":
            return None
        return self._size("max_position_embeddings")

    def _size(self, name: str) -> int | None:
        """Return a size in the configuration, or None if it has no such size."""
        size = getattr(self.config.get_text_config(), name, None)
        return size if isinstance(size, int) and size > 0 else None


def open_reader(arguments: argparse.Namespace) -> Reader:
    """Return the reader of the model that the command line names. Raise Refused if the tokenizer cannot be loaded."""
    from mobile.checkpoints.examine import config_of, find

    name, trust = arguments.model, arguments.trust_remote_code
    checkpoint = find(name, trust_remote_code=trust)
    config = config_of(checkpoint, trust_remote_code=trust)
    _check_files(checkpoint.folder)
    try:
        tokenizer, words = _without_panics(lambda: _tokenizer(checkpoint.folder, trust))
    except Exception as error:  # each kind of tokenizer has its own exceptions for files that are missing or broken
        raise Refused(f"Cannot load the tokenizer of {name} ({one_line(error)}); copy its files again.") from error
    # Without its files Transformers makes a tokenizer that knows only special tokens.
    if words < 2:
        raise Refused(f"{name} lacks the files of its tokenizer, such as tokenizer.json; copy them into the folder.")
    template = not getattr(arguments, "raw", False) and tokenizer.chat_template is not None
    if getattr(arguments, "chat", False) and not template:
        raise Refused(f"The tokenizer of {name} has no chat template; leave --chat out, or use --raw.")
    return Reader(name, tokenizer, template, config)


def _check_files(folder: Path) -> None:
    """Raise Refused for a file of the tokenizer that is larger than any such file, before it is read whole."""
    for pattern in CONFIGURATION_AND_TOKENIZER:
        for path in sorted(folder.glob(pattern)):
            if path.is_file():
                largest = TEMPLATE_NBYTES if path.suffix == ".jinja" else LARGEST_NBYTES
                check_size(path, "copy it again", largest)


def _tokenizer(folder: Path, trust_remote_code: bool) -> tuple[Any, int]:
    """Return the tokenizer, and how many tokens it knows besides the special ones. Raise any exception."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    template = tokenizer.chat_template
    if template is not None and len(str(template)) > TEMPLATE_NBYTES:
        raise ValueError(f"its chat template has {len(str(template)):,} characters")
    return tokenizer, len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))


def _without_panics(call: Callable[[], T]) -> T:
    """Return `call()`, with a panic of a tokenizer's Rust, which is no Exception in Python, raised as ValueError."""
    try:
        return call()
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(one_line(error)) from error

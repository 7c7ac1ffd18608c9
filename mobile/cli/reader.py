"""From text to token ids, by the model's own tokenizer and chat template, whose faults are refused in one sentence."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mobile.errors import Refused, said


@dataclass(frozen=True)
class Reader:
    """A tokenizer, whether prompts go through its chat template, and the configuration of the model it is to be for."""

    name: str
    tokenizer: Any
    template: bool
    config: Any

    def encode(self, messages: Sequence[dict[str, str]]) -> Any:
        """Return the ids (1, length) of a conversation: by the chat template, or as plain text.

        There a turn ends with a new line. Raise Refused as `checked` does.
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

    def checked(self, read: Callable[[], Any], *, by: str) -> Any:
        """Return what `read` does, a mapping with `input_ids` (1, length).

        Raise Refused if the chat template or the tokenizer raises (a template is code of the checkpoint's, so anything
        may come), gives nothing, gives ids that the model does not have, or more of them than it has positions for.
        """
        try:
            inputs = read()
        except ImportError as error:  # Jinja is not among the packages that the engine needs
            raise Refused(f"The {by} of {self.name} needs a package that is missing: {said(error)}.") from error
        except Exception as error:
            raise Refused(f"The {by} of {self.name} does not take this ({said(error)}); ask otherwise.") from error
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
        """Return the number of tokens that the model knows; None if unknown."""
        return self._has("vocab_size")

    @property
    def positions(self) -> int | None:
        """Return the most tokens that the model can read; None if unknown, or growing with the text (dynamic RoPE)."""
        rope = getattr(self.config.get_text_config(), "rope_parameters", None)
        if isinstance(rope, dict) and rope.get("rope_type") == "dynamic":
            return None
        return self._has("max_position_embeddings")

    def _has(self, name: str) -> int | None:
        """Return a positive number of the text configuration; None if it has none of that name."""
        found = getattr(self.config.get_text_config(), name, None)
        return found if isinstance(found, int) and found > 0 else None


def open_reader(arguments: argparse.Namespace) -> Reader:
    """Return the reader of the model that the command line names. Raise Refused if the tokenizer cannot be loaded."""
    from transformers import AutoTokenizer

    from mobile.checkpoints.examine import config_of, find

    name, trust = arguments.model, arguments.trust_remote_code
    found = find(name, trust_remote_code=trust)
    config = config_of(found, trust_remote_code=trust)
    try:
        tokenizer = AutoTokenizer.from_pretrained(found.folder, trust_remote_code=trust)
    except Exception as error:  # each kind of tokenizer has its own exceptions for files that are missing or broken
        raise Refused(f"Cannot load the tokenizer of {name} ({said(error)}); copy its files again.") from error
    if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < 2:  # Transformers makes one of nothing
        raise Refused(f"{name} lacks the files of its tokenizer, such as tokenizer.json; copy them into the folder.")
    template = not getattr(arguments, "raw", False) and tokenizer.chat_template is not None
    if getattr(arguments, "chat", False) and not template:
        raise Refused(f"The tokenizer of {name} has no chat template; leave --chat out, or use --raw.")
    return Reader(name, tokenizer, template, config)

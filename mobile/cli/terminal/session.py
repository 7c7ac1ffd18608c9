"""A command's session with a model: the attached model, its tokenizer, its sampling, and the line of statistics."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from typing import Any

from mobile.cli.terminal import options, show
from mobile.cli.terminal.reader import Reader, open_reader
from mobile.errors import Refused, one_line
from mobile.links.registry import LINKS
from mobile.policies.strategy import BigLittle
from mobile.visible import visible

MIN_TEMPERATURE = 1e-4  # a lower one divides logits beyond the range of a float, or rounds as 0 does
WIDE = 1024  # features of a token from which on several threads are faster than one
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # with which a user chooses their number


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return generate()'s options for the command line's sampling. Raise Refused for numbers that are out of range."""
    temperature, top_p = arguments.temperature, arguments.top_p
    if arguments.max_new_tokens < 1:
        raise Refused(f"--max-new-tokens must be at least 1, and {arguments.max_new_tokens} is not.")
    if temperature is not None and not (temperature == 0 or MIN_TEMPERATURE <= temperature < float("inf")):
        raise Refused(f"--temperature is 0 (greedy) or more, {MIN_TEMPERATURE} at least, and {temperature} is not.")
    if top_p is not None and not 0 < top_p <= 1:
        raise Refused(f"--top-p is a probability above 0, and {top_p} is not.")
    options: dict[str, Any] = {
        "max_new_tokens": arguments.max_new_tokens,
        "top_k": None,
        "return_dict_in_generate": False,  # whatever the checkpoint's generation_config.json says
    }
    if temperature == 0 or (temperature is None and top_p is None):
        return {**options, "do_sample": False, "temperature": None, "top_p": None}
    return {
        **options,
        "do_sample": True,
        "temperature": 1.0 if temperature is None else temperature,
        "top_p": 1.0 if top_p is None else top_p,
        "top_k": 0,
    }


@dataclass(frozen=True)
class Session:
    """An attached model, its reader, and the options of its generate()."""

    model: Any
    reader: Reader
    options: dict[str, Any]

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.reader.tokenizer

    @property
    def decoder(self) -> Any:
        """The reader, which a streamer of Transformers takes for a tokenizer, and whose errors are refusals."""
        return self.reader

    @property
    def template(self) -> bool:
        """Whether prompts go through the chat template."""
        return self.reader.template

    def encode(self, messages: list[dict[str, str]]) -> Any:
        """Return the token ids (1, length) of a conversation, on the model's device. Raise Refused as `Reader` does."""
        return self.reader.encode(messages).to(self.model.device)

    def generate(self, ids: Any, **options: Any) -> Any:
        """Call the model's generate() on ids (1, length) with the command line's options, which `options` override.

        Raise Refused if it fails before the model has run: then the checkpoint's own settings are at fault.
        """
        ids, before = ids.to(self.model.device), self.model.mobile.stats()["prompt_tokens"]
        named = {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape), **self.options, **options}
        if getattr(self.model.generation_config, "stop_strings", None) is not None:
            named["tokenizer"] = self.tokenizer
        try:
            return self.model.generate(**named)
        except Refused:
            raise
        except Exception as error:  # each setting has its own
            if self.model.mobile.stats()["prompt_tokens"] != before:
                raise
            raise Refused(
                f"generate() cannot begin with the settings of {self.reader.name} "
                f"({one_line(error)}); mend its generation_config.json, or its config.json."
            ) from error

    def decode(self, ids: Any) -> str:
        """Return the text of token ids (length,), without special tokens. Raise Refused as `Reader` does."""
        return self.reader.decode(ids, skip_special_tokens=True)


def opening(arguments: argparse.Namespace) -> tuple[Reader, dict[str, Any]]:
    """Return the reader and generate()'s options, before a weight is read. Raise Refused for either of them."""
    sampled = sampling(arguments)
    show.waiting(f"opening {arguments.model} ...")
    return open_reader(arguments), sampled


def start(arguments: argparse.Namespace, reader: Reader, sampled: dict[str, Any]) -> Session:
    """Load the model for the results of `opening`, and seed its sampling. Raise Refused."""
    import torch

    model = load_model(arguments, reader)
    torch.manual_seed(arguments.seed)
    return Session(model, reader, sampled)


def load_model(arguments: argparse.Namespace, reader: Reader) -> Any:
    """Return the attached model, loaded with the command line's options. Raise Refused."""
    import mobile

    if arguments.torch_is_ours:
        _choose_threads(reader.config, reads=arguments.link == "disk" or arguments.store not in (None, "memory"))
    values = vars(arguments)
    given = {name: values[name] for name in options.LOADING if values.get(name) is not None}
    return mobile.load(arguments.model, trust_remote_code=arguments.trust_remote_code, **given)


def _choose_threads(config: Any, *, reads: bool = False) -> None:
    """Run a narrow model on one thread, and leave a core to one that `reads` a disk, unless the user chose a number.

    A narrow one's products end before a second thread has started. On 2 idle cores a decode token of 96 features took
    2.3 ms with one thread and 2.5 with two, of 512 features 8.3 and 7.9. With two other busy processes, which a second
    thread has to wait for in every product, it was 11 and 247 ms, and 20 and 976.
    """
    import torch

    if any(name in os.environ for name in THREADS):
        return
    width = getattr(config.get_text_config(), "hidden_size", None)
    if isinstance(width, int) and width < WIDE:
        torch.set_num_threads(1)
    elif reads:
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))


def shown_on_terminal(streamer: type) -> Any:
    """Return the streamer's class with the control characters of its text made visible on a terminal.

    A model may write what a terminal would obey. Into a file or a pipe its text goes as it is.
    """

    class Shown(streamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            """Print the text."""
            super().on_finalized_text(visible(text) if sys.stdout.isatty() else text, stream_end)

    return Shown


# --- statistics -------------------------------------------------------------------------------------


def is_virtual(model: Any) -> bool:
    """Return whether the model's time is computed instead of measured."""
    return not LINKS[model.mobile.plan.link].real_time


def line(model: Any, before: dict[str, Any]) -> str:
    """Return a line on the time since the statistics `before`; rates without a denominator are left out."""
    now = model.mobile.stats()
    spent = {name: now[name] - (before.get(name) or 0) for name in now if isinstance(now[name], int | float)}
    unit = "virtual second" if is_virtual(model) else "second"
    parts = [f"{spent['prompt_tokens']} prompt + {spent['tokens']} decoded tokens"]
    if spent["decode_seconds"] > 0:
        parts.append(f"{spent['tokens'] / spent['decode_seconds']:.1f} tokens per {unit}")
    touched = spent["hits"] + spent["demand_loads"] + spent["late_prefetches"] + spent["cpu_experts"]
    if touched:
        parts.append(f"{spent['hits'] / touched:.1%} hits")
    if isinstance(model.mobile.strategy.gating, BigLittle) and spent["tokens"]:
        parts.append(f"{spent['fallbacks'] / spent['tokens']:.1%} fallbacks")
    parts.append(f"{spent['bytes_loaded'] / show.GB:.3f} GB moved")
    if spent["decode_seconds"] > 0:
        parts.append(f"{spent['decode_stall_seconds'] / spent['decode_seconds']:.1%} of decode stalled")
    parts.append(f"prefill {spent['prefill_seconds']:.3f} {unit}s")
    return f"[{model.mobile.strategy.name}] " + ", ".join(parts)

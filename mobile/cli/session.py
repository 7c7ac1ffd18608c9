"""What the commands that run a model share: the attached model with its tokenizer, and the line of statistics."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

from mobile.cli import options, show
from mobile.refusal import Refused
from mobile.strategy import BigLittle


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """generate()'s options for what was asked. Raises Refused for numbers that mean nothing."""
    temperature, top_p = arguments.temperature, arguments.top_p
    if arguments.max_new_tokens < 1:
        raise Refused(f"--max-new-tokens must be at least 1, and {arguments.max_new_tokens} is not.")
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise Refused(f"--temperature is 0 (greedy) or more, and {temperature} is not.")
    if top_p is not None and not 0 < top_p <= 1:
        raise Refused(f"--top-p is a probability above 0, and {top_p} is not.")
    options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "top_k": None}
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
    """An attached model and its tokenizer; `template` says whether prompts go through the chat template."""

    model: Any
    tokenizer: Any
    template: bool
    options: dict[str, Any]

    def encode(self, messages: list[dict[str, str]]) -> Any:
        """Token ids (1, length) of a conversation: by the chat template, or as plain text, a turn's end a new line."""
        if self.template:
            inputs = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            ends = {"user": "", "assistant": "\n"}
            text = "".join(message["content"] + ends[message["role"]] for message in messages)
            inputs = self.tokenizer(text, return_tensors="pt")
        ids = inputs["input_ids"]
        if ids.shape[1] == 0:
            raise Refused("The prompt is empty; give it some text.")
        return ids.to(self.model.device)

    def generate(self, ids: Any, **more: Any) -> Any:
        """The model's generate() with the options of the command line; `more` goes before them."""
        return self.model.generate(input_ids=ids, attention_mask=ids.new_ones(ids.shape), **{**self.options, **more})

    def decode(self, ids: Any) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text


def start(arguments: argparse.Namespace) -> Session:
    """What the command line asks for. Raises Refused for whatever of it cannot work, the cheap checks first."""
    import torch

    sampled = sampling(arguments)
    tokenizer = load_tokenizer(arguments)
    template = not arguments.raw and tokenizer.chat_template is not None
    if arguments.chat and not template:
        raise Refused(f"The tokenizer of {arguments.model} has no chat template; leave --chat out, or use --raw.")
    model = load_model(arguments)
    torch.manual_seed(arguments.seed)
    return Session(model, tokenizer, template, sampled)


def load_tokenizer(arguments: argparse.Namespace) -> Any:
    from transformers import AutoTokenizer

    from mobile.checkpoint import find

    trust: bool = arguments.trust_remote_code
    folder = find(arguments.model, trust_remote_code=trust).folder
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    except (OSError, ValueError, KeyError) as error:
        raise Refused(f"Cannot load a tokenizer from {arguments.model}: {str(error).splitlines()[0]}") from error


def load_model(arguments: argparse.Namespace) -> Any:
    import mobile

    asked = vars(arguments)
    given = {name: asked[name] for name in options.LOADING if asked.get(name) is not None}
    return mobile.load(arguments.model, trust_remote_code=arguments.trust_remote_code, **given)


def prompt_text(given: str | None) -> str:
    """The prompt of the command line, or all of stdin for `-` or nothing, without its last line break."""
    if given is not None and given != "-":
        return given
    if given is None and sys.stdin.isatty():
        raise Refused("Give a prompt, or - to read it from standard input.")
    return sys.stdin.read().removesuffix("\n").removesuffix("\r")


# --- statistics -------------------------------------------------------------------------------------


def is_virtual(model: Any) -> bool:
    """Whether the model's time is computed."""
    from mobile.link import VirtualLink

    return isinstance(model.mobile.link, VirtualLink)


def line(model: Any, before: dict[str, Any]) -> str:
    """What happened since the statistics `before`, for a reader; rates without a denominator are left out."""
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

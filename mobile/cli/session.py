"""What generate, chat and trace share: their options, an attached model with its tokenizer, the line of statistics."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

from mobile.cli import show
from mobile.refusal import Refused
from mobile.strategy import BigLittle

LOADING = (
    "strategy", "memory", "slots", "gamma", "hardware", "link", "link_gb_per_s", "geometry", "kernel", "device",
    "dtype",
)  # fmt: skip


def declare(parser: argparse.ArgumentParser, *, geometry: bool = True) -> None:
    """The options of a command that runs a model."""
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder or a hub id")
    engine = parser.add_argument_group("engine (what is not given is mobile.load's default)")
    engine.add_argument("--strategy", help="such as mobile, lru, on-demand, resident; `mobile plan` lists them")
    engine.add_argument("--memory", help="device memory to use, like 8GiB")
    engine.add_argument("--slots", type=int, help="expert slots, instead of --memory")
    engine.add_argument("--gamma", type=float, help="confidence below which a token runs all experts")
    engine.add_argument("--hardware", help="the profile that virtual time is computed with")
    engine.add_argument("--link", help="cuda (real time), virtual (computed), paced (a test of threads) or auto")
    engine.add_argument("--link-gb-per-s", type=float, metavar="RATE", help="slow the link down to this")
    if geometry:
        engine.add_argument("--geometry", help="charge time and bytes as if the model were this real one")
    engine.add_argument("--kernel", help="what computes experts: auto, loop, grouped or triton")
    engine.add_argument("--device", help="where to run, such as cpu or cuda")
    engine.add_argument("--dtype", choices=show.DTYPES, help="of the weights (default: the checkpoint's)")
    engine.add_argument("--trust-remote-code", action="store_true", help="run the model's own Python code")
    text = parser.add_argument_group("text")
    text.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="(default: %(default)s)")
    text.add_argument("--temperature", type=float, help="sample at this temperature (default: greedy)")
    text.add_argument("--top-p", type=float, help="sample from the smallest set of tokens with this probability")
    text.add_argument("--seed", type=int, default=0, help="of sampling (default: %(default)s)")


def declare_template(parser: argparse.ArgumentParser) -> None:
    """Whether a prompt is put into the tokenizer's chat template."""
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--chat", action="store_true", help="use the chat template, and refuse where there is none")
    choice.add_argument("--raw", action="store_true", help="give the prompt to the model as it is")


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

    def decode(self, ids: Any) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text


def start(arguments: argparse.Namespace) -> Session:
    """Load tokenizer and model. Raises Refused for whatever of them cannot work, the cheap checks first."""
    options = sampling(arguments)
    import torch
    from transformers import AutoTokenizer

    import mobile
    from mobile.checkpoint import find

    trust: bool = arguments.trust_remote_code
    folder = find(arguments.model, trust_remote_code=trust).folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    except (OSError, ValueError, KeyError) as error:
        raise Refused(f"Cannot load a tokenizer from {arguments.model}: {str(error).splitlines()[0]}") from error
    template = not getattr(arguments, "raw", False) and tokenizer.chat_template is not None
    if getattr(arguments, "chat", False) and not template:
        raise Refused(f"The tokenizer of {arguments.model} has no chat template; leave --chat out, or use --raw.")
    given: dict[str, Any] = {name: value for name in LOADING if (value := getattr(arguments, name, None)) is not None}
    model = mobile.load(arguments.model, trust_remote_code=trust, **given)
    torch.manual_seed(arguments.seed)
    return Session(model, tokenizer, template, options)


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
    touched = spent["hits"] + spent["demand_loads"] + spent["late_prefetches"]
    if touched:
        parts.append(f"{spent['hits'] / touched:.1%} hits")
    if isinstance(model.mobile.strategy.gating, BigLittle) and spent["tokens"]:
        parts.append(f"{spent['fallbacks'] / spent['tokens']:.1%} fallbacks")
    parts.append(f"{spent['bytes_loaded'] / show.GB:.3f} GB moved")
    if spent["decode_seconds"] > 0:
        parts.append(f"{spent['decode_stall_seconds'] / spent['decode_seconds']:.1%} of decode stalled")
    parts.append(f"prefill {spent['prefill_seconds']:.3f} {unit}s")
    return f"[{model.mobile.strategy.name}] " + ", ".join(parts)

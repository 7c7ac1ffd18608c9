"""Bodies of requests to the server: the fields of each route, checked before Transformers' handlers get them.

A client's mistake is refused in one sentence. A field belongs to one of three kinds: supported, with its limits;
ignored, because no answer depends on it and clients send it; or unsupported, refused unless its value asks for nothing.
Any other field is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from inspect import signature
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, ValidationInfo
from transformers import PreTrainedTokenizerBase

from mobile.cli.serving.conversation import MOST_MESSAGES, Message, Tools, items
from mobile.cli.serving.fields import (
    Checked,
    Count,
    Fraction,
    Stop,
    Temperature,
    Text,
    invalid,
    object_or_text,
    sentence,
)
from mobile.errors import Refused

MOST_BIASES = 1024
MOST_VARIABLES = 64
MOST_NEW_TOKENS = 2**20  # for a model whose configuration does not say how many positions it has
# Keywords that the handlers themselves pass to the chat template.
RESERVED = {*signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "load_audio_from_video"} - {"documents"}
# No answer depends on them: who asks, what is kept or cached, who is billed, how a stream is wrapped.
IGNORED = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "stream_options",
}
# Names of the same limit in a body and in its generation_config.
TWICE = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_output_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
}


def _not_empty(text: str) -> str:
    """Check that it is not empty."""
    if not text:
        raise invalid("is empty; give it some text")
    return text


def _token_ids(bias: dict[str, float]) -> dict[str, float]:
    """Check that the keys are token ids, and the values from -100 to 100."""
    if len(bias) > MOST_BIASES:
        raise invalid(f"must have at most {MOST_BIASES} tokens")
    named = (token.isascii() and token.isdigit() and len(token) <= 10 for token in bias)
    if not all(named) or not all(abs(by) <= 100 for by in bias.values()):
        raise invalid("must name tokens by their ids, which are whole numbers, and add from -100 to 100 to each")
    return bias


def _template_variables(variables: dict[str, Any]) -> dict[str, Any]:
    """Check that there are not too many, and that none of them is a keyword of `apply_chat_template` itself."""
    if len(variables) > MOST_VARIABLES:
        raise invalid(f"must name at most {MOST_VARIABLES} variables")
    if reserved := sorted(set(variables) & RESERVED):
        raise invalid(f"must name variables of the template, and {reserved[0]} is none")
    return variables


def _in_vocabulary(number: int, info: ValidationInfo) -> int:
    """Check that there are as many tokens."""
    vocabulary = (info.context or {}).get("vocabulary")
    if vocabulary is not None and number > vocabulary:
        raise invalid(f"must be at most {vocabulary}, the number of tokens that the model knows")
    return number


def _in_positions(number: int, info: ValidationInfo) -> int:
    """Check that a text can be as long."""
    positions = (info.context or {}).get("positions") or MOST_NEW_TOKENS
    if number > positions:
        raise invalid(f"must be at most {positions}, the longest text of the model in tokens")
    return number


Length = Annotated[int, Field(ge=0), AfterValidator(_in_positions)]


class _Sampled(Checked):
    """The fields of sampling that all bodies share."""

    temperature: Temperature | None = None
    top_p: Fraction | None = None


class Generation(_Sampled):
    """The fields of GenerationConfig that a request may set: none that changes the model or the cache."""

    do_sample: bool | None = None
    top_k: Annotated[int, Field(ge=0), AfterValidator(_in_vocabulary)] | None = None
    min_p: Fraction | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    no_repeat_ngram_size: Length | None = None
    max_new_tokens: Count | None = None
    min_new_tokens: Length | None = None


def _generation_config(text: str, info: ValidationInfo) -> str:
    """Check that it is the JSON of a `Generation`."""
    object_or_text(text)
    try:
        given = Generation.model_validate(json.loads(text), context=info.context)
    except ValidationError as error:
        raise invalid(f"cannot be used: {sentence(error)}") from error
    if given.max_new_tokens is not None and (given.min_new_tokens or 0) > given.max_new_tokens:
        raise invalid("cannot be used: min_new_tokens is more than max_new_tokens")
    return text


class _Request(_Sampled):
    """The fields that all routes take."""

    IGNORED: ClassVar[set[str]] = IGNORED
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}  # with the values that ask for nothing

    model: Text | None = None
    stream: bool | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    generation_config: Annotated[str, AfterValidator(_generation_config)] | None = None


class _Completing(_Request):
    """The fields that both kinds of completions take."""

    max_tokens: Count | None = None
    frequency_penalty: Annotated[float, Field(gt=-1, le=2)] | None = None
    stop: Stop | None = None


class Completion(_Completing):
    """The body of /v1/completions."""

    UNSUPPORTED: ClassVar = {
        "n": (1,),
        "best_of": (1,),
        "echo": (False,),
        "logprobs": (),
        "presence_penalty": (0,),
        "logit_bias": ({},),
    }

    prompt: Annotated[Text, AfterValidator(_not_empty)]
    suffix: Text | None = None


class Chat(_Completing):
    """The body of /v1/chat/completions."""

    IGNORED: ClassVar = {*IGNORED, "prediction"}
    UNSUPPORTED: ClassVar = {
        "n": (1,),
        "presence_penalty": (0,),
        "logprobs": (False,),
        "top_logprobs": (0,),
        "response_format": ({"type": "text"},),
        "tool_choice": ("auto",),
        "parallel_tool_calls": (True,),
        "functions": ([],),
        "function_call": ("auto",),
        "modalities": (["text"],),
        "verbosity": ("medium",),
        "reasoning_effort": (),
        "audio": (),
        "moderation": (),
        "web_search_options": (),
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Count | None = None
    tools: Tools | None = None
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_template_variables)] | None = None
    logit_bias: Annotated[dict[str, float], AfterValidator(_token_ids)] | None = None


class Response(_Request):
    """The body of /v1/responses."""

    UNSUPPORTED: ClassVar = {
        "background": (False,),
        "include": ([],),
        "reasoning": ({},),
        "text": ({}, {"format": {"type": "text"}}),
        "tool_choice": ("auto",),
        "top_logprobs": (0,),
        "truncation": ("disabled", "auto"),  # a conversation that is too long is refused
        "context_management": ([],),
        "previous_response_id": (),
        "conversation": (),
        "prompt": (),
        "max_tool_calls": (),
        "moderation": (),
    }

    input: Annotated[Any, BeforeValidator(items)]
    instructions: Text | None = None
    max_output_tokens: Count | None = None
    tools: Tools | None = None
    parallel_tool_calls: bool | None = None


def checked(
    kind: type[_Request], body: dict[str, Any], vocabulary: int | None, positions: int | None = None
) -> dict[str, Any]:
    """Return the body for the handler, with the supported fields that are set and nothing else.

    `vocabulary` is the number of tokens that the model knows, `positions` its longest text in tokens. Empty lists and
    mappings are left out, which generate() does not accept. Raise Refused for the first mistake.
    """
    asked = {name: value for name, value in body.items() if name not in kind.IGNORED}
    for name, idle in kind.UNSUPPORTED.items():
        value = asked.pop(name, None)
        if value is not None and value not in idle:
            instead = f"give {json.dumps(idle[0])} or leave it out" if idle else "leave it out"
            raise Refused(f"This request cannot be answered: {name}: this is not supported; {instead}.")
    try:
        kind.model_validate(asked, context={"vocabulary": vocabulary, "positions": positions})
    except ValidationError as error:
        raise Refused(f"This request cannot be answered: {sentence(error)}.") from error
    kept = {name: value for name, value in asked.items() if value is not None or name == "stream"}
    if vocabulary is not None and any(int(token) >= vocabulary for token in kept.get("logit_bias", ())):
        raise Refused(f"This request cannot be answered: logit_bias names none of {vocabulary} tokens.")
    _once(kept)
    for name in ("stop", "logit_bias", "chat_template_kwargs"):
        if name in kept and not kept[name]:
            del kept[name]
    if "logit_bias" in kept:  # generate() accepts no whole numbers there
        kept["logit_bias"] = {token: float(by) for token, by in kept["logit_bias"].items()}
    if "max_completion_tokens" in kept:  # the handler knows the older name alone
        kept["max_tokens"] = kept.pop("max_completion_tokens")
    return kept


def _once(body: dict[str, Any]) -> None:
    """Refuse a limit that is given twice with different values, or one that contradicts another."""
    config = json.loads(body.get("generation_config", "{}"))
    given = {name: value for name, value in config.items() if value is not None}
    for name, inner in TWICE.items():
        if name in body:
            if given.setdefault(inner, body[name]) != body[name]:
                raise Refused(f"This request cannot be answered: {name} is given twice; leave one of the two out.")
            if inner == "max_new_tokens" and given.get("min_new_tokens", 0) > body[name]:
                raise Refused(f"This request cannot be answered: min_new_tokens is more than {name}.")
    if "frequency_penalty" in body and "repetition_penalty" in given:
        raise Refused(
            "This request cannot be answered: frequency_penalty and repetition_penalty are one; leave one of them out."
        )

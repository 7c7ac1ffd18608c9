"""Bodies of requests to the server, checked before Transformers' handlers get them.

A client's mistake is refused in one sentence. Fields that the handlers do not know are left to them: they ignore or
refuse them.
"""

from __future__ import annotations

import json
from inspect import signature
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from transformers import PreTrainedTokenizerBase

from mobile.cli.terminal.session import MIN_TEMPERATURE
from mobile.errors import Refused, one_line

# Types of a message's parts: a tokenizer alone reads no pictures and no sound.
PARTS = ("text", "input_text", "output_text")
# Keywords that the handlers themselves pass to the chat template.
RESERVED = {*signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "load_audio_from_video"} - {"documents"}


def _invalid(message: str) -> PydanticCustomError:
    """Return the error of a field, to be raised; `message` goes on after the field's name."""
    return PydanticCustomError("mobile", "{message}", {"message": message})


def _temperature(temperature: float) -> float:
    """Check that generate() can divide by the temperature, or that it is 0."""
    if 0 < temperature < MIN_TEMPERATURE:
        raise _invalid(f"must be 0 or at least {MIN_TEMPERATURE}")
    return temperature


def _readable(text: Any) -> bool:
    """Return whether it is a text without halves of surrogate pairs, which JSON can hold and no tokenizer reads."""
    return isinstance(text, str) and not any("\ud800" <= character <= "\udfff" for character in text)


def _text(content: Any) -> Any:
    """Check that it is a text, or a list of parts that are texts."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") not in PARTS or not _readable(part.get("text")):
            raise _invalid('must be a text, or a list of {"type": "text", "text": ...}')
    return content


def _stop(stop: Any) -> Any:
    """Check that it is a text, or a list of texts, none of them empty."""
    words = stop if isinstance(stop, list) else [stop]
    if not all(word and _readable(word) for word in words):
        raise _invalid("must be a text that is not empty, or a list of such texts")
    return stop


def _object(text: str | dict[str, Any]) -> str | dict[str, Any]:
    """Check that it is the JSON of an object, or an object."""
    try:
        content = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError) as error:
        raise _invalid(f"must be the JSON of an object ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise _invalid("must be the JSON of an object")
    return text


def _token_ids(bias: dict[str, float]) -> dict[str, float]:
    """Check that the keys are token ids, and the values from -100 to 100."""
    if not all(token.isascii() and token.isdigit() and abs(by) <= 100 for token, by in bias.items()):
        raise _invalid("must name tokens by their ids, which are whole numbers, and add from -100 to 100 to each")
    return bias


def _template_variables(variables: dict[str, Any]) -> dict[str, Any]:
    """Check that none of them is a keyword of `apply_chat_template` itself."""
    if reserved := sorted(set(variables) & RESERVED):
        raise _invalid(f"must name variables of the template, and {reserved[0]} is none")
    return variables


def _valid_text(text: str) -> str:
    """Check that it is without halves of surrogate pairs."""
    if not _readable(text):
        raise _invalid("must be a text, and half of a surrogate pair is none")
    return text


def _not_empty(text: str) -> str:
    """Check that it is not empty."""
    if not text:
        raise _invalid("is empty; give it some text")
    return text


Text = Annotated[str, AfterValidator(_valid_text)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Content = Annotated[Any, BeforeValidator(_text)]


class _Checked(BaseModel):
    """A part of a body. No value is converted, so that the handlers get exactly the values that were checked."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class Function(_Checked):
    """The function of a tool call, and its arguments."""

    name: Text
    arguments: Annotated[str | dict[str, Any], AfterValidator(_object)]


class ToolCall(_Checked):
    """A tool call in an assistant's message."""

    function: Function


class Message(_Checked):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1)] | None = None
    tool_call_id: Text | None = None

    @model_validator(mode="after")
    def _check_content(self) -> Message:
        if self.content is None and self.tool_calls is None:
            raise _invalid("lacks its content")
        if "tool_calls" in self.model_fields_set and self.tool_calls is None:
            raise _invalid("has tool_calls that are none; leave them out")
        return self


class _Sampled(_Checked):
    """The fields of sampling that all bodies share."""

    temperature: Annotated[float, Field(ge=0), AfterValidator(_temperature)] | None = None
    top_p: Fraction | None = None


class Generation(_Sampled):
    """The fields of GenerationConfig that a request may set: none that changes the model or the cache."""

    model_config = ConfigDict(extra="forbid")

    do_sample: bool | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Fraction | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] | None = None
    max_new_tokens: Count | None = None
    min_new_tokens: Annotated[int, Field(ge=0)] | None = None


def _generation_config(text: str) -> str:
    """Check that it is the JSON of a `Generation`."""
    _object(text)
    try:
        Generation.model_validate(json.loads(text))
    except ValidationError as error:
        raise _invalid(f"cannot be used: {_sentence(error)}") from error
    return text


class _Request(_Sampled):
    """The fields that all routes take."""

    model: Text | None = None
    stream: bool | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    generation_config: Annotated[str, AfterValidator(_generation_config)] | None = None


class _Completing(_Request):
    """The fields that both kinds of completions take."""

    max_tokens: Count | None = None
    frequency_penalty: Annotated[float, Field(gt=-1, le=2)] | None = None
    stop: Annotated[Any, BeforeValidator(_stop)] | None = None


class Completion(_Completing):
    """The body of /v1/completions."""

    prompt: Annotated[Text, AfterValidator(_not_empty)]
    suffix: Text | None = None


class Chat(_Completing):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_template_variables)] | None = None
    logit_bias: Annotated[dict[str, float], AfterValidator(_token_ids)] | None = None


def _input(items: Any) -> Any:
    """Check that it is a text, parts of one, or the items of a conversation, as ResponseHandler tells them apart."""
    if isinstance(items, str) and items:
        return items
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise _invalid("must be a text, or a list of messages, and not empty")
    if "role" not in items[0]:
        return _text(items)
    for item in items:
        kind = "message" if "role" in item else item.get("type")
        if kind not in ITEMS:
            raise _invalid(f"must be a list of messages and of items of the types {', '.join(ITEMS)}")
        try:
            ITEMS[kind].model_validate(item)
        except ValidationError as error:
            raise _invalid(f"has an item of type {kind} that is wrong: {_sentence(error)}") from error
    return items


class Call(_Checked):
    """A tool call among the items of a conversation."""

    call_id: Text
    name: Text
    arguments: Annotated[str | dict[str, Any], AfterValidator(_object)]


class CallOutput(_Checked):
    """The answer of a tool."""

    call_id: Text
    output: Content


class Thought(_Checked):
    """The reasoning of a model before its answer."""

    content: list[dict[Literal["type", "text"], str]] | None = None


ITEMS: dict[str, type[_Checked]] = {
    "message": Message,
    "function_call": Call,
    "function_call_output": CallOutput,
    "reasoning": Thought,
}


class Response(_Request):
    """The body of /v1/responses."""

    input: Annotated[Any, BeforeValidator(_input)]
    instructions: Text | None = None
    max_output_tokens: Count | None = None
    tools: list[dict[str, Any]] | None = None
    parallel_tool_calls: bool | None = None


def checked(kind: type[_Request], body: dict[str, Any], vocabulary: int | None) -> dict[str, Any]:
    """Return the body for the handler, without empty lists and mappings, which generate() does not accept.

    `vocabulary` is the number of tokens that the model knows. Raise Refused for the first mistake.
    """
    try:
        kind.model_validate(body)
    except ValidationError as error:
        raise Refused(f"This request cannot be answered: {_sentence(error)}.") from error
    if vocabulary is not None and any(int(token) >= vocabulary for token in body.get("logit_bias") or ()):
        raise Refused(f"This request cannot be answered: logit_bias names none of {vocabulary} tokens.")
    empty = {name for name in ("stop", "logit_bias", "chat_template_kwargs") if name in body and not body[name]}
    kept = {name: value for name, value in body.items() if name not in empty}
    if "logit_bias" in kept:  # generate() accepts no whole numbers there
        kept["logit_bias"] = {token: float(by) for token, by in kept["logit_bias"].items()}
    return kept


def _sentence(error: ValidationError) -> str:
    """Return the first mistake and its place. The client's own words are not repeated: they may be no text."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    sentence = f"{where}: {first['msg'][:1].lower()}{first['msg'][1:]}" if where else first["msg"]
    return sentence.encode(errors="backslashreplace").decode()

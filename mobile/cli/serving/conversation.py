"""Conversations in the bodies of requests: messages, tool calls and what tools answered."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from mobile.cli.serving.fields import Arguments, Checked, Content, Text, invalid, sentence, text_or_parts

MOST_MESSAGES = 4096
MOST_TOOLS = 128

Tools = Annotated[list[dict[str, Any]], Field(max_length=MOST_TOOLS)]


class Function(Checked):
    """The function of a tool call, and its arguments."""

    name: Text
    arguments: Arguments
    parsed_arguments: Any = None  # OpenAI's client adds it to an answer that it has parsed


class ToolCall(Checked):
    """A tool call in an assistant's message."""

    function: Function
    id: Text | None = None
    type: Literal["function"] | None = None
    index: int | None = None


class _Turn(Checked):
    """One turn of a conversation. The fields below its content come back with an answer, and no template sees them."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None
    name: Text | None = None
    refusal: Any = None
    annotations: Any = None
    reasoning: Any = None
    reasoning_content: Any = None
    parsed: Any = None


class Message(_Turn):
    """One turn of a chat."""

    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=MOST_TOOLS)] | None = None
    tool_call_id: Text | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _check_content(self) -> Message:
        if self.content is None and self.tool_calls is None:
            raise invalid("lacks its content")
        if "tool_calls" in self.model_fields_set and self.tool_calls is None:
            raise invalid("has tool_calls that are none; leave them out")
        return self


class _Item(Checked):
    """The fields of items that come back with an answer, and that no template sees."""

    id: Any = None
    status: Any = None


class Said(_Turn, _Item):
    """A message among the items of a conversation."""

    type: Literal["message"] | None = None
    phase: Any = None

    @model_validator(mode="after")
    def _check_content(self) -> Said:
        if self.content is None:
            raise invalid("lacks its content")
        return self


class Call(_Item):
    """A tool call among the items of a conversation."""

    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: Arguments


class CallOutput(_Item):
    """The answer of a tool."""

    type: Literal["function_call_output"]
    call_id: Text
    output: Content


class ThoughtPart(Checked):
    """A part of a model's reasoning."""

    type: Text | None = None
    text: Text


class Thought(_Item):
    """The reasoning of a model before its answer."""

    type: Literal["reasoning"]
    content: list[ThoughtPart] | None = None
    summary: Any = None
    encrypted_content: Any = None


ITEMS: dict[str, type[Checked]] = {
    "message": Said,
    "function_call": Call,
    "function_call_output": CallOutput,
    "reasoning": Thought,
}


def items(given: Any) -> Any:
    """Check that it is a text, parts of one, or the items of a conversation, as ResponseHandler tells them apart."""
    if isinstance(given, str) and given:
        return text_or_parts(given)
    if not isinstance(given, list) or not given or not all(isinstance(item, dict) for item in given):
        raise invalid("must be a text, or a list of messages, and not empty")
    if len(given) > MOST_MESSAGES:
        raise invalid(f"must have at most {MOST_MESSAGES} messages")
    if "role" not in given[0]:
        return text_or_parts(given)
    for item in given:
        kind = "message" if "role" in item else item.get("type")
        if not isinstance(kind, str) or kind not in ITEMS:
            raise invalid(f"must be a list of messages and of items of the types {', '.join(ITEMS)}")
        try:
            ITEMS[kind].model_validate(item)
        except ValidationError as error:
            raise invalid(f"has an item of type {kind} that is wrong: {sentence(error)}") from error
    return given

"""Types of fields in the bodies of requests, each with its limit, and the sentence for the first that is wrong."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from mobile.cli.terminal.session import MIN_TEMPERATURE
from mobile.errors import one_line
from mobile.inputs import shallow_json

# Types of a message's parts: a tokenizer alone reads no pictures and no sound.
PARTS = ("text", "input_text", "output_text")
# What clients send back with a part of an answer, or for a cache that is not here.
PART_FIELDS = {"type", "text", "annotations", "logprobs", "cache_control", "prompt_cache_breakpoint"}
MOST_PARTS = 4096
# generate() looks each of their characters up in the whole vocabulary before the first token.
MOST_STOPS = 16
MOST_STOP_CHARACTERS = 256
LONGEST_NAME = 60  # characters of a field's name that a sentence repeats


class Checked(BaseModel):
    """A part of a body. No value is converted, so that the handlers get exactly the values that were checked."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def invalid(message: str) -> PydanticCustomError:
    """Return the error of a field, to be raised; `message` goes on after the field's name."""
    return PydanticCustomError("mobile", "{message}", {"message": message})


def sentence(error: ValidationError) -> str:
    """Return the first mistake and its place, in one line; other than names of fields, no word is the client's."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(" ".join(str(part).split())[:LONGEST_NAME] for part in first["loc"])
    said = f"{where}: {first['msg'][:1].lower()}{first['msg'][1:]}" if where else first["msg"]
    return said.encode(errors="backslashreplace").decode()


def _readable(text: Any) -> bool:
    """Return whether it is a text without halves of surrogate pairs, which JSON can hold and no tokenizer reads."""
    return isinstance(text, str) and not any("\ud800" <= character <= "\udfff" for character in text)


def _valid_text(text: str) -> str:
    """Check that it is without halves of surrogate pairs."""
    if not _readable(text):
        raise invalid("must be a text, and half of a surrogate pair is none")
    return text


def text_or_parts(content: Any) -> Any:
    """Check that it is a text, or a list of parts that are texts."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    if len(parts) > MOST_PARTS:
        raise invalid(f"must have at most {MOST_PARTS} parts")
    for part in parts:
        if not isinstance(part, dict) or part.get("type") not in PARTS or not _readable(part.get("text")):
            raise invalid('must be a text, or a list of {"type": "text", "text": ...}')
        if not part.keys() <= PART_FIELDS:
            raise invalid(f"has a part with other fields than {', '.join(sorted(PART_FIELDS))}")
    return content


def _stop(stop: Any) -> Any:
    """Check that it is a text, or a list of texts, none of them empty, and not too many or too long."""
    words = stop if isinstance(stop, list) else [stop]
    if not all(word and _readable(word) for word in words):
        raise invalid("must be a text that is not empty, or a list of such texts")
    if len(words) > MOST_STOPS or sum(map(len, words)) > MOST_STOP_CHARACTERS:
        raise invalid(f"must have at most {MOST_STOPS} texts, of {MOST_STOP_CHARACTERS} characters together")
    return stop


def object_or_text(text: str | dict[str, Any]) -> str | dict[str, Any]:
    """Check that it is the JSON of an object, or an object."""
    try:
        content = shallow_json(text) if isinstance(text, str) else text
    except ValueError as error:
        raise invalid(f"must be the JSON of an object ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise invalid("must be the JSON of an object")
    return text


def _temperature(temperature: float) -> float:
    """Check that generate() can divide by the temperature, or that it is 0."""
    if 0 < temperature < MIN_TEMPERATURE:
        raise invalid(f"must be 0 or at least {MIN_TEMPERATURE}")
    return temperature


Text = Annotated[str, AfterValidator(_valid_text)]
Content = Annotated[Any, BeforeValidator(text_or_parts)]
Arguments = Annotated[str | dict[str, Any], AfterValidator(object_or_text)]
Stop = Annotated[Any, BeforeValidator(_stop)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(ge=0), AfterValidator(_temperature)]

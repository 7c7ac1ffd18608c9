"""Calls of generate() under way: which rows of the batch it has ended, and whether it still reads the prompt.

generate() ends rows by its stopping criteria, and feeds what a row that ended is given (padding, or whatever it would
have written) like any other token. So token ids show nothing: an ordinary token may be the padding, and
ends given to this call differ from the model's own. The criteria are watched instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation import GenerationMode

from mobile.live_model.overrides import Overrides
from mobile.transfer import Reading

CRITERIA = "_get_stopping_criteria"  # where every kind of generate() gets them; private, and so checked for
ROW_BY_ROW = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)  # modes in which a row is a sequence, and stays one


@dataclass
class Call:
    """A call of generate(), with the assistant model that it was given.

    `mode` is known once its criteria are made. From then on every forward pass belongs to the prompt (`prompting`),
    until the criteria are asked, which is after the first token; but assisted generation asks them before its first
    pass. After that it writes (`decoding`). `ended` (rows,) bool, None where the mode does not end rows one by one. It
    is brought to the host while generate() itself waits for the answer.
    """

    model: Any
    assistant: Any
    mode: GenerationMode | None = None
    prompting: bool = False
    decoding: bool = False
    ended: torch.Tensor | None = None
    _reading: Reading | None = None

    def live(self, rows: int) -> torch.Tensor | None:
        """Return, in host memory, which rows (rows,) bool are being written; None: all, or it cannot be known."""
        if self._reading is None or self.ended is None or self.ended.shape != (rows,):
            return None
        (ended,) = self._reading.get()
        return ~ended

    def begin(self, settings: GenerationConfig) -> None:
        """Take note that the criteria are made."""
        self.mode = settings.get_generation_mode(self.assistant)
        self.prompting = not settings.is_assistant  # an assistant goes on with a text that was begun elsewhere

    def asked(self, done: torch.Tensor) -> None:
        """Take note of the criteria's answer (rows,) bool: a row that ended stays ended."""
        if self.mode is GenerationMode.ASSISTED_GENERATION:  # asks about tokens that it may yet reject
            return
        self.prompting, self.decoding = False, True
        if self.mode in ROW_BY_ROW:
            self.ended = done if self.ended is None else self.ended | done
            self._reading = Reading([self.ended])

    def read(self) -> None:
        """Take note that a pass over the prompt, or a part of it, is over."""
        if self.mode is GenerationMode.ASSISTED_GENERATION:
            self.prompting, self.decoding = False, True


_under_way: ContextVar[tuple[Call, ...]] = ContextVar("mobile_generate_calls", default=())


def current(model: Any) -> Call | None:
    """Return this thread's innermost call of the model's generate(), None outside of one."""
    return next((call for call in reversed(_under_way.get()) if call.model is model), None)


class Watched(StoppingCriteriaList):
    """The stopping criteria of a call, which notes every answer of theirs."""

    def __init__(self, criteria: StoppingCriteriaList, call: Call) -> None:
        super().__init__(criteria)
        self._call = call

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        done = super().__call__(*arguments, **named)
        self._call.asked(done)
        return done


def watch(model: Any, overrides: Overrides) -> None:
    """Note the calls of the model's generate(); none of a model without it, or without the known criteria."""
    generate, criteria = getattr(model, "generate", None), getattr(model, CRITERIA, None)
    if generate is None or criteria is None:
        return
    overrides.put(model, CRITERIA, _watching(model, criteria))
    overrides.put(model, "generate", _noting(model, generate))


def _noting(model: Any, generate: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(generate)
    def noting(*arguments: Any, **named: Any) -> Any:
        if named.get("custom_generate") is not None:  # another library's loop, which may ask its criteria anything
            return generate(*arguments, **named)
        # In a context of its own, which ends with the call however that ends: no line here has to run for it.
        call = Call(model, _assistant(generate, arguments, named))
        return copy_context().run(_run, call, generate, arguments, named)

    return noting


def _run(call: Call, generate: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    _under_way.set((*_under_way.get(), call))
    return generate(*arguments, **named)


def _assistant(generate: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Return the assistant model given to generate(), by place or by name."""
    try:
        return inspect.signature(generate).bind_partial(*arguments, **named).arguments.get("assistant_model")
    except TypeError:  # generate() raises it itself
        return None


def _watching(model: Any, criteria: Callable[..., StoppingCriteriaList]) -> Callable[..., StoppingCriteriaList]:
    @wraps(criteria)
    def watching(generation_config: Any, *arguments: Any, **named: Any) -> StoppingCriteriaList:
        made, call = criteria(generation_config, *arguments, **named), current(model)
        if call is None:
            return made
        call.begin(generation_config)
        return Watched(made, call)

    return watching

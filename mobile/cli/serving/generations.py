"""Generation for Transformers' handlers: one request after another, none longer than the model, none for nobody."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from transformers.cli.serving.utils import GenerateManager, GenerationState

from mobile.cli.serving.bodies import MOST_NEW_TOKENS


class _ClientLeft(Exception):
    """Ends generate() for a client that has left."""


class _UntilItLeaves:
    """A streamer that passes nothing on, and ends generate() at the next token once the client has left."""

    def __init__(self) -> None:
        self.left = False

    def put(self, _: Any) -> None:
        if self.left:
            raise _ClientLeft

    def end(self) -> None:
        """Do nothing: the answer is returned whole."""


class Generations(GenerateManager):
    """The generations of one model, in the order in which they were asked for; `positions` is its longest text."""

    def __init__(self, positions: int | None) -> None:
        super().__init__()
        self._positions = positions

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, *more: Any, **options: Any
    ) -> Any:
        """Return the queue of the text that comes, and its streamer, which the handler cancels if the client leaves."""
        self._shorten(inputs, gen_config)
        return super().generate_streaming(model, processor, inputs, gen_config, request_id, *more, **options)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, *more: Any, **options: Any
    ) -> Any:
        """Return text, prompt tokens and new ids. Cancelled, end generate() at its next token."""
        self._shorten(inputs, gen_config)
        client = _UntilItLeaves()
        given = {**inputs, "streamer": client}
        generating = asyncio.ensure_future(
            super().generate_non_streaming(model, processor, given, gen_config, request_id, *more, **options)
        )
        try:
            return await asyncio.shield(generating)  # what generates tells its future how it ended, cancelled or not
        except asyncio.CancelledError:
            client.left = True
            generating.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            raise

    async def ended(self, seconds: float) -> None:
        """Wait until none is at work, or that many seconds: a thread in torch must not outlive the process."""
        with suppress(TimeoutError):
            await asyncio.to_thread(self.submit(lambda: None).result, seconds)

    def _shorten(self, inputs: Any, gen_config: Any) -> None:
        """Lower the number of new tokens to those for which the model has positions; the last one needs none."""
        if gen_config.max_new_tokens is not None:
            room = MOST_NEW_TOKENS if self._positions is None else self._positions - inputs["input_ids"].shape[-1] + 1
            gen_config.max_new_tokens = min(gen_config.max_new_tokens, room)


class OneModel(GenerationState):
    """The state of handlers that share the generations of one model."""

    def __init__(self, generations: Generations) -> None:
        super().__init__()
        self._generations = generations

    def get_manager(self, *_: Any, **__: Any) -> Any:
        """Return the generations."""
        return self._generations

"""The two-pass forward around any Transformers model: generate() and its callers see each token once."""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import Any, NoReturn

import torch
from torch import nn

from mobile import rollback
from mobile.engine import Engine
from mobile.passes import Pass
from mobile.refusal import Refused
from mobile.strategy import BigLittle, FullK, Rerouted


class Decoder:
    """Stands in for the model's forward: prefill runs as it is, a decode step under the strategy's gating."""

    def __init__(self, model: Any, engine: Engine) -> None:
        self.model, self.engine = model, engine
        self.gating = engine.strategy.gating
        self.stock = model.forward
        self._signature = inspect.signature(type(model).forward)
        self._warned = False
        self._hooks: list[Any] = []
        self._stood_for: dict[str, Any] = {}

    def install(self) -> None:
        """Put the two-pass forward in the model's place, and listen to what its routers are given."""

        @functools.wraps(type(self.model).forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        for name, instead in (("forward", forward), ("save_pretrained", refuse_to_save)):
            if name in vars(self.model):
                self._stood_for[name] = vars(self.model)[name]
            setattr(self.model, name, instead)
        self._settings = self._generation_config
        self._compiles = getattr(self._settings, "disable_compile", False)
        self._settings.disable_compile = True  # generate() would compile this forward for a static cache
        for number, layer in enumerate(self.engine.layers):
            hook = functools.partial(self._heard, number)
            self._hooks.append(layer.router.register_forward_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Undo `install`."""
        for name in ("forward", "save_pretrained"):
            if name in self._stood_for:
                setattr(self.model, name, self._stood_for[name])
            else:
                delattr(self.model, name)
        self._settings.disable_compile = self._compiles
        for hook in self._hooks:
            hook.remove()

    @property
    def _generation_config(self) -> Any:
        return getattr(self.model, "generation_config", None) or self.model.config

    def _heard(self, number: int, _router: nn.Module, args: tuple, kwargs: dict[str, Any], _output: Any) -> None:
        running = self.engine.running
        if running is not None and running.kind != "prefill":
            running.router_inputs[number] = (args, kwargs)
        if self.engine.foresees:
            self.engine.heard[number] = (args, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine.step(self._step, args, kwargs)

    def _step(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        given = self._signature.bind(self.model, *args, **kwargs).arguments
        inputs = given.get("input_ids")
        embeds = given.get("inputs_embeds")
        source = inputs if inputs is not None else embeds
        if source is None:
            return self.stock(*args, **kwargs)
        rows, length = source.shape[:2]
        cache = given.get("past_key_values")
        begun = _holds_tokens(cache)
        mask = given.get("attention_mask")
        valid = torch.ones(rows, length, dtype=torch.bool, device=source.device)
        if length != 1 or not begun:
            if isinstance(mask, torch.Tensor) and mask.ndim == 2:
                valid = mask[:, -length:].to(torch.bool)
            return self._one(Pass("prefill", valid), args, kwargs, fresh=not begun)
        live = self._live(inputs, rows, source.device)
        if isinstance(self.gating, FullK | Rerouted):
            return self._one(Pass("full", valid), args, kwargs, live)
        if not isinstance(self.gating, BigLittle):
            with self.engine.little_k():
                return self._one(Pass("little", valid), args, kwargs, live)
        if not self.engine.undoable or not rollback.supported(cache, self.engine.undoable):
            self._warn(cache)
            return self._one(Pass("full", valid), args, kwargs, live)
        return self._two(valid, args, kwargs, live, cache, self.gating.gamma)

    def _one(
        self, running: Pass, args: tuple, kwargs: dict[str, Any], live: torch.Tensor | None = None, fresh: bool = False
    ) -> Any:
        with self.engine.passing(running):
            output = self.stock(*args, **kwargs)
        self.engine.remember(running, live, fresh=fresh)
        return output

    def _two(
        self, valid: torch.Tensor, args: tuple, kwargs: dict[str, Any], live: torch.Tensor, cache: Any, gamma: float
    ) -> Any:
        """Little pass, confidence, and for the rows that were unsure: roll back and run the big pass."""
        engine = self.engine
        undo = rollback.before_step(cache)
        little = Pass("little", valid)
        with engine.little_k(), engine.passing(little):
            output = self.stock(*args, **kwargs)
        confidence = output.logits[:, -1].float().softmax(-1).amax(-1)
        unsure = (confidence < gamma) & live
        if not bool(unsure.any()):
            engine.remember(little, live, confidence)
            return output
        predicted = engine.predict(little)
        undo()
        confident = None if bool(unsure.all()) else ~unsure
        big = Pass("big", valid, confident=confident, settled=little.selections)
        engine.fall_back(predicted, unsure)
        with engine.passing(big):
            result = self.stock(*args, **kwargs)
        if confident is not None:
            result.logits[confident] = output.logits[confident]
        engine.remember(little, live, confidence)
        engine.remember(big, unsure, confidence, predicted)
        return result

    def _live(self, inputs: torch.Tensor | None, rows: int, device: torch.device) -> torch.Tensor:
        """Rows (rows,) still being written: a finished row of a batch is fed its end token, then padding.

        It must decide nothing. A row stopped by anything else than an end token is seen one step late, which costs
        a needless fallback at most.
        """
        if rows == 1 or inputs is None or not self._ends:
            return torch.ones(rows, dtype=torch.bool, device=device)
        return ~torch.isin(inputs[:, -1], torch.tensor(self._ends, device=device))

    @functools.cached_property
    def _ends(self) -> list[int]:
        """Token ids that a finished row is fed: padding and every end of sequence."""
        settings = self._generation_config
        ids = [getattr(settings, "pad_token_id", None), *_several(getattr(settings, "eos_token_id", None))]
        return sorted({token for token in ids if token is not None})

    def _warn(self, cache: Any) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(cache).__name__} cannot be rolled back safely here, so every token runs with all experts.",
                stacklevel=4,
            )


def _holds_tokens(cache: Any) -> bool:
    """Whether a step on this cache goes on with a sequence. A hybrid's first layers may hold no length at all."""
    lengths = (layer.get_seq_length() for layer in getattr(cache, "layers", ()) if hasattr(layer, "get_seq_length"))
    return any(length > 0 for length in lengths)


def _several(value: int | list[int] | None) -> list[int | None]:
    return list(value) if isinstance(value, list | tuple) else [value]


def refuse_to_save(*_: Any, **__: Any) -> NoReturn:
    """Stands in for `save_pretrained`, which would write empty experts, for some families without a word."""
    raise Refused("The experts are in the host store, so saving would lose them; call mobile.detach(model) first.")

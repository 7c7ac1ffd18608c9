"""The two-pass forward around any Transformers model.

It stands in for the model's own forward, so that generate() and every other caller sees each token once.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mobile.errors import Refused
from mobile.live_model import compat, generate_calls
from mobile.live_model.overrides import Overrides
from mobile.policies.strategy import BigLittle, CachedRouting, CustomRouting, FullK, HalfK
from mobile.runtime import rollback
from mobile.runtime.confidence import confidence, replay_routers
from mobile.runtime.engine import Engine
from mobile.runtime.forward_pass import ForwardPass
from mobile.runtime.next_layer import predict
from mobile.transfer import read, send

BROKEN_OFF = "Attaching or detaching this model was broken off; call mobile.detach(model), which finishes it."
AS_A_PROMPT = "runs as a prompt's does, with all experts and none kept: the strategy {} does not act on it."


@dataclass(frozen=True)
class Entrance:
    """A model through which a forward pass may begin: the attached one, or a base model inside it."""

    module: PreTrainedModel
    stock: Callable[..., Any]
    signature: inspect.Signature
    outermost: bool

    def given(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments by name."""
        arguments = dict(self.signature.bind(self.module, *args, **kwargs).arguments)
        for parameter in self.signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(parameter.name, {}))
        return arguments


@dataclass(frozen=True)
class Forward:
    """A forward pass as its caller asks for it."""

    entrance: Entrance
    args: tuple
    kwargs: dict[str, Any]

    def run(self, **changed: Any) -> Any:
        """Run the model's own forward."""
        return self.entrance.stock(*self.args, **{**self.kwargs, **changed})


class Decoder:
    """The forward that stands in for the model's: prefill runs as it is, a decode step under the strategy's gating."""

    def __init__(self, model: PreTrainedModel, engine: Engine) -> None:
        self.model, self.engine = model, engine
        self.stock = model.forward
        self._warned: set[str] = set()

    def install(self, overrides: Overrides) -> None:
        """Put the two-pass forward in the place of the model's, and record its routers' inputs."""
        settings = getattr(self.model, "generation_config", None) or self.model.config
        overrides.put(settings, "disable_compile", True)  # generate() would compile this forward for a static cache
        for number, layer in enumerate(self.engine.layers):
            record = torch.compiler.disable(functools.partial(self._record_router_input, number))
            overrides.hook(layer.router.register_forward_hook, record, with_kwargs=True)
        generate_calls.watch(self.model, overrides)
        for module in entrances(self.model, [layer.experts for layer in self.engine.layers]):
            overrides.put(module, "forward", self._forward(module))

    def _forward(self, module: PreTrainedModel) -> Callable[..., Any]:
        entrance = Entrance(module, module.forward, inspect.signature(type(module).forward), module is self.model)

        @functools.wraps(type(module).forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._enter(Forward(entrance, args, kwargs))

        return torch.compiler.disable(forward)  # the engine decides in Python, for every layer anew

    def _record_router_input(
        self, number: int, _router: nn.Module, args: tuple, kwargs: dict[str, Any], _output: Any
    ) -> None:
        running = self.engine.running
        if running is not None and running.kind != "prefill":
            running.router_inputs[number] = (args, kwargs)
        if self.engine.asks_ahead:
            self.engine.next_layer.last_router_inputs[number] = (args, kwargs)

    # --- one forward pass ---------------------------------------------------------------------------

    def _enter(self, asked: Forward) -> Any:
        """Run a forward call as a step of the engine. Raise Refused if a detach was begun and not finished."""
        if self.engine.leaving:
            raise Refused(BROKEN_OFF)
        given = asked.entrance.given(asked.args, asked.kwargs)
        source = given.get("input_ids")
        source = given.get("inputs_embeds") if source is None else source
        if source is None or source.ndim < 2:  # a model inside may be given what this one makes of its arguments
            return asked.run()
        return self.engine.step(self._step, asked, given, source)

    def _step(self, asked: Forward, given: dict[str, Any], source: torch.Tensor) -> Any:
        """Run one forward call under the strategy: `source` are its ids (rows, length), or embeddings."""
        engine = self.engine
        if engine.running is not None:  # a base model inside the one whose pass this is
            return asked.run()
        rows, length = source.shape[:2]
        call, cache = generate_calls.current(self.model), compat.cache_of(given)
        begun = holds_tokens(cache)
        # Whatever is not one token a row after others is read as a prompt is: with all experts.
        if length != 1 or not begun or (call is not None and call.prompting):
            self._warn_if_inert(given, call, begun)
            mask = given.get("attention_mask")
            valid = torch.ones(rows, length, dtype=torch.bool, device=source.device)
            if isinstance(mask, torch.Tensor) and mask.ndim == 2:
                valid = mask[:, -length:].to(torch.bool)
            output = self._one(ForwardPass("prefill", valid), asked, fresh=not begun)
            if call is not None:
                call.read()
            return output
        # A decode step: one token a row, in one pass or two.
        valid = torch.ones(rows, 1, dtype=torch.bool, device="cpu")
        live = None if call is None else call.live(rows)
        gating = engine.strategy.gating
        if isinstance(gating, FullK | CustomRouting | CachedRouting):
            return self._one(ForwardPass("full", valid, live), asked)
        if isinstance(gating, HalfK):
            with engine.little_k():
                return self._one(ForwardPass("little", valid, live), asked)
        return self._two(ForwardPass("little", valid, live), asked, given, gating)

    def _one(self, running: ForwardPass, asked: Forward, fresh: bool = False) -> Any:
        """Run and record a single pass; `fresh` begins new requests."""
        with self.engine.passing(running):
            output = asked.run()
        self.engine.recorder.add(running, running.live, fresh=fresh)
        return output

    def _two(self, little: ForwardPass, asked: Forward, given: dict[str, Any], gating: BigLittle) -> Any:
        """Run the little pass, and where a row's confidence is below gamma roll back and run the big pass.

        Confidence is the gating's signal. A row that has ended causes no big pass, and takes part in one.
        """
        engine, cache = self.engine, compat.cache_of(given)
        if not asked.entrance.outermost:
            return self._all_experts(little, asked, "was called without its head, so no confidence is known")
        undoable = engine.findings.undoable
        if not undoable or not rollback.supported(cache, undoable):
            return self._all_experts(little, asked, f"writes into a {type(cache).__name__} that cannot be rolled back")
        # 1. Run with K/2 experts, after saving what the step changes in the cache.
        undo = rollback.before_step(cache)
        redraw = rollback.random_numbers(engine.device) if self.model.training else None
        with engine.little_k(), engine.passing(little):
            output = asked.run(return_dict=True)
        # 2. Rows below gamma fall back, which is decided on the host; if none does, this was the token.
        replayed = replay_routers(engine.layers, little) if gating.replays_routers else []
        judged = confidence(gating.signal, output.logits[:, -1], little, replayed)
        (sure,) = read(judged)
        unsure = sure < gating.gamma
        falls = unsure if little.live is None else unsure & little.live
        if not bool(falls.any()):
            engine.recorder.add(little, little.live, sure)
            return _as_asked(output, self.model, given)
        # 3. The little pass's router inputs predict the experts of the big one, which are loaded ahead of it.
        predicted = engine.fall_back(lambda: [index for index, _ in replayed] or predict(engine.layers, little), falls)
        # 4. Roll back, and run with K experts; rows that were sure keep their K/2, so that no row depends on others.
        undo()
        if redraw is not None:
            redraw()
        confident = None if bool(unsure.all()) else send(~unsure, engine.device)
        big = ForwardPass("big", little.valid, little.live, confident=confident, little_selections=little.selections)
        with engine.passing(big):
            result = asked.run(return_dict=True)
        if engine.compare is not None:
            engine.compare(little, output.logits[:, -1], result.logits[:, -1])
        # 5. Rows that were sure keep the little pass's logits, bit for bit.
        if confident is not None:
            result.logits = torch.where(confident[:, None, None], output.logits, result.logits)
        engine.recorder.add(little, little.live, sure)
        engine.recorder.add(big, falls, sure, predicted)
        return _as_asked(result, self.model, given)

    def _all_experts(self, little: ForwardPass, asked: Forward, because: str) -> Any:
        """Run all experts in place of the little pass, and warn why."""
        self._warn(
            f"The model {because}, so every token runs with all experts, and {self.engine.strategy.name} does not act."
        )
        return self._one(ForwardPass("full", little.valid, little.live), asked)

    # --- warnings where a strategy has no effect -----------------------------------------------------

    def _warn_if_inert(self, given: dict[str, Any], call: generate_calls.Call | None, begun: bool | None) -> None:
        """Warn, once for each reason, of a forward pass that decodes and yet can only be run as a prompt is."""
        if not self.engine.strategy.acts_on_decode:
            return
        cache = compat.cache_of(given)
        if "cu_seq_lens_q" in given or "block_table" in given:
            reason = "Continuous batching packs many sequences into one forward pass, which"
        elif call is not None and call.decoding and cache is None:
            reason = "Without a cache of keys and values each token means the whole text again, a forward pass that"
        elif call is not None and call.decoding and begun:
            reason = "Assisted generation checks several tokens in one forward pass, which"
        elif cache is not None and begun is None:
            reason = f"A {type(cache).__name__} does not tell whether it holds tokens, so every forward pass with it"
        else:
            return
        self._warn(f"{reason} {AS_A_PROMPT.format(self.engine.strategy.name)}")

    def _warn(self, sentence: str) -> None:
        if sentence not in self._warned:
            self._warned.add(sentence)
            warnings.warn(sentence, stacklevel=2)


def entrances(model: PreTrainedModel, experts: list[nn.Module]) -> list[PreTrainedModel]:
    """Return the models inside `model`, itself included, that hold all of these modules."""
    wanted = set(experts)
    return [m for m in model.modules() if isinstance(m, PreTrainedModel) and wanted.issubset(m.modules())]


def holds_tokens(cache: Any) -> bool | None:
    """Return whether a step on this cache continues a sequence; None if it cannot be known.

    A hybrid's first layers may hold no length at all, so every layer is asked.
    """
    if cache is None:
        return False
    holders = getattr(cache, "layers", None)
    holders = [cache] if holders is None else holders
    asked = [holder.get_seq_length for holder in holders if hasattr(holder, "get_seq_length")]
    if holders and not asked:
        return None
    return any(length() > 0 for length in asked)


def _as_asked(output: Any, model: PreTrainedModel, given: dict[str, Any]) -> Any:
    """Return the output as the tuple that `return_dict=False`, or the model's configuration, asks for."""
    asked = given.get("return_dict")
    as_object = getattr(model.config, "return_dict", True) if asked is None else asked
    return output if as_object else output.to_tuple()

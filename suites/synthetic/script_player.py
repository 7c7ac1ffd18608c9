"""The player of scripts on a synthetic model, teacher-forced, under the real code of every strategy.

Hooks change the inputs of routers and head, never their computation: the router's own product, softmax and top-k choose
the script's experts, at whatever K is set, MoBiLE's prediction replays it on the same input, and the head's logits
are sure or not. Nothing of the engine is replaced.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from mobile.errors import Refused
from mobile.ledger import Counters
from mobile.live_model import compat
from mobile.runtime.engine import Engine
from suites.synthetic.models import Synthetic
from suites.synthetic.script import Script
from suites.typed_json import Count

RANKED = 0.25  # between the logits of one expert and the next; exact in bfloat16
SURE = 32.0  # the logit of one token, others 0: its probability is above 0.99999 in a vocabulary of 151,936
PROMPT = -1


@dataclass(frozen=True)
class Played:
    """The times of one script: prefill, and the counted decode steps with what they added to the counters.

    `decode_bytes` are those of the copies that ended during the counted steps.
    """

    prompt_tokens: Count
    prefill_ns: Count
    decode_ns: Count
    decode_bytes: Count
    counters: Counters

    @property
    def fallbacks(self) -> int:
        return self.counters.fallbacks


class ScriptPlayer:
    """Hooks on the routers and the head of an attached model; `at` is the decode step, or PROMPT.

    Its tensors are made before the clock runs: a hook does no more than look one up.
    """

    def __init__(self, made: Synthetic, script: Script) -> None:
        if (script.layers, script.full.shape[2]) != (made.geometry.moe_layers, made.geometry.top_k):
            raise Refused(
                f"The script is for {script.layers} layers, top {script.full.shape[2]}; {made.geometry.name} has "
                f"{made.geometry.moe_layers}, top {made.geometry.top_k}."
            )
        self.at = PROMPT
        self._engine: Engine = made.model.mobile
        weight = made.layers[0].router.weight
        hidden = partial(_hidden, width=weight.shape[1], like=weight)
        self._prompt = list(hidden(script.prompt.swapaxes(0, 1)).unbind())  # by layer, (prompt tokens, H)
        self._little, self._full = (  # by step and layer, (1, H)
            [list(step.unsqueeze(1).unbind()) for step in hidden(chosen).unbind()]
            for chosen in (script.little, script.full)
        )
        head = made.model.get_output_embeddings()
        sure = torch.zeros(1, 1, head.weight.shape[1], dtype=head.weight.dtype, device=head.weight.device)
        unsure, sure[..., 0] = sure.clone(), SURE
        self._head_inputs = [unsure if each else sure for each in script.unsure]
        self._hooks = [head.register_forward_pre_hook(self._set_confidence)]
        for number, layer in enumerate(made.layers):
            self._hooks.append(layer.router.register_forward_pre_hook(partial(self._route, number)))

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def _route(self, layer: int, _router: nn.Module, _args: Any) -> tuple[torch.Tensor]:
        if self.at == PROMPT:
            return (self._prompt[layer],)
        running = self._engine.running
        table = self._little if running is not None and running.kind == "little" else self._full
        return (table[self.at][layer],)

    def _set_confidence(self, _head: nn.Module, _args: Any) -> tuple[torch.Tensor] | None:
        return None if self.at == PROMPT else (self._head_inputs[self.at],)


def _hidden(chosen: np.ndarray, width: int, like: torch.Tensor) -> torch.Tensor:
    """Return router inputs (..., width) that make a router with the identity's rows choose (..., K) ids, best first."""
    ranks = torch.arange(chosen.shape[-1], 0, -1, dtype=torch.float32) * RANKED
    ids = torch.from_numpy(np.ascontiguousarray(chosen)).long()
    logits = torch.zeros(*ids.shape[:-1], width).scatter_(-1, ids, ranks.expand(ids.shape))
    return logits.to(like.device, like.dtype)


@torch.no_grad()
def play(made: Synthetic, script: Script, tokens: torch.Tensor | None = None) -> Played:
    """Play the script once on the attached model, from whatever its slots hold.

    On a GPU the host waits for the device at the ends of prefill and of the counted steps, nowhere else.

    `tokens` (prompt tokens + steps,) are what is fed, some fixed ones if left out. Raise Refused for a script of
    another shape.
    """
    model, engine = made.model, made.model.mobile
    length = len(script.prompt)
    if tokens is None:
        tokens = torch.arange(length + script.steps) % model.config.vocab_size
    tokens = tokens.to(made.device)[None]
    player = ScriptPlayer(made, script)
    try:
        begun = _now(made)
        # Logits of all tokens: from a slice of the hidden states, as logits_to_keep takes it, PyTorch 2.13's product of
        # bf16 on a CPU took 1.3 s instead of 12 ms for a vocabulary of 50,304.
        output = model(input_ids=tokens[:, :length], use_cache=True)
        cache, prefilled = compat.going_on(model, compat.cache_of(output)), _now(made)
        started, before = prefilled, engine.ledger.counters.copy()
        for step in range(script.steps):
            if step == script.warmup:
                started, before = _now(made), engine.ledger.counters.copy()
            player.at = step
            fed = tokens[:, length + step : length + step + 1]
            model(input_ids=fed, use_cache=True, logits_to_keep=1, **cache)
        ended = _now(made)
        counters = engine.ledger.counters.since(before)
        engine.residency.end_token()
    finally:
        player.remove()
    return Played(length, prefilled - begun, ended - started, counters.bytes_loaded, counters)


def _now(made: Synthetic) -> int:
    """Return nanoseconds on the link's clock, once the device is idle and the copies that have ended are noted."""
    if made.device.type == "cuda":
        torch.cuda.synchronize(made.device)
    link = made.model.mobile.link
    link.compute(0, "mark")
    return link.now

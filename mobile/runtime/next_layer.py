"""Next-layer lookups: each layer's router asked about the layer before's input, before its own input is known.

Lookaheads prefetch by the answers, custom routings choose by them, and traces keep them for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mobile.live_model.compat import MoeLayer
from mobile.policies.next_logits import NextLayerLogits, of_one_layer, predicting_layer
from mobile.policies.strategy import CustomRouting, Strategy
from mobile.runtime.forward_pass import ForwardPass, RouterInput, Selection
from mobile.runtime.quasi_hidden_state import QuasiHiddenState


class NextLayerLookup:
    """Asks the routers of `layers` ahead, as far as `strategy`, or a trace, needs the answers.

    `last_router_inputs` holds by layer the arguments that its router was called with last.
    """

    def __init__(self, layers: Sequence[MoeLayer], strategy: Strategy) -> None:
        self.layers = layers
        self.needs_logits = strategy.lookahead is not None
        self.needs_selections = isinstance(strategy.gating, CustomRouting) and strategy.gating.foresees
        self.last_router_inputs: dict[int, RouterInput] = {}
        self._selections: dict[int, Selection] = {}  # by layer, its router's choice on the layer before's input

    def ask(
        self,
        layer: int,
        running: ForwardPass,
        selection: Selection,
        quasi: QuasiHiddenState | None,
        *,
        keep_logits: bool,
    ) -> torch.Tensor | None:
        """Ask the router of `layer + 1` about the input of `layer`, if it is known what else that is given.

        `layer` runs `selection`; with `quasi` the router is asked about what the layer will probably leave instead.
        Return its logits (tokens, experts) in float16, on the device, where the strategy needs them, or a trace does
        (`keep_logits`); else None. Once read they belong in `running.ahead`.
        """
        if layer + 1 == len(self.layers):
            return None
        (hidden, *_), _ = running.router_inputs[layer]
        others = self._other_inputs(layer, running, hidden)
        if quasi is not None:
            hidden = quasi.after(layer, *selection).view_as(hidden)
        if others is None:
            return None
        following, args, kwargs = self.layers[layer + 1], (hidden, *others[0]), others[1]
        if self.needs_selections:
            self._selections[layer + 1] = following.choice(args, kwargs)
        if self.needs_logits or keep_logits:
            return following.logits(args, kwargs).to(torch.float16)
        return None

    def take_selection(self, layer: int) -> Selection | None:
        """Return what the router of `layer` chose on the layer before's input, once; None if it was not asked."""
        return self._selections.pop(layer, None)

    def logits_for(self, layer: int, running: ForwardPass | None, *, last: bool) -> NextLayerLogits | None:
        """Return the logits that a lookahead is shown at `layer`; None if there are none.

        `last` says whether it is the last of the charged layers that this live layer is counted as.
        """
        source = predicting_layer(layer, last, len(self.layers))
        logits = running.ahead.get(source) if running is not None and source is not None else None
        return None if logits is None else of_one_layer(logits)

    def _other_inputs(self, layer: int, running: ForwardPass, hidden: torch.Tensor) -> RouterInput | None:
        """Return what the next layer's router is probably given beside hidden states; None if that is not known.

        A router of this layer's class is given what this one is where that belongs to the tokens, and the rest as the
        last time; another is given all as the last time, which must have been as many tokens.
        """
        (_, *here), named_here = running.router_inputs[layer]
        alike = type(self.layers[layer].router) is type(self.layers[layer + 1].router)
        # 1. It was never called: this layer's inputs serve if the routers are of one class.
        if layer + 1 not in self.last_router_inputs:
            return (tuple(here), named_here) if alike else ((), {})
        (then, *others), named = self.last_router_inputs[layer + 1]

        def of_tokens(part: Any) -> bool:
            return torch.is_tensor(part) and part.shape[: then.ndim - 1] == then.shape[:-1]

        # 2. One class: a value for each token is taken from this layer, anything else from the last call.
        if alike and len(here) == len(others) and named_here.keys() == named.keys():
            others = [mine if of_tokens(last) else last for last, mine in zip(others, here, strict=True)]
            return tuple(others), {key: named_here[key] if of_tokens(last) else last for key, last in named.items()}
        # 3. Another class: all as in the last call, unless that had another number of tokens and values for each.
        if then.shape[:-1] != hidden.shape[:-1] and any(map(of_tokens, (*others, *named.values()))):
            return None
        return tuple(others), named


def predict(layers: Sequence[MoeLayer], little: ForwardPass) -> list[torch.Tensor]:
    """Return by layer the K experts (tokens, K) that a big pass would choose on the little pass's router inputs."""
    return [layer.route(*little.router_inputs[number]) for number, layer in enumerate(layers)]

"""The quasi-hidden state: a layer's probable output, before its experts have run (arXiv 2603.19289).

    quasi = norm'(h + sum over the chosen experts e of w_e v_e)

h is the residual stream at the MoE block, v_e the mean output of expert e, norm' the norm before the next MoE block.
Nothing here is per model. The norm before a router is the last module that gave, bit for bit, what the router was
given; h is what that norm was given. Left out are shared experts, and a norm behind the experts where a model has one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from mobile.errors import Refused
from mobile.kernels.loop import Views, expert_output, group, normed
from mobile.live_model.compat import MoeLayer
from mobile.live_model.overrides import Overrides
from mobile.runtime.forward_pass import ForwardPass
from mobile.store import Store

ROWS, LENGTH, SEED = 8, 64, 0  # the random tokens that mean outputs are taken over


class QuasiHiddenState:
    """The norms before each MoE layer's router, and the mean outputs `vectors` (layers, experts + 1, H) of its experts.

    The last row of a layer is of no expert: zero. `running()` is the pass under way; of a prefill nothing is kept.
    """

    def __init__(
        self, norms: Sequence[nn.Module], vectors: torch.Tensor, running: Callable[[], ForwardPass | None]
    ) -> None:
        self.norms, self.vectors, self._running = norms, vectors, running
        self._residual: dict[int, torch.Tensor] = {}

    def listen(self, overrides: Overrides) -> None:
        """Record the inputs of the norms from now on, until the overrides are undone."""
        for layer, norm in enumerate(self.norms):
            overrides.hook(norm.register_forward_hook, partial(self._record_residual, layer))

    def _record_residual(self, layer: int, _norm: nn.Module, args: tuple, _output: Any) -> None:
        running = self._running()
        if running is not None and running.kind != "prefill":
            self._residual[layer] = args[0]

    def after(self, layer: int, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Predict the next layer's router input (tokens, H) from the experts (tokens, K) that `layer` runs."""
        residual, vectors = self._residual.pop(layer), self.vectors[layer]
        residual = residual.reshape(-1, residual.shape[-1])
        left = residual + (weights[..., None] * vectors[index]).sum(1).to(residual.dtype)
        norm = self.norms[layer + 1]
        return type(norm).forward(norm, left)


@torch.no_grad()
def learn(
    model: nn.Module,
    layers: Sequence[MoeLayer],
    store: Store,
    prefill: Callable[[torch.Tensor], Any],
    running: Callable[[], ForwardPass | None],
    overrides: Overrides,
) -> QuasiHiddenState:
    """Find the norms and take the experts' mean outputs, from one `prefill` of random token ids (rows, length).

    `store` has the experts of `layers`, and `running()` is the pass under way from then on. Mean outputs are the same
    whatever is generated later, so no output depends on what came before it. They take a row of the hidden width per
    expert on the device, beyond the budget. Hooks are among `overrides`, until it is over. Raise Refused where no
    norm is found.
    """
    generator = torch.Generator("cpu").manual_seed(SEED)
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = torch.randint(vocabulary, (ROWS, LENGTH), generator=generator, device="cpu")
    norms: list[nn.Module] = []
    means: list[torch.Tensor] = []
    before: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []  # modules run since the last router: in, out

    def note_module(module: nn.Module, args: tuple, output: Any) -> None:
        if args and torch.is_tensor(args[0]) and torch.is_tensor(output) and args[0].shape == output.shape:
            before.append((module, args[0], output))

    widths: list[int] = []  # of the residual stream, as each router is given it

    def note_router(router: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = (*args, *kwargs.values())[0]
        norms.append(_norm_of(router, hidden, before))
        widths.append(hidden.shape[-1])
        before.clear()

    def note_experts(layer: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden, index, *_ = (*args, *kwargs.values())
        if hidden.shape[-1] != widths[layer]:
            raise Refused(
                f"{type(module).__name__} works at another width than the layers around it, so nothing is foreseen "
                "past its experts."
            )
        means.append(_mean_outputs(module, hidden, index, layers[layer].count, store.views(layer)))

    inside = {id(module) for layer in layers for part in (layer.router, layer.experts) for module in part.modules()}
    before_it = len(overrides)
    for module in model.modules():
        if id(module) not in inside:
            overrides.hook(module.register_forward_hook, note_module)
    for number, layer in enumerate(layers):
        overrides.hook(layer.router.register_forward_pre_hook, note_router, with_kwargs=True)
        overrides.hook(layer.experts.register_forward_pre_hook, partial(note_experts, number), with_kwargs=True)
    prefill(ids)
    overrides.undo(before_it)
    return QuasiHiddenState(norms, torch.stack(means), running)


def _norm_of(router: nn.Module, given: torch.Tensor, ran: Sequence[tuple]) -> nn.Module:
    """Return the last module that changed something into the router's input. Raise Refused if none did."""
    for module, taken, made in reversed(ran):
        if made.numel() == given.numel() and torch.equal(made.reshape(given.shape), given):
            if torch.equal(taken, made):
                continue
            return module
    raise Refused(f"No norm gives {type(router).__name__} its input as it is, so nothing is foreseen past its experts.")


def _mean_outputs(module: Any, hidden: torch.Tensor, index: torch.Tensor, experts: int, host: Views) -> torch.Tensor:
    """Return the mean output (experts + 1, H) of each expert over the tokens routed to it; zero without any."""
    hidden = hidden.reshape(-1, hidden.shape[-1])
    means = torch.zeros(experts + 1, hidden.shape[-1], dtype=torch.float32, device="cpu")
    groups = group(index, experts).on(hidden.device)
    for expert, start, count in zip(groups.experts, groups.starts, groups.counts, strict=True):
        x = hidden[groups.tokens[start : start + count]]
        outer = normed(module, expert_output(module, x.cpu(), expert, host).to(x.device))
        means[expert] = outer.float().mean(0)
    return means.to(hidden)

"""The size of a model's KV cache, of which a memory budget keeps a part back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from mobile.costs.memory import CONTEXT_TOKENS, KvCache, KvLayer
from mobile.live_model import compat
from mobile.live_model.overrides import Overrides
from mobile.runtime.experts import bind

PROBED = (2, 3)  # tokens, before and after which a cache is looked at


class _NoExperts:
    """A stand-in for the engine that computes nothing."""

    def run_experts(self, layer: int, hidden: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden)


def default_tokens(config: Any) -> int:
    """Return the tokens that a cache is counted for unless stated: `CONTEXT_TOKENS`, or all the model can read."""
    most = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return min(CONTEXT_TOKENS, most) if isinstance(most, int) and most > 0 else CONTEXT_TOKENS


def kv_cache(model: Any, layers: Sequence[compat.MoeLayer]) -> KvCache:
    """Return the cache that the model grows, read off the one it makes for two and for three tokens.

    So latent attention, indexers and recurrent layers count as Transformers caches them. On the meta device,
    where a model lies before its weights are read, nothing is computed. Where the model's code does not run so, more
    than usual is counted.
    """
    overrides = Overrides()
    try:
        if not all(
            weight.numel() and not weight.is_meta for layer in layers for weight in compat.stacked(layer.experts)
        ):
            for number, layer in enumerate(layers):
                bind(layer.experts, _NoExperts(), number, overrides)
        few, more = (_grown(model, layers, tokens) for tokens in PROBED)
        each = [(after - before) // (PROBED[1] - PROBED[0]) for before, after in zip(few, more, strict=True)]
        if not any(each):
            raise ValueError("a cache that does not grow")
        return KvCache(
            tuple(KvLayer(grown, before - PROBED[0] * grown) for grown, before in zip(each, few, strict=True))
        )
    except Exception:  # the model's own code may raise anything
        return _most(model)
    finally:
        overrides.undo()


@torch.no_grad()
def _grown(model: Any, layers: Sequence[compat.MoeLayer], tokens: int) -> list[int]:
    """Return the bytes of each layer's cache after so many tokens."""
    device = compat.device_of(layers)
    with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=model.training):
        output = model.forward(input_ids=torch.zeros(1, tokens, dtype=torch.long, device=device), use_cache=True)
    return [
        sum(held.nbytes for held in _tensors(vars(layer)) if held.ndim > 1) for layer in compat.cache_of(output).layers
    ]


def _tensors(held: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in attributes, lists and dictionaries."""
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, Mapping):
        for value in held.values():
            yield from _tensors(value)
    elif isinstance(held, list | tuple):
        for value in held:
            yield from _tensors(value)


def _most(model: Any) -> KvCache:
    """Return a cache that is larger than usual: keys and values of twice the hidden size, in every layer."""
    config = model.config.get_text_config(decoder=True)
    width = next(model.parameters()).element_size()
    return KvCache((KvLayer(4 * config.hidden_size * width),) * config.num_hidden_layers)

"""All that is known of Transformers' own code: versions, experts modules, their routers, and models refused.

It is in one place so that a new release is checked against one file.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel

from mobile.costs.geometry import Geometry
from mobile.errors import Refused
from mobile.store import ExpertLayout, format_named, layout_of

OLDEST, NEWEST_BELOW = "5.17", "5.25"
FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
NORM = "post_expert_norm"  # the norm of what an expert gives, which all experts of a layer share; since 5.20
CACHES = ("cache", "past_key_values", "cache_params")
PLAIN = {nn.Parameter, torch.Tensor}  # of what classes a weight and its data are, unless something quantised them
TOP_K_NAMES = ("top_k", "top_k_experts", "num_experts_per_tok")  # where a router, its block or its config keeps K


def check_docstrings() -> None:
    """Raise Refused where Python runs without docstrings, from which Transformers builds its model classes."""
    if sys.flags.optimize > 1:
        raise Refused(
            "Transformers makes no model under python -OO, which drops docstrings; leave -OO (PYTHONOPTIMIZE=2) out."
        )


@dataclass(frozen=True)
class MoeLayer:
    """An MoE layer of a live model: its stacked experts, the router that chooses among them, and where K is set."""

    experts: Any
    router: Any
    name: str
    top_k_attribute: tuple[Any, str]

    @property
    def count(self) -> int:
        return int(self.experts.num_experts)

    @property
    def top_k(self) -> int:
        return int(getattr(*self.top_k_attribute))

    def route(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        """Return the expert ids (tokens, top_k) that the router chooses for these inputs; runs no hook.

        A router that returns scores alone is taken at its highest ones: its block may correct them, so use this to
        foresee a choice, never to make one.
        """
        parts = self._ask(args, kwargs)
        for part in parts:
            if not part.is_floating_point() and part.shape[-1] < self.count:
                return part.reshape(-1, part.shape[-1])
        return self._scores(parts).topk(self.top_k).indices

    def choice(self, args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the expert ids and weights (tokens, top_k) that the router gives for these inputs; runs no hook."""
        parts = self._ask(args, kwargs)
        for index in parts:
            for weights in parts:
                if not index.is_floating_point() and weights.is_floating_point() and weights.shape == index.shape:
                    return index.reshape(-1, index.shape[-1]), weights.reshape(-1, weights.shape[-1])
        raise Refused(f"{type(self.router).__name__} gives no weights with its choice, so no layer is routed ahead.")

    def parts_of_output(self, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int, int]:
        """Return the positions of ids, weights and scores among the tensors that the router gives; runs no hook.

        Asked for all experts it gives weights and scores of one shape, so this is found out at fewer. Raise Refused for
        a router that lacks one of the three.
        """
        parts = self._ask(args, kwargs)
        ids = next((n for n, part in enumerate(parts) if not part.is_floating_point()), None)
        shape = None if ids is None else parts[ids].shape
        floats = [(n, part) for n, part in enumerate(parts) if part.is_floating_point()]
        weights = next((n for n, part in floats if part.shape == shape and part.shape[-1] < self.count), None)
        scores = next((n for n, part in floats if part.shape[-1] >= self.count), None)
        if ids is None or weights is None or scores is None:
            raise Refused(
                f"{type(self.router).__name__} does not give ids, weights and scores of its experts, so none can be "
                "chosen in place of its own; use a strategy that leaves the choice to the router."
            )
        return ids, weights, scores

    def choice_among(
        self, count: int, where: tuple[int, int, int], args: tuple, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the ids and weights (tokens, count) of the router's choice if it is to choose `count`, and its scores.

        Scores are (tokens, experts); `where` is what `parts_of_output` found. Runs no hook.
        """
        now = self.top_k
        try:
            setattr(*self.top_k_attribute, count)
            parts = self._ask(args, kwargs)
        finally:
            setattr(*self.top_k_attribute, now)
        ids, weights, scores = (parts[each].reshape(-1, parts[each].shape[-1]) for each in where)
        return ids, weights, scores[:, : self.count]

    def logits(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        """Return the router's scores of every expert (tokens, experts) for these inputs; runs no hook."""
        return self._scores(self._ask(args, kwargs))

    def _ask(self, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
        output = type(self.router).forward(self.router, *args, **kwargs)
        return [part for part in (output if isinstance(output, tuple) else (output,)) if torch.is_tensor(part)]

    def _scores(self, parts: list[torch.Tensor]) -> torch.Tensor:
        scores = next((part for part in parts if part.is_floating_point() and part.shape[-1] >= self.count), None)
        if scores is None:
            raise Refused(f"{type(self.router).__name__} shows no scores of all experts, so nothing can be foreseen.")
        return scores.reshape(-1, scores.shape[-1])[:, : self.count]


def check_version() -> None:
    """Raise Refused unless Transformers is in the tested range."""
    if not Version(OLDEST) <= Version(Version(transformers.__version__).base_version) < Version(NEWEST_BELOW):
        raise Refused(
            f"Transformers {transformers.__version__} is not supported; install transformers>={OLDEST},<{NEWEST_BELOW}."
        )


def cache_of(named: Mapping[str, Any]) -> Any:
    """Return the cache of keys and values among arguments or outputs by name; None if there is none.

    Transformers 5.24 calls it `cache`, and everything before `past_key_values`, or after the kind of model.
    """
    return next((named[name] for name in CACHES if named.get(name) is not None), None)


def going_on(model: nn.Module, cache: Any) -> dict[str, Any]:
    """Return the keyword argument with which the model's forward goes on with this cache."""
    known = inspect.signature(type(model).forward).parameters
    return {next(name for name in CACHES if name in known): cache}


def model_inside(model: Any) -> PreTrainedModel:
    """Return the Transformers model that `model` is, or that an adapter, a compiler or a class of the caller's wraps.

    Raise Refused if there is none, or several that hold experts.
    """
    if isinstance(model, PreTrainedModel):
        return model
    kind = type(model).__name__
    if isinstance(model, nn.DataParallel):
        raise Refused("DataParallel makes copies of the model, and an offloaded one has no copy; attach its .module.")
    if not isinstance(model, nn.Module):
        raise Refused(f"A {kind} is no Transformers model; give what from_pretrained returns.")
    found = [inner for inner in _outermost(model) if any(map(is_experts, inner.modules()))]
    if len(found) != 1:
        raise Refused(
            f"{kind} holds {len(found) or 'no'} Transformers model{'s' * (len(found) > 1)} with Mixture-of-Experts "
            "layers; give the one to offload, as from_pretrained returns it."
        )
    return found[0]


def _outermost(module: nn.Module) -> Iterator[PreTrainedModel]:
    """Yield the Transformers models inside, but none that lies in another."""
    for child in module.children():
        if isinstance(child, PreTrainedModel):
            yield child
        else:
            yield from _outermost(child)


def is_experts(module: nn.Module) -> bool:
    """Return whether it is one of the stacked experts modules that Transformers decorates."""
    return all(hasattr(module, flag) for flag in FLAGS)


def check_weights(model: nn.Module) -> None:
    """Raise Refused unless all weights are loaded floating-point tensors on one device, and no part is compiled."""
    weights = list(model.parameters())
    if any(w.is_meta for w in weights):
        raise Refused("The model's weights are not in memory, but on the meta device; load it without a device_map.")
    if any(not w.is_floating_point() or {type(w), type(w.data)} != PLAIN for w in weights):
        raise Refused("The model's weights are quantised; load them in a floating-point dtype.")
    places = sorted({str(w.device) for w in weights if w.numel()})
    if len(places) > 1:
        raise Refused(
            f"The model's weights lie on {' and '.join(places)}; load it on one device, without a device_map."
        )
    for name, part in model.named_modules():
        if name and getattr(part, "_compiled_call_impl", None) is not None:
            raise Refused(
                f"{name} is compiled by itself, so nothing in it can be replaced; attach first, then compile."
            )


def weight_names(experts: Any) -> tuple[str, ...]:
    """Return the names of the stacked weights of an experts module, each (experts, ...), in a row's order."""
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    return (up, f"{up}_bias", "down_proj", "down_proj_bias") if experts.has_bias else (up, "down_proj")


def stacked(experts: Any) -> list[nn.Parameter]:
    """Return those weights themselves: all that an experts module holds, but for a norm that its experts share."""
    return [getattr(experts, name) for name in weight_names(experts)]


def moe_layers(model: nn.Module) -> list[MoeLayer]:
    """Return the model's MoE layers in order. Raise Refused if it has none, or one that cannot be offloaded."""
    kind = type(model).__name__
    layers = []
    for name, experts in model.named_modules():
        if not is_experts(experts):
            continue
        # The module holds the stacked weights and nothing else, but for one norm that its experts may share.
        _refuse_adapters(model, name, experts)
        normed = getattr(experts, f"has_{NORM}", False)
        weights = {label for label, _ in experts.named_parameters() if not (normed and label.startswith(f"{NORM}."))}
        if weights != set(weight_names(experts)) or (getattr(experts, NORM, None) is not None) != normed:
            raise Refused(f"{kind} keeps {', '.join(sorted(weights))} in {name}, a layout this version cannot offload.")
        layers.append(_layer(kind, model, name, experts))
    # Weights shared between layers would be in two rows, of which each could change by itself.
    owned = [weight for layer in layers for weight in stacked(layer.experts)]
    if len({id(weight) for weight in owned}) != len(owned):
        raise Refused(f"{kind} has experts that several layers share, and a row of the store is of one layer.")
    if not layers:
        raise Refused(f"{kind} has no Mixture-of-Experts layers, so there is nothing to offload; use it as it is.")
    return layers


def _refuse_adapters(model: nn.Module, name: str, experts: nn.Module) -> None:
    """Raise Refused if the experts' weights go through something else before they are used, as an adapter's do."""
    parts = name.split(".")
    around = [model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts))]
    if any(type(part).__name__ == "ParamWrapper" for part in around) or hasattr(experts, "parametrizations"):
        raise Refused(
            f"An adapter (LoRA) or a parametrization lies on the experts {name}, which are computed without it here; "
            "merge it into them first, as merge_and_unload() does, or leave the experts out of its targets."
        )


def _layer(kind: str, model: nn.Module, name: str, experts: Any) -> MoeLayer:
    # The router lies beside the experts: by its usual name, or as the one module with a row of weights an expert.
    block = model.get_submodule(name.rpartition(".")[0])
    children = {label: child for label, child in block.named_children() if child is not experts}
    routers = [children[label] for label in ("gate", "router") if label in children] or [
        child
        for label, child in children.items()
        if "shared" not in label and any(w.ndim == 2 and w.shape[0] == experts.num_experts for w in child.parameters())
    ]
    if len(routers) != 1:
        raise Refused(f"{kind} has no router beside {name} that this version understands.")
    # The number of experts a token runs is an attribute of the router, of the block, or of a configuration.
    for holder in (routers[0], block, getattr(routers[0], "config", None), getattr(experts, "config", None)):
        for top_k_attribute in TOP_K_NAMES:
            if isinstance(getattr(holder, top_k_attribute, None), int):
                return MoeLayer(experts, routers[0], name, (holder, top_k_attribute))
    raise Refused(f"{kind} does not say how many experts {name} runs for a token, in any place this version knows.")


def common_layout(layers: Sequence[MoeLayer]) -> ExpertLayout:
    """Return the row layout that all layers share. Raise Refused if they differ."""
    weights = [{name: getattr(layer.experts, name) for name in weight_names(layer.experts)} for layer in layers]
    layouts = {layout_of(named) for named in weights}
    if len({w.dtype for named in weights for w in named.values()}) != 1:
        raise Refused("The experts' weights are of several dtypes; load the model with one, like dtype=torch.bfloat16.")
    if len(layouts) != 1 or len({layer.count for layer in layers}) != 1:
        raise Refused("The model's MoE layers differ in size, and one slot must hold any expert of any layer.")
    return layouts.pop()


def packed_layout(layout: ExpertLayout, layers: Sequence[MoeLayer], rows: str) -> ExpertLayout:
    """Return the layout of these layers' experts in a row format, by name. Raise Refused for an unknown one."""
    format = format_named(rows)
    transposed = {bool(layer.experts.is_transposed) for layer in layers}
    if format is not None and len(transposed) != 1:
        raise Refused(
            f"Some MoE layers hold their matrices transposed and some do not, so none lies in {rows}; use as-is."
        )
    return layout.packed(format, transposed=transposed.pop())


def device_of(layers: Sequence[MoeLayer]) -> torch.device:
    """Return where the model computes: its routers' device, since its experts may be nowhere."""
    return next(iter(layers[0].router.parameters())).device


def geometry_of(model: Any, layers: Sequence[MoeLayer], layout: ExpertLayout) -> Geometry:
    """Return the live model's sizes, read from its parameters, whether or not the experts are still among them."""
    routed = {id(w) for layer in layers for w in stacked(layer.experts)}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    apart = {id(module.weight) for module in (embedding, head) if module is not None}
    dense = sum(p.nbytes for p in model.parameters() if id(p) not in routed | apart)
    matrices = [field.shape for field in layout.fields if len(field.shape) == 2]
    return Geometry(
        name=type(model).__name__,
        moe_layers=len(layers),
        experts=layers[0].count,
        top_k=layers[0].top_k,
        expert_nbytes=layout.nbytes,
        dense_nbytes=dense // len(layers),
        router_nbytes=sum(p.nbytes for p in layers[0].router.parameters()),
        head_nbytes=head.weight.nbytes if head is not None else 0,
        embedding_nbytes=embedding.weight.nbytes if head is None or head.weight is not embedding.weight else 0,
        weight_nbytes=layout.weight_dtype.itemsize,
        expert_outputs=sum(shape[1 if layers[0].experts.is_transposed else 0] for shape in matrices),
        rows=layout.rows,
        expert_weights=None if layout.packing is None else sum(field.numel for field in layout.fields),
    )

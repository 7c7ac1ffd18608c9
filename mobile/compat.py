"""What is read of Transformers: the version gate, experts modules, their routers, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn

from mobile.geometry import Geometry
from mobile.layout import layout_of
from mobile.refusal import Refused

OLDEST, NEWEST_BELOW = "5.17", "5.24"
FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
PLAIN = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
WEIGHTS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class MoeLayer:
    """One MoE layer of a live model: its stacked experts and the router that chooses among them."""

    experts: Any
    router: Any
    name: str

    @property
    def count(self) -> int:
        return int(self.experts.num_experts)

    def route(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        """The expert ids (tokens, top_k) that the router chooses for these inputs; runs no hook."""
        return chosen(type(self.router).forward(self.router, *args, **kwargs))


def chosen(router_output: Any) -> torch.Tensor:
    """The integer tensor among a router's outputs: the chosen experts, (tokens, top_k)."""
    for part in router_output if isinstance(router_output, tuple) else ():
        if isinstance(part, torch.Tensor) and not part.is_floating_point():
            return part
    raise Refused("The router returns no expert indices; this family needs an adapter that does not exist yet.")


def check_version() -> None:
    """Raises Refused unless Transformers is in the tested range."""
    if not Version(OLDEST) <= Version(Version(transformers.__version__).base_version) < Version(NEWEST_BELOW):
        raise Refused(
            f"Transformers {transformers.__version__} is not supported; install transformers>={OLDEST},<{NEWEST_BELOW}."
        )


def moe_layers(model: nn.Module) -> list[MoeLayer]:
    """The model's MoE layers in order. Raises Refused if it has none, or one that cannot be offloaded yet."""
    kind = type(model).__name__
    layers = []
    for name, module in model.named_modules():
        if not all(hasattr(module, flag) for flag in FLAGS):
            continue
        if {flag: getattr(module, flag) for flag in FLAGS} != PLAIN or hasattr(module, "post_expert_norm"):
            raise Refused(f"{kind} stores its experts in a layout this version cannot offload yet ({name}).")
        parent = model.get_submodule(name.rpartition(".")[0])
        routers = [
            child
            for label, child in parent.named_children()
            if child is not module
            and "shared" not in label
            and hasattr(child, "top_k")
            and any(w.ndim == 2 and w.shape[0] == module.num_experts for w in child.parameters(recurse=False))
        ]
        if len(routers) != 1:
            raise Refused(f"{kind} has no router beside {name} that this version understands.")
        layers.append(MoeLayer(module, routers[0], name))
    if not layers:
        raise Refused(f"{kind} has no Mixture-of-Experts layers, so there is nothing to offload; use it as it is.")
    shapes = {(layer.count, *(tuple(getattr(layer.experts, w).shape) for w in WEIGHTS)) for layer in layers}
    if len(shapes) != 1:
        raise Refused(f"{kind} has MoE layers of unlike sizes, which this version cannot offload yet.")
    return layers


@contextmanager
def top_k_of(routers: list[Any], top_k: int) -> Iterator[None]:
    """Inside the block every router chooses `top_k` experts."""
    before = [router.top_k for router in routers]
    try:
        for router in routers:
            router.top_k = top_k
        yield
    finally:
        for router, k in zip(routers, before, strict=True):
            router.top_k = k


def geometry_of(model: Any, layers: list[MoeLayer]) -> Geometry:
    """The live model's own sizes, read from its parameters."""
    layout = layout_of({name: getattr(layers[0].experts, name) for name in WEIGHTS})
    routed = {id(getattr(layer.experts, name)) for layer in layers for name in WEIGHTS}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    apart = {id(module.weight) for module in (embedding, head) if module is not None}
    dense = sum(p.nbytes for p in model.parameters() if id(p) not in routed | apart)
    return Geometry(
        name=type(model).__name__,
        moe_layers=len(layers),
        experts=layers[0].count,
        top_k=int(layers[0].router.top_k),
        expert_nbytes=layout.nbytes,
        dense_nbytes=dense // len(layers),
        router_nbytes=sum(p.nbytes for p in layers[0].router.parameters()),
        head_nbytes=head.weight.nbytes if head is not None else 0,
        embedding_nbytes=embedding.weight.nbytes if embedding is not None and head is not embedding else 0,
        width=layout.dtype.itemsize,
    )

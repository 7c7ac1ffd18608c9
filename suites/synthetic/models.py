"""Synthetic models: the four real geometries in stock Transformers classes, with weights that mean nothing.

No checkpoint is read. Dense weights are Transformers' own initialisation, on the device. Experts are made directly in
the store, in host memory or in a file, and never lie on the device. Routers are rows of the identity and the head
watches one coordinate, so that `script_player` can have a router choose, and the output be sure or not, by what it is
given; both compute what a trained one computes, in the same time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from mobile.costs.geometry import GEOMETRIES, Geometry
from mobile.errors import Refused
from mobile.links.page_lock import page_lock
from mobile.live_model import compat
from mobile.machine.host import host
from mobile.policies.strategy import Strategy
from mobile.residency.prefill import PREFILL_BUFFERS
from mobile.runtime.attach_plan import AttachOptions, AttachPlan, plan_attach
from mobile.runtime.attachment import install
from mobile.runtime.engine import Engine
from mobile.store import DiskStore, ExpertLayout, HostStore, Store, Weights
from mobile.suggest import offer
from suites.families import BY_GEOMETRY

LEFT_FREE = 2 * 2**30  # of host memory: for this process beside the store
GIB = 2**30
SHRUNK_VOCABULARY = 1024
WIDTHS = (  # what a shrunk configuration has less of; heads keep their number
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "head_dim",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)


def config_of(geometry: str, layers: int | None = None, shrink: int = 1) -> Any:
    """Return the real model's configuration, with so many MoE layers (None: all of them).

    `shrink` divides every width, for tests: the same layers, experts and top-k, and the same code. Raise Refused for
    an unknown geometry, or more layers than it has.
    """
    if geometry not in BY_GEOMETRY:
        raise Refused(f"Unknown geometry {geometry!r}; {offer(geometry, sorted(BY_GEOMETRY))}.")
    real = GEOMETRIES[geometry].moe_layers
    layers = real if layers is None else layers
    if not 1 <= layers <= real:
        raise Refused(f"{geometry} has {real} MoE layers; {layers} of them cannot be made.")
    family = BY_GEOMETRY[geometry]
    fields = family.published
    if shrink < 1 or any(fields[name] % shrink for name in WIDTHS if name in fields):
        raise Refused(f"The widths of {geometry} cannot be divided by {shrink}; take a power of two, like 16.")
    dense = fields["num_hidden_layers"] - real
    narrow = {name: fields[name] // shrink for name in WIDTHS if name in fields} if shrink > 1 else {}
    small = {"vocab_size": SHRUNK_VOCABULARY} if shrink > 1 else {}
    ends = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}  # a script ends when it ends
    return family.config_class(**{**fields, **narrow, **small, **ends, "num_hidden_layers": dense + layers})


def layers_that_fit(geometry: str, shrink: int = 1, dtype: torch.dtype = torch.bfloat16, rows: str = "as-is") -> int:
    """Return the largest number of MoE layers whose experts fit the host memory that is free now.

    Raise Refused where not one does.
    """
    *_, layout = _empty(config_of(geometry, 1, shrink), dtype, rows)
    real = GEOMETRIES[geometry]
    usable = host().usable_nbytes
    if usable is None:
        return real.moe_layers
    layers = (usable - LEFT_FREE) // (real.experts * layout.nbytes)
    if layers < 1:
        raise Refused(
            f"One layer of {geometry} takes {real.experts * layout.nbytes / GIB:.1f} GiB of host memory and "
            f"{usable / GIB:.1f} GiB are free, of which {LEFT_FREE / GIB:.0f} are left alone; use a machine with more."
        )
    return min(layers, real.moe_layers)


@dataclass(frozen=True)
class Synthetic:
    """A model whose experts lie in `store` and nowhere else, to be attached again and again.

    `geometry` are the sizes of what was made, under the real one's name; `real_layers` how many MoE layers that has.
    """

    model: Any
    layers: list[compat.MoeLayer]
    layout: ExpertLayout
    store: Store
    geometry: Geometry
    real_layers: int

    @property
    def device(self) -> torch.device:
        return compat.device_of(self.layers)

    @contextmanager
    def attached(self, strategy: str | Strategy, *, poison: bool = False, **keywords: Any) -> Iterator[Engine]:
        """Serve the model by an engine inside the block, as `mobile.attach` does it; keywords are AttachOptions'.

        Afterwards the experts are still in the store: they are never given back to the modules. Raise Refused for
        whatever attach refuses, or if the device has no room for the slots.
        """
        options = AttachOptions(strategy, **keywords)
        plan = plan_attach(self.model, self.layers, self.layout, self.device, options)
        plan = replace(plan, native=self.geometry, charged=self.geometry)
        self._refuse_full(plan)
        install(self.model, self.layers, self.store, plan, poison=poison)
        engine: Engine = self.model.mobile
        try:
            yield engine
        finally:
            engine.uninstall(give_back=False)
            _let_go(self.device)

    def _refuse_full(self, plan: AttachPlan) -> None:
        if self.device.type != "cuda":
            return
        _let_go(self.device)
        need, free = (plan.slots + PREFILL_BUFFERS) * self.layout.nbytes, torch.cuda.mem_get_info(self.device)[0]
        if need > free:
            raise Refused(
                f"{plan.slots} slots for {plan.strategy.name} take {need / GIB:.1f} GiB and {self.device} has "
                f"{free / GIB:.1f} GiB free; give fewer slots, fewer layers or a larger card."
            )


def make(
    geometry: str,
    *,
    layers: int | None = None,
    shrink: int = 1,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    folder: Path | None = None,
    rows: str = "as-is",
) -> Synthetic:
    """Make the model; `layers` None makes as many MoE layers as host memory holds. `rows` is the experts' row format.

    With `folder` the experts lie in a file there, which has no name and goes with the process; then `layers` None makes
    all of them. Raise Refused for an unknown geometry, too many layers, or too little host memory or disk.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if folder is None:
        fit = layers_that_fit(geometry, shrink, dtype, rows)
        if layers is not None and layers > fit:
            config_of(geometry, layers)
            raise Refused(f"The free host memory holds {fit} layers of {geometry} and not {layers}; ask for less.")
        layers = layers or fit
    config = config_of(geometry, layers, shrink)
    empty, described, layout = _empty(config, dtype, rows)
    torch.manual_seed(seed)
    model = _dense(config, dtype, torch.device(device))
    made = compat.moe_layers(model)
    store: Store
    if folder is None:
        store = HostStore(layout, len(made), made[0].count)
    else:
        layout = layout.page_aligned()
        store = DiskStore(layout, len(made), made[0].count, folder / f"{geometry}.safetensors")
    _fill(store, len(made), made[0].count)
    if torch.device(device).type == "cuda" and isinstance(store, HostStore):
        page_lock(store.rows, torch.device(device), [])  # once, for every engine that is to serve them
    name = geometry if shrink == 1 else f"{geometry} shrunk {shrink} times"
    sizes = replace(compat.geometry_of(empty, described, layout), name=name)
    return Synthetic(model, made, layout, store, sizes, GEOMETRIES[geometry].moe_layers)


def _empty(config: Any, dtype: torch.dtype, rows: str = "as-is") -> tuple[Any, list[compat.MoeLayer], ExpertLayout]:
    """Return the model on the meta device, its MoE layers, and the layout of their experts."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    layers = compat.moe_layers(model)
    return model, layers, compat.packed_layout(compat.common_layout(layers), layers, rows)


def _dense(config: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Return the model on the device, initialised by Transformers; its experts are empty placeholders."""
    model, layers, _ = _empty(config, dtype)
    for layer in layers:
        for name in compat.weight_names(layer.experts):
            setattr(layer.experts, name, nn.Parameter(torch.empty(0, dtype=dtype, device="meta"), requires_grad=False))
            getattr(layer.experts, name)._is_hf_initialized = True
        layer.experts._is_hf_initialized = True
    model.to_empty(device=device)
    model.initialize_weights()
    with torch.no_grad():
        for layer in layers:
            nn.init.eye_(layer.router.weight.zero_())
        head = model.get_output_embeddings().weight
        head[:, 0] = 0
        head[0, 0] = 1
    return model.requires_grad_(False).eval()


def _fill(store: Store, layers: int, experts: int) -> None:
    """Fill the store with one random expert, whose parts are rotated for each other one by a number of its own."""
    layout = store.layout
    like = {field.name: torch.empty(1, *field.shape).normal_(0, 0.02) for field in layout.fields}
    base = layout.views(torch.zeros(1, layout.numel, dtype=layout.dtype))
    for name, weights in base.items():
        weights.copy_(like[name])
    for layer in range(layers):
        for name, one in base.items():
            parts, target = _parts(one), _parts(store.weights(layer, name))
            for part, values in parts.items():
                for expert in range(experts):
                    turned = values[0].flatten().roll(-(layer * experts + expert) * 65)
                    target[part][expert].copy_(turned.view(values.shape[1:]))
        store.complete(layer)
    store.finish()


def _parts(weights: Weights) -> Mapping[str, torch.Tensor]:
    """Return the tensors that weights consist of in their rows."""
    return {"": weights} if isinstance(weights, torch.Tensor) else weights.parts


def _let_go(device: torch.device) -> None:
    """Give unused device memory back, so that the next engine's slots find it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

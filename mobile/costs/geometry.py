"""Geometries: layers, experts and bytes of a model, which decide what it costs. Arithmetic only, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mobile.costs.rows import AS_IS, check_rows, packed_nbytes
from mobile.errors import Refused
from mobile.suggest import offer


@dataclass(frozen=True)
class Geometry:
    """A model's sizes, in bytes of the dtype it is stored in.

    `moe_layers`, `experts` (routed, per layer), `top_k`, `expert_nbytes` (one routed expert, as copied),
    `dense_nbytes` (everything else a token reads per MoE layer: attention, norms, router, shared experts;
    dense layers spread evenly), `router_nbytes` (per layer, part of the dense bytes), `head_nbytes` (output
    projection), `embedding_nbytes` (held on the device, one row read per token), `weight_nbytes` (bytes of one weight
    that is computed with). `expert_outputs` are the output rows of one expert's matrices together, None where unknown.
    `rows` is the experts' row format; `expert_weights`, their number of weights, is None where rows are as they are.
    `kv_nbytes_per_token`, a token's keys and values in all layers, is None where unknown; no comparison looks at it.
    """

    name: str
    moe_layers: int
    experts: int
    top_k: int
    expert_nbytes: int
    dense_nbytes: int
    router_nbytes: int
    head_nbytes: int
    embedding_nbytes: int
    weight_nbytes: int
    expert_outputs: int | None = None
    rows: str = AS_IS
    expert_weights: int | None = None
    kv_nbytes_per_token: int | None = field(default=None, compare=False)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Geometry:
        """Return the geometry that `as_record` wrote. Raise TypeError for others, KeyError for too few."""
        return cls(**{name: value for name, value in record.items() if name != "width"}, weight_nbytes=record["width"])

    def as_record(self) -> dict[str, Any]:
        """Return its fields as traces, records and `--json` write them, where `weight_nbytes` is called `width`."""
        fields = asdict(self) | {"width": self.weight_nbytes}
        del fields["weight_nbytes"]
        for name, unset in (
            ("expert_outputs", None),
            ("rows", AS_IS),
            ("expert_weights", None),
            ("kv_nbytes_per_token", None),
        ):
            if fields[name] == unset:
                del fields[name]
        return fields

    @property
    def decoded_expert_nbytes(self) -> int:
        """Return the bytes of one routed expert's weights as they are computed with."""
        return self.expert_nbytes if self.expert_weights is None else self.expert_weights * self.weight_nbytes

    def with_rows(self, rows: str) -> Geometry:
        """Return the model with its experts' matrices in a row format; itself for "as-is".

        Biases, which are a small part of an expert, are counted as matrices. Raise Refused for an unknown format, for
        experts that are packed already in another one, and where the experts' shapes are not known.
        """
        if check_rows(rows) in (AS_IS, self.rows):
            return self
        if self.rows != AS_IS:
            raise Refused(f"The experts of {self.name} lie in {self.rows} already; take it as it is.")
        if self.expert_outputs is None:
            raise Refused(
                f"Nothing says what shapes the experts of {self.name} have; name a geometry, or record again."
            )
        weights = self.expert_nbytes // self.weight_nbytes
        nbytes = packed_nbytes(rows, weights, self.expert_outputs, self.weight_nbytes)
        return replace(self, expert_nbytes=nbytes, rows=rows, expert_weights=weights)

    @property
    def little_k(self) -> int:
        """Return the experts that a little pass runs per layer: half of the top-k."""
        return max(1, self.top_k // 2)

    @property
    def total_experts(self) -> int:
        """Return the number of routed experts in the whole model."""
        return self.moe_layers * self.experts

    @property
    def experts_nbytes(self) -> int:
        """Return the bytes of all routed experts, as copied."""
        return self.total_experts * self.expert_nbytes

    @property
    def resident_nbytes(self) -> int:
        """Return the bytes that always stay on the device."""
        return self.moe_layers * self.dense_nbytes + self.head_nbytes + self.embedding_nbytes

    def device_nbytes(self, slots: int) -> int:
        """Return the bytes of what always stays on the device and of so many slots, prefill buffers among them."""
        return self.resident_nbytes + slots * self.expert_nbytes

    def on_demand_ceiling(self, link_gb_per_s: float) -> float:
        """Return the most tokens per second without a cache: bandwidth over the bytes of one token's experts."""
        return link_gb_per_s * 1e9 / (self.moe_layers * self.top_k * self.expert_nbytes)


@dataclass(frozen=True)
class _Configuration:
    """The numbers of a published bf16 model's config.json. `attention` counts its weights per layer.

    `kv` are the numbers that a layer's cache holds of a token: 2 x KV heads x head dimension, or of MLA, which
    Transformers caches compressed, the latent and the rotated key.
    Of its `layers` the first `dense_layers` have a dense MLP of `dense_mlp` features instead of experts. `intermediate`
    are the features of a routed expert, `shared` those of all shared experts of a layer.
    """

    name: str
    layers: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    attention: int
    kv: int
    vocabulary: int
    dense_layers: int = 0
    dense_mlp: int = 0
    shared: int = 0

    def geometry(self) -> Geometry:
        """Return the sizes in bytes that follow."""
        moe_layers, hidden = self.layers - self.dense_layers, self.hidden
        router = self.experts * hidden
        dense = self.layers * self.attention
        dense += moe_layers * (router + 3 * hidden * self.shared)
        dense += self.dense_layers * 3 * hidden * self.dense_mlp
        return Geometry(
            name=self.name,
            moe_layers=moe_layers,
            experts=self.experts,
            top_k=self.top_k,
            expert_nbytes=2 * 3 * hidden * self.intermediate,
            dense_nbytes=2 * dense // moe_layers,
            router_nbytes=2 * router,
            head_nbytes=2 * hidden * self.vocabulary,
            embedding_nbytes=2 * hidden * self.vocabulary,
            weight_nbytes=2,
            expert_outputs=2 * self.intermediate + hidden,
            kv_nbytes_per_token=2 * self.layers * self.kv,
        )


# Sizes from the models' published config.json files; norms and biases (below 0.1 %) are left out.
GEOMETRIES: Mapping[str, Geometry] = {
    published.name: published.geometry()
    for published in (
        _Configuration(
            name="olmoe-1b-7b",
            layers=16,
            experts=64,
            top_k=8,
            hidden=2048,
            intermediate=1024,
            attention=4 * 2048 * 2048,
            kv=2 * 16 * 128,
            vocabulary=50304,
        ),
        _Configuration(
            name="qwen1.5-moe-a2.7b",
            layers=24,
            experts=60,
            top_k=4,
            hidden=2048,
            intermediate=1408,
            attention=4 * 2048 * 2048,
            kv=2 * 16 * 128,
            shared=5632,
            vocabulary=151936,
        ),
        _Configuration(
            # MLA: query 16 x 192, compressed key-value 512 + 64, its expansion to 16 x (128 + 128), output 16 x 128.
            name="deepseek-v2-lite",
            layers=27,
            dense_layers=1,
            experts=64,
            top_k=6,
            hidden=2048,
            intermediate=1408,
            attention=2048 * 3072 + 2048 * 576 + 512 * 4096 + 2048 * 2048,
            kv=512 + 64,
            shared=2816,
            dense_mlp=10944,
            vocabulary=102400,
        ),
        _Configuration(
            name="qwen3-30b-a3b",
            layers=48,
            experts=128,
            top_k=8,
            hidden=2048,
            intermediate=768,
            attention=2 * 2048 * 4096 + 2 * 2048 * 512,
            kv=2 * 4 * 128,
            vocabulary=151936,
        ),
    )
}


def project(native: Geometry, name: str | None, rows: str = AS_IS) -> tuple[Geometry, tuple[tuple[int, ...], ...]]:
    """Return the geometry to compute time for, and for each of the model's MoE layers those charged with its routing.

    Its experts lie in the row format `rows`; "as-is" is that of the native model, or of the preset.
    `name` None is the model's native geometry. A preset's layers are dealt out evenly and in order, so the routing of a
    4-layer model is charged to layers 0-3, 4-7, 8-11 and 12-15 of a 16-layer one. Raise Refused for an unknown preset,
    one of other experts or top-k, or one of fewer layers than the model.
    """
    if name is None:
        return native.with_rows(rows), tuple((layer,) for layer in range(native.moe_layers))
    if name not in GEOMETRIES:
        raise Refused(f"Unknown geometry {name!r}; {offer(name, sorted(GEOMETRIES))}.")
    charged = GEOMETRIES[name].with_rows(rows)
    if (charged.experts, charged.top_k) != (native.experts, native.top_k) or charged.moe_layers < native.moe_layers:
        raise Refused(
            f"Geometry {name} has {charged.moe_layers} layers of {charged.experts} experts, top {charged.top_k}; this "
            f"model has {native.moe_layers} of {native.experts}, top {native.top_k}, and cannot stand for it."
        )
    owner = [layer * native.moe_layers // charged.moe_layers for layer in range(charged.moe_layers)]
    return charged, tuple(
        tuple(layer for layer in range(charged.moe_layers) if owner[layer] == mine) for mine in range(native.moe_layers)
    )


def slots_for(
    geometry: Geometry, memory_nbytes: int, reserve_nbytes: int, prefill_buffers: int, reserve: str | None = None
) -> int:
    """Return the expert slots that fit beside the resident weights, the reserve and the prefill buffers.

    Never more than the model has experts. Raise Refused when fewer than `top_k` slots fit; `reserve` are the words for
    the reserve. `mobile.costs.memory.divide` gives the parts.
    """
    left = memory_nbytes - reserve_nbytes - geometry.resident_nbytes
    slots = left // geometry.expert_nbytes - prefill_buffers
    if slots < geometry.top_k:
        need = reserve_nbytes + geometry.resident_nbytes + (geometry.top_k + prefill_buffers) * geometry.expert_nbytes
        kept = reserve or f"the reserve of {reserve_nbytes / 2**20:,.0f} MiB"
        raise Refused(
            f"A budget of {memory_nbytes / 2**20:,.0f} MiB cannot hold {geometry.name}: its dense weights, {kept} and "
            f"{geometry.top_k} + {prefill_buffers} expert slots need {need / 2**20:,.0f} MiB."
        )
    return min(slots, geometry.total_experts)

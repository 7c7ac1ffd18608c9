"""The division of a memory budget: dense weights, KV cache, workspace, CUDA context, prefill buffers, expert slots.

`load`, `attach`, `mobile plan` and the suites share it. Arithmetic only, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from mobile.costs.geometry import Geometry, slots_for
from mobile.costs.rows import AS_IS
from mobile.errors import Refused

MIB = 2**20
CONTEXT_TOKENS = 4096  # counted for unless stated: all that OLMoE can read, by its configuration
CONTEXT_NBYTES = 512 * MIB  # most that PyTorch's CUDA context and loaded kernels are taken to hold (assumed)
WORKSPACE_NBYTES = 256 * MIB  # cuBLAS's workspaces, and what the allocator rounds up or cannot use (assumed)
# A card within this share of a stated size is of that nominal size: of one of 16 GB 15,816 MiB are reported, of one of
# 8 GB 7.6 GiB (sources in profiles.toml).
NEAR_MEMORY = 0.06


@dataclass(frozen=True)
class KvLayer:
    """One layer's part of the cache: bytes a token, and bytes at any length, which are recurrent states.

    A sliding window saves nothing of the most that is held: after a prompt the layer keeps a view of all its tokens,
    which goes with the next step.
    """

    nbytes_per_token: int
    fixed_nbytes: int = 0

    def nbytes(self, tokens: int) -> int:
        """Return the bytes after a prompt of so many tokens."""
        return tokens * self.nbytes_per_token + self.fixed_nbytes


@dataclass(frozen=True)
class KvCache:
    """The cache of keys and values that Transformers keeps of one sequence, a part for each attention layer."""

    layers: tuple[KvLayer, ...]

    @classmethod
    def of(cls, geometry: Geometry) -> KvCache:
        """Return the cache of a geometry that knows its bytes a token. Raise Refused for one that does not."""
        if geometry.kv_nbytes_per_token is None:
            raise Refused(f"Nothing says how large the KV cache of {geometry.name} is; leave context_tokens out.")
        return cls((KvLayer(-(-geometry.kv_nbytes_per_token // geometry.moe_layers)),) * geometry.moe_layers)

    def nbytes(self, tokens: int) -> int:
        """Return the bytes after a prompt of so many tokens."""
        return sum(layer.nbytes(tokens) for layer in self.layers)

    def peak_nbytes(self, tokens: int) -> int:
        """Return the most bytes on the way there: `DynamicCache` appends by `cat`, which holds a layer twice."""
        return self.nbytes(tokens) + max((layer.nbytes(tokens) for layer in self.layers), default=0)


@dataclass(frozen=True)
class Reserve:
    """The part of a budget that is neither weights nor slots: the CUDA context, the workspace, and the KV cache.

    `context_tokens` is the number of tokens that the cache and the workspace are counted for. It is None where the
    number is a hardware profile's `reserve_nbytes`, which says all three at once: then it all stands as the workspace.
    """

    context_nbytes: int
    workspace_nbytes: int
    cache_nbytes: int
    context_tokens: int | None

    @classmethod
    def of_profile(cls, reserve_nbytes: int) -> Reserve:
        """Return a profile's reserve, as it stands: it is not counted for a number of tokens."""
        return cls(0, reserve_nbytes, 0, None)

    @property
    def nbytes(self) -> int:
        """Return all of it."""
        return self.context_nbytes + self.workspace_nbytes + self.cache_nbytes

    def __str__(self) -> str:
        if self.context_tokens is None:
            return f"the reserve of {self.nbytes / MIB:,.0f} MiB"
        cache = f"{self.cache_nbytes / MIB:,.0f} for the KV cache of {self.context_tokens:,} tokens"
        return f"the reserve of {self.nbytes / MIB:,.0f} MiB (of it {cache})"


def reserve_for(
    geometry: Geometry, cache: KvCache, context_tokens: int = CONTEXT_TOKENS, context_nbytes: int = CONTEXT_NBYTES
) -> Reserve:
    """Return what to keep back for a sequence of so many tokens. Raise Refused unless that is a positive number.

    The workspace holds what the link measures itself with, an expert, and where experts are packed a decoded one.
    """
    if isinstance(context_tokens, bool) or not isinstance(context_tokens, int) or context_tokens < 1:
        raise Refused(
            f"A sequence has a token at least, and context_tokens is {context_tokens!r}; give a whole number."
        )
    workspace = WORKSPACE_NBYTES + prefill_nbytes(geometry, context_tokens) + geometry.expert_nbytes
    if geometry.rows != AS_IS:
        workspace += geometry.decoded_expert_nbytes
    return Reserve(context_nbytes, workspace, cache.peak_nbytes(context_tokens), context_tokens)


def prefill_nbytes(geometry: Geometry, tokens: int) -> int:
    """Return a bound of what the activations of a prompt of so many tokens take at once.

    One layer's, none freed: an output for each row of its dense matrices (attention, shared experts) and of an expert
    that every token chooses, and four hidden states; and one position's logits, in fp32 twice. Logits of all positions,
    which a caller of `forward` may ask for, are left out, and so is the mask of a batch with padding.
    """
    width = geometry.weight_nbytes
    hidden = max(1, geometry.router_nbytes // (geometry.experts * width))
    dense = geometry.dense_nbytes // (hidden * width)
    outputs = geometry.expert_outputs or geometry.decoded_expert_nbytes // (hidden * width)
    logits = geometry.head_nbytes // hidden
    return tokens * width * (dense + outputs + 4 * hidden) + logits + 8 * logits // width


@dataclass(frozen=True)
class Division:
    """A budget divided: its parts in bytes add up to `memory_nbytes` at most."""

    memory_nbytes: int
    dense_nbytes: int
    reserve: Reserve
    staging_nbytes: int
    slots: int
    slots_nbytes: int

    @classmethod
    def of(cls, geometry: Geometry, memory_nbytes: int, reserve: Reserve, prefill_buffers: int, slots: int) -> Division:
        """Return the division that has so many slots."""
        return cls(
            memory_nbytes=memory_nbytes,
            dense_nbytes=geometry.resident_nbytes,
            reserve=reserve,
            staging_nbytes=prefill_buffers * geometry.expert_nbytes,
            slots=slots,
            slots_nbytes=slots * geometry.expert_nbytes,
        )

    @property
    def used_nbytes(self) -> int:
        """Return the sum of all parts."""
        return self.dense_nbytes + self.reserve.nbytes + self.staging_nbytes + self.slots_nbytes


def divide(geometry: Geometry, memory_nbytes: int, reserve: Reserve, prefill_buffers: int) -> Division:
    """Divide a budget; what the other parts leave are slots, at most one for each expert.

    Raise Refused where one token's experts do not fit.
    """
    slots = slots_for(geometry, memory_nbytes, reserve.nbytes, prefill_buffers, str(reserve))
    return Division.of(geometry, memory_nbytes, reserve, prefill_buffers, slots)

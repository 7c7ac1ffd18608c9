"""A cache of recently used experts (the cache half of Eliseev and Mazur, arXiv 2312.17238).

Lossless. Changed: one pool for all layers instead of an equal share for each, and no prefetch (that half is a
strategy of its own). Claimed there, with 2- to 3-bit experts and the prefetch: 2 to 3 tokens/s for
Mixtral-8x7B on small GPUs.
"""

from mobile.policies import Geometry, Strategy


def _one_token(geometry: Geometry) -> int:
    """Return the experts of one token: with fewer slots LRU evicts each just before its next use."""
    return min(geometry.total_experts, geometry.moe_layers * geometry.top_k)


LRU = Strategy(
    name="lru",
    summary="keep recently used experts, evict the least recently used",
    source="Eliseev and Mazur, arXiv 2312.17238 (2023)",
    lossless=True,
    retain="some",
    min_slots=_one_token,
)

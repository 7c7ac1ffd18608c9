"""MoBiLE itself (arXiv 2510.12357): half the experts first, all of them if the output was unsure."""

from __future__ import annotations

from mobile.costs.geometry import Geometry
from mobile.policies.strategy import BigLittle, Strategy


def _little_set_and_one_layer(geometry: Geometry) -> int:
    """Return the slots of the little pass's experts, which stay until the token is accepted, and one full layer."""
    return min(geometry.total_experts, geometry.moe_layers * geometry.little_k + geometry.top_k)


MOBILE = Strategy(
    name="mobile",
    summary="K/2 experts first; below gamma, roll back and run K, prefetching what the little pass's routers name",
    source="Zhao et al., MoBiLE, arXiv 2510.12357 (2025)",
    lossless=False,
    gating=BigLittle(),
    retain="some",
    prefetch_on_fallback=True,
    min_slots=_little_set_and_one_layer,
)

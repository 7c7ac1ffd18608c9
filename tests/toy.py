"""A model of three small MoE layers on the default card: the least that caches, links and clocks are told apart on."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from mobile.costs.geometry import Geometry
from mobile.costs.hardware import profile
from mobile.replay.trace import Step

LAYERS, EXPERTS, TOP_K = 3, 12, 4
GEOMETRY = Geometry(
    name="toy",
    moe_layers=LAYERS,
    experts=EXPERTS,
    top_k=TOP_K,
    expert_nbytes=10_000_000,
    dense_nbytes=20_000_000,
    router_nbytes=50_000,
    head_nbytes=1_000_000,
    embedding_nbytes=1_000_000,
    weight_nbytes=2,
)
STANDS_FOR = tuple((layer,) for layer in range(LAYERS))
CARD = profile("auto")
# The same without a host that runs ahead: it launches, computes and copies in turn, as a processor does.
IN_TURN = replace(
    CARD, name="in turn", launch_seconds=4e-6, **{f"host_{name}_seconds": 0.0 for name in ("launch", "copy", "read")}
)
PREFILL = Step("prefill", 5, (tuple(range(EXPERTS)),) * LAYERS, ((2,) * EXPERTS,) * LAYERS)
chosen = st.sets(st.integers(0, EXPERTS - 1), min_size=TOP_K, max_size=TOP_K).map(lambda s: tuple(sorted(s)))

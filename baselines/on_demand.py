"""Plain offloading: every active expert is copied when the router names it, and dropped when its layer is done.

The paper's baseline is "naive offloading" of an unstated flavour, so both are here and both are reported:
`on-demand` copies and computes in turn; `on-demand-overlap` copies the next expert while one computes.
Lossless. Nothing changed; no numbers are claimed for it.
"""

from mobile.policies import Strategy

ON_DEMAND = Strategy(
    name="on-demand",
    summary="copy, wait, compute, one expert after another; nothing is kept",
    source="the common baseline of the offloading literature, serial flavour",
    lossless=True,
    overlap=False,
)
ON_DEMAND_OVERLAP = Strategy(
    name="on-demand-overlap",
    summary="copy the next expert while one computes; nothing is kept",
    source="the common baseline of the offloading literature, double-buffered flavour",
    lossless=True,
)

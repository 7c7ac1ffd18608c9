"""Half the experts for every decode token: MoBiLE's little pass without a fallback.

Lossy: this is the speed MoBiLE would reach if every token were unimportant, and the accuracy it would fall to.
Prefill runs with all K, and slots, cache and overlap are MoBiLE's, so that the fallback is the only difference.
"""

from dataclasses import replace

from mobile.policies import MOBILE, HalfK

STATIC_HALF = replace(
    MOBILE,
    name="static-half",
    summary="decode with the router's top K/2 and MoBiLE's cache; never fall back",
    source="the ablation of MoBiLE's fallback",
    gating=HalfK(),
    prefetch_on_fallback=False,
)

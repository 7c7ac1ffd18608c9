"""Everything that a strategy's author imports, and the strategies that are installed. No torch.

`strategy` describes one, `protocols` are the policies it may bring, `next_logits` what a lookahead predicts from.
"""

from mobile.costs.cost_model import CostModel
from mobile.costs.geometry import Geometry
from mobile.ledger import Key
from mobile.policies.big_little import MOBILE
from mobile.policies.cached_choice import Chooser, Chosen, Routed
from mobile.policies.next_logits import NextLayerLogits, predicting_layer, top_experts
from mobile.policies.protocols import (
    BatchEviction,
    Eviction,
    IdlePrefetcher,
    LayerMap,
    LeastRecentlyUsed,
    Lookahead,
    PassObserver,
    Placement,
    PolicyContext,
    Trainable,
    Training,
    Visit,
)
from mobile.policies.strategy import (
    BigLittle,
    CachedBigLittle,
    CachedRouting,
    CustomRouting,
    FullK,
    HalfK,
    Strategy,
)
from mobile.slots import SlotPool

__all__ = [
    "MOBILE",
    "BatchEviction",
    "BigLittle",
    "CachedBigLittle",
    "CachedRouting",
    "Chooser",
    "Chosen",
    "CostModel",
    "CustomRouting",
    "Eviction",
    "FullK",
    "Geometry",
    "HalfK",
    "IdlePrefetcher",
    "Key",
    "LayerMap",
    "LeastRecentlyUsed",
    "Lookahead",
    "NextLayerLogits",
    "PassObserver",
    "Placement",
    "PolicyContext",
    "Routed",
    "SlotPool",
    "Strategy",
    "Trainable",
    "Training",
    "Visit",
    "predicting_layer",
    "top_experts",
]

"""The oracle: every expert on the device, nothing offloaded. Lossless, and the ceiling of every other row."""

from mobile.policies import Geometry, Strategy


def _all(geometry: Geometry) -> int:
    return geometry.total_experts


RESIDENT = Strategy(
    name="resident",
    summary="every expert on the device; nothing is ever copied",
    source="the model as it is, had the card room for it",
    lossless=True,
    retain="everything",
    min_slots=_all,
)

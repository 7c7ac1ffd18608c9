"""No offloading: every expert on the device. Lossless, and the upper bound of the speed of all others.

Nothing changed: it is the model as published, and no numbers are claimed for it.
"""

from mobile.policies import Geometry, Strategy


def _all(geometry: Geometry) -> int:
    """Return the slots of all experts."""
    return geometry.total_experts


RESIDENT = Strategy(
    name="resident",
    summary="every expert on the device; nothing is ever copied",
    source="the model as it is, had the card room for it",
    lossless=True,
    retain="everything",
    min_slots=_all,
)

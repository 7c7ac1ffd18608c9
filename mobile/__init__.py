"""Run a Mixture-of-Experts model that does not fit in GPU memory.

    model = mobile.load("path/or/hub-id", strategy="mobile", memory="8GiB")
    model = mobile.attach(model, strategy="on-demand", slots=64)
    model.mobile.stats(); model.mobile.ledger; mobile.detach(model); mobile.strategies()

The functions import torch when first used, so that traces replay and budgets are computed without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mobile.errors import Refused
from mobile.policies.strategy import Strategy, strategies

if TYPE_CHECKING:
    from mobile.checkpoints.loading import load
    from mobile.runtime.attachment import attach, detach

    __version__: str

__all__ = ["Refused", "Strategy", "__version__", "attach", "detach", "load", "strategies"]


def __getattr__(name: str) -> Any:
    if name in ("attach", "detach"):
        from mobile.runtime import attachment

        return getattr(attachment, name)
    if name == "load":
        from mobile.checkpoints.loading import load

        return load
    if name == "__version__":
        from mobile.version import this_version

        return this_version()
    raise AttributeError(f"module 'mobile' has no attribute {name!r}")

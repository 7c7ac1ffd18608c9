"""Decode steps of an attached model with every expert resident, timed at several depths."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from mobile.costs.geometry import Geometry
from mobile.links.registry import real_time_link
from mobile.live_model import compat
from mobile.machine.fit_profile import Depth
from mobile.machine.measure.random_model import random_model
from mobile.machine.measure.sizes import Sizes
from mobile.machine.measure.timing import idle, of_rounds
from mobile.policies.strategy import Strategy
from mobile.runtime.attachment import attach

EVERYTHING = Strategy(
    name="everything-resident", summary="nothing is copied", source="calibration", lossless=True, retain="everything"
)


@torch.no_grad()
def time_steps(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> tuple[Geometry, tuple[Depth, ...]]:
    """Return the sizes of the model's layers, and the seconds of a decode step at each of `sizes.depths`.

    A time is the median over `sizes.tokens` steps, of which `of_rounds` is taken; generate() is not in it.
    """
    # 1. One model of the largest depth, attached: shallower ones run its first layers.
    width = sizes.widths[len(sizes.widths) // 2]
    model = random_model(device, dtype, max(sizes.depths), sizes.hidden, width, sizes.experts, sizes.top_k)
    attach(model, EVERYTHING, slots=max(sizes.depths) * sizes.experts, link=real_time_link(device.type))
    geometry = model.mobile.geometry
    # 2. A prompt (1, 8) fills the cache and the slots; then the same token (1, 1) is decoded again and again.
    prompt, token = torch.arange(3, 11, device=device)[None], torch.tensor([[7]], device=device)
    medians: dict[int, list[float]] = {depth: [] for depth in sizes.depths}
    try:
        for _ in range(sizes.repeats + 1):
            for depth in sizes.depths:  # in turn, so that a busy machine slows all
                model.config.num_hidden_layers = depth
                cache = compat.going_on(model, compat.cache_of(model(prompt, use_cache=True)))
                model(token, **cache)
                medians[depth].append(
                    statistics.median(_step_seconds(model, token, cache) for _ in range(sizes.tokens))
                )
    finally:
        model.mobile.uninstall(give_back=False)
    # 3. The first round loads the experts, and is not counted.
    return geometry, tuple(Depth(depth, of_rounds(rounds[1:], sizes)) for depth, rounds in medians.items())


def _step_seconds(model: Any, token: torch.Tensor, cache: dict[str, Any]) -> float:
    """Return the seconds of one step, from an idle device to an idle device."""
    idle(token.device)
    begun = time.perf_counter()
    model(token, **cache)
    idle(token.device)
    return time.perf_counter() - begun

"""The cost model: nanoseconds of a copy, a layer, an expert, by a roofline plus kernel launches.

It is all that virtual time is computed from.
"""

from __future__ import annotations

from functools import cache

from mobile.costs.geometry import Geometry
from mobile.costs.hardware import HardwareProfile
from mobile.costs.rows import AS_IS, OWN_ROW_COSTS, ROW_COSTS

# Kernel launches of an eager step, counted from the layer's operations: attention block, norms, router and
# top-k; one expert's two products and gate; final norm, head and softmax.
DENSE_LAUNCHES, EXPERT_LAUNCHES, HEAD_LAUNCHES, ROUTER_LAUNCHES = 20, 4, 4, 3


class CostModel:
    """Integer nanoseconds of each thing that a run does, for one geometry on one profile.

    A step costs max(bytes / memory bandwidth, flops / peak) plus its launches, a layer and a pass also what was
    measured of them beyond that (`layer_seconds`, `step_seconds`; with the head). Attention over the KV cache is
    left out: at the suite's few hundred positions it is under 5 % of the dense bytes. With `in_place` packed rows are
    multiplied as they are, and not decoded first.
    """

    def __init__(self, profile: HardwareProfile, geometry: Geometry, *, in_place: bool = False) -> None:
        self.profile, self.geometry = profile, geometry
        self.load_ns = round(
            (profile.link_latency_seconds + geometry.expert_nbytes / (profile.link_gb_per_s * 1e9)) * 1e9
        )
        self.dense_ns = cache(
            lambda tokens: self._step(geometry.dense_nbytes, tokens, DENSE_LAUNCHES, profile.layer_seconds)
        )
        self.expert_ns = cache(self._expert)
        self.head_ns = cache(
            lambda tokens: self._step(geometry.head_nbytes, tokens, HEAD_LAUNCHES, profile.step_seconds)
        )
        self.cpu_expert_ns = cache(self._on_cpu)
        self.router_replay_ns = geometry.moe_layers * self._step(geometry.router_nbytes, 1, ROUTER_LAUNCHES)
        # What one expert reads and writes: its row, and where that is packed the decoded weights as often as they go
        # through memory. The scratch memory is that of the processor or the card, and no cache is counted on.
        rows = AS_IS if in_place else geometry.rows
        decoding = (ROW_COSTS | OWN_ROW_COSTS).get(rows, ROW_COSTS[AS_IS])
        self._expert_nbytes = geometry.expert_nbytes + decoding.scratch_passes * geometry.decoded_expert_nbytes
        self._expert_launches = EXPERT_LAUNCHES + decoding.launches
        self._expert_weights = geometry.decoded_expert_nbytes / geometry.weight_nbytes

    def _expert(self, tokens: int) -> int:
        """Return the time of one expert on the device, decoded first where its row is packed."""
        return self._roofline(self._expert_nbytes, self._expert_weights, tokens, self._expert_launches)

    def _on_cpu(self, tokens: int) -> int:
        """Return the time of one expert on the CPU, its inputs and its outputs copied at the link's latency each."""
        profile = self.profile
        reading = self._expert_nbytes / (profile.cpu_gb_per_s * 1e9)
        computing = 2 * self._expert_weights * tokens / (profile.cpu_tflops * 1e12)
        return round((max(reading, computing) + 2 * profile.link_latency_seconds) * 1e9)

    def _step(self, nbytes: int, tokens: int, launches: int, beyond_seconds: float = 0.0) -> int:
        """Return the time of reading `nbytes` of weights and multiplying `tokens` with them, launches included."""
        return self._roofline(nbytes, nbytes / self.geometry.weight_nbytes, tokens, launches, beyond_seconds)

    def _roofline(self, nbytes: int, weights: float, tokens: int, launches: int, beyond_seconds: float = 0.0) -> int:
        """Return the time of moving `nbytes` and multiplying `tokens` with `weights`, launches included."""
        reading = nbytes / (self.profile.memory_gb_per_s * 1e9)
        computing = 2 * weights * tokens / (self.profile.tflops * 1e12)
        return round((max(reading, computing) + launches * self.profile.launch_seconds + beyond_seconds) * 1e9)

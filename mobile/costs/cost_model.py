"""The cost model: nanoseconds of a copy, a layer, an expert, by a roofline plus kernel launches.

It is all that virtual time is computed from. A GPU runs behind the host that launches its kernels, so a piece of work
has two times: the device's, and beside it the host's.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from mobile.costs.geometry import Geometry
from mobile.costs.hardware import HardwareProfile
from mobile.costs.rows import AS_IS, OWN_ROW_COSTS, ROW_COSTS

# Operators that an eager decode step launches, the mean over four families as tests/test_launches.py counts them: of a
# layer outside of its experts (46 to 57), of one expert, of the rest of a pass with its confidence, of a router.
DENSE_LAUNCHES, EXPERT_LAUNCHES, HEAD_LAUNCHES, ROUTER_LAUNCHES = 52, 6, 22, 4


class HostTimes(NamedTuple):
    """Nanoseconds in which the host launches a layer's dense part, an expert, the head, the routers, or one copy.

    The device works meanwhile on what was launched before. In `read` it waits: a result is read, and the next kernel
    launched. All 0 on a processor, which launches and computes in turn.
    """

    dense: int
    expert: int
    head: int
    router_replay: int
    copy: int
    read: int


class CostModel:
    """Integer nanoseconds of each thing that a run does, for one geometry on one profile.

    On the device a step costs max(bytes / memory bandwidth, flops / peak) plus its launches, a layer and a pass also
    what was measured of them beyond that (`layer_seconds`, `step_seconds`; with the head). `host` is what the host
    needs to launch it. Attention over the KV cache is left out: at the suite's few hundred positions it is under 5 % of
    the dense bytes. With `in_place` packed rows are multiplied as they are, and not decoded first.
    """

    def __init__(self, profile: HardwareProfile, geometry: Geometry, *, in_place: bool = False) -> None:
        self.profile, self.geometry = profile, geometry
        copying = profile.link_latency_seconds + geometry.expert_nbytes / (profile.link_gb_per_s * 1e9)
        self.load_ns = round(max(copying, profile.host_copy_seconds) * 1e9)  # none begins before the host begins it
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
        self.host = HostTimes(
            dense=self._launching(DENSE_LAUNCHES, profile.host_layer_seconds),
            expert=self._launching(self._expert_launches),
            head=self._launching(HEAD_LAUNCHES, profile.host_step_seconds),
            router_replay=geometry.moe_layers * self._launching(ROUTER_LAUNCHES),
            copy=round(profile.host_copy_seconds * 1e9),
            read=self._launching(1, profile.host_read_seconds),
        )
        self._expert_weights = geometry.decoded_expert_nbytes / geometry.weight_nbytes

    @property
    def asking_ns(self) -> int:
        """Return the time in which all routers are asked again, where nothing else is under way."""
        return max(self.router_replay_ns, self.host.router_replay)

    def resident_ns(self, experts: int) -> int:
        """Return the time of a decode pass over that many experts a layer, all of them in slots.

        The host reads each layer's routing, so what it launches between two of them is the experts of one layer and
        the dense part of the next.
        """
        layers, host = self.geometry.moe_layers, self.host
        of_experts = max(experts * self.expert_ns(1), experts * host.expert)
        later = max(of_experts + self.dense_ns(1), experts * host.expert + host.dense)
        last = max(of_experts + self.head_ns(1), experts * host.expert + host.head)
        return max(self.dense_ns(1), host.dense) + (layers - 1) * later + last + (layers + 1) * host.read

    def _launching(self, launches: int, beyond_seconds: float = 0.0) -> int:
        """Return the time in which the host launches so many kernels, and what it does beside."""
        return round((launches * self.profile.host_launch_seconds + beyond_seconds) * 1e9)

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

"""A hardware profile fitted to measurements by least squares. It needs numpy only; `mobile.machine.measure` measures.

The profile is the one under which the virtual clock comes closest to the times that were measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from mobile.costs.cost_model import EXPERT_LAUNCHES, CostModel
from mobile.costs.geometry import Geometry
from mobile.costs.hardware import HardwareProfile
from mobile.errors import Refused

SIZES = 3  # fewer cannot tell a latency from a bandwidth and show how well the line fits
NEAR = 0.02  # a layer no slower than that beyond what its device takes is taken to be its device's
WORKSPACE_NBYTES = 512 * 2**20  # for workspaces and the KV cache, assumed


class Timing(NamedTuple):
    """The seconds to move or read `nbytes` once, with that many launches (or copies)."""

    nbytes: int
    launches: int
    seconds: float


class Depth(NamedTuple):
    """The seconds of a decode step of a model of `layers` layers, with every expert resident."""

    layers: int
    seconds: float


@dataclass(frozen=True)
class Measurements:
    """The times of a machine; `about` says when and on what they were measured.

    `copies` are of rows over the link; `kernels` are weights read by the device, one big product (1 launch) or one
    expert (`EXPERT_LAUNCHES`); `cpu_kernels` are experts on the processor. `depths` are decode steps of models
    whose layers have the sizes of `layer`. Rates are of large products. `memory_nbytes` is the device's memory,
    and `taken_nbytes` the part of it that is not for a model. `link_about` and `taken_about` say of what the copies
    are and what took the memory, `notes` are sentences on what the numbers leave out. `host_launch_seconds` and
    `host_copy_seconds` are what a host that runs ahead of its device needs to launch a kernel and to begin a copy,
    `host_read_seconds` to read a small result of an idle device; 0 where a processor computes itself. Where they are
    given, `copies` and `kernels` are the device's time alone.
    """

    device: str
    about: str
    copies: tuple[Timing, ...]
    kernels: tuple[Timing, ...]
    cpu_kernels: tuple[Timing, ...]
    depths: tuple[Depth, ...]
    layer: Geometry
    tflops: float
    cpu_tflops: float
    memory_nbytes: int
    taken_nbytes: int
    link_about: str = "copies of rows as the engine makes them"
    taken_about: str = "what could not be had when it was measured"
    notes: tuple[str, ...] = ()
    host_launch_seconds: float = 0.0
    host_copy_seconds: float = 0.0
    host_read_seconds: float = 0.0

    @property
    def runs_ahead(self) -> bool:
        """Return whether the host launches what its device does later."""
        return self.host_launch_seconds > 0


class Line(NamedTuple):
    """A fit: seconds = launches x `launch_seconds` + bytes / (`gb_per_s` x 1e9).

    `worst` is the largest relative error of a timing.
    """

    launch_seconds: float
    gb_per_s: float
    worst: float


def fit_line(timings: Sequence[Timing], what: str) -> Line:
    """Return the line through timings, by least squares of the relative error; a negative latency becomes 0.

    Raise Refused, with `what` was timed, for fewer than `SIZES` sizes, for times that are not positive, and if more
    bytes do not take longer.
    """
    if len({timing.nbytes for timing in timings}) < SIZES:
        raise Refused(f"Measure {what} at {SIZES} sizes at least; there are {len({t.nbytes for t in timings})}.")
    if not all(math.isfinite(timing.seconds) and timing.seconds > 0 for timing in timings):
        raise Refused(f"A time measured of {what} is not positive; measure again.")
    launch, per_byte = _least_squares(
        np.array([[t.launches, t.nbytes] for t in timings], dtype=float), np.array([t.seconds for t in timings])
    )
    if not per_byte > 0:
        raise Refused(f"More bytes did not take longer in {what}; measure again with nothing else running.")
    worst = max(abs((t.launches * launch + t.nbytes * per_byte) / t.seconds - 1) for t in timings)
    return Line(launch, 1e-9 / per_byte, worst)


def _least_squares(columns: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    """Return the two factors of `columns` (n, 2) whose sum has the least relative error against `seconds` (n,).

    The first factor, a latency, is at least 0.
    """
    # Dividing each row by its seconds makes the errors relative, and each column by its largest value makes launches
    # and bytes, which are some 10^8 apart, alike for the solver.
    scaled, ones = columns / seconds[:, None], np.ones(len(seconds))
    size = np.abs(scaled).max(axis=0)
    first, second = np.linalg.lstsq(scaled / size, ones, rcond=None)[0] / size
    if first >= 0:
        return float(first), float(second)
    # Noise made the latency negative: without it, one factor is left, whose least squares are a quotient.
    return 0.0, float(scaled[:, 1].sum() / (scaled[:, 1] ** 2).sum())


def fit(measured: Measurements) -> HardwareProfile:
    """Return the profile under which the virtual clock comes closest to the measurements.

    Raise Refused as `fit_line` does, and for rates and steps that are not positive or too few.
    """
    # 1. Link, device memory and processor: a latency and a bandwidth each.
    copies, kernels = fit_line(measured.copies, "copies"), fit_line(measured.kernels, "kernels")
    cpu = fit_line(measured.cpu_kernels, "experts on the processor")
    rates = (measured.tflops, measured.cpu_tflops)
    if not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise Refused("A rate measured of products is not positive; measure again.")
    # 2. A profile without the overheads of a layer and of a step.
    bare = HardwareProfile(
        name=f"{measured.device}, calibrated",
        vram_nbytes=measured.memory_nbytes,
        memory_gb_per_s=kernels.gb_per_s,
        tflops=measured.tflops,
        link_gb_per_s=copies.gb_per_s,
        link_latency_seconds=copies.launch_seconds,
        launch_seconds=kernels.launch_seconds,
        reserve_nbytes=measured.taken_nbytes + WORKSPACE_NBYTES,
        cpu_gb_per_s=cpu.gb_per_s,
        cpu_tflops=measured.cpu_tflops,
        sources=_sources(measured, copies, kernels, cpu),
        host_launch_seconds=measured.host_launch_seconds,
        host_copy_seconds=measured.host_copy_seconds,
        host_read_seconds=measured.host_read_seconds,
    )
    # 3. These overheads are the part of the measured decode steps that it does not explain.
    layer, step = _overheads(measured, bare)
    if measured.runs_ahead:
        return replace(bare, host_layer_seconds=layer, host_step_seconds=step)
    return replace(bare, layer_seconds=layer, step_seconds=step)


def _overheads(measured: Measurements, bare: HardwareProfile) -> tuple[float, float]:
    """Return the seconds of a layer, and of a step apart from its layers, beyond the bare profile's; each at least 0.

    They are the code of the model and of the engine, and so the host's, where that runs ahead. Raise Refused for fewer
    than two depths, and for times that are not positive.
    """
    if len({depth.layers for depth in measured.depths}) < 2:
        raise Refused("Measure decode steps of models of two depths at least, to tell layers from the rest of a step.")
    if not all(math.isfinite(depth.seconds) and depth.seconds > 0 for depth in measured.depths):
        raise Refused("A time measured of decode steps is not positive; measure again.")
    cost, top_k = CostModel(bare, measured.layer), measured.layer.top_k
    columns = np.array([[1, depth.layers] for depth in measured.depths], dtype=float)
    # step seconds = rest + layers x layer: two depths or more tell them apart.
    rest, layer = _least_squares(columns, np.array([depth.seconds for depth in measured.depths]))
    if not measured.runs_ahead:
        explained_ns = cost.dense_ns(1) + top_k * cost.expert_ns(1)
        return max(0.0, layer - explained_ns / 1e9), max(0.0, rest - cost.head_ns(1) / 1e9)
    # The host reads each routing, so a step is the first dense part, all but one layer, and the last experts and head:
    # see `CostModel.resident_ns`. Where the device alone takes as long, nothing is known of the host beyond it.
    experts, host_experts = top_k * cost.expert_ns(1), top_k * cost.host.expert
    beyond = []
    seconds, first = layer, 0.0
    for device_ns, host_ns in ((cost.dense_ns(1), cost.host.dense), (cost.head_ns(1), cost.host.head)):
        left = seconds - first - cost.host.read / 1e9
        of_device = left <= (1 + NEAR) * (experts + device_ns) / 1e9
        beyond.append(0.0 if of_device else max(0.0, left - (host_experts + host_ns) / 1e9))
        first = max(cost.dense_ns(1) / 1e9, cost.host.dense / 1e9 + beyond[0]) + cost.host.read / 1e9
        seconds = rest + layer
    return beyond[0], beyond[1]


def _sources(measured: Measurements, copies: Line, kernels: Line, cpu: Line) -> tuple[str, ...]:
    """Return one sentence on each kind of number: how it was measured and how well it fits."""

    def fitted(timings: Sequence[Timing], line: Line) -> str:
        sizes = sorted({timing.nbytes for timing in timings})
        return (
            f"least squares over {len(timings)} sizes of {sizes[0] / 1e6:.2g} to {sizes[-1] / 1e6:.3g} MB, "
            f"the worst missed by {line.worst:.1%}"
        )

    depths = ", ".join(str(depth.layers) for depth in measured.depths)
    host = (
        f"host, ahead of its device: {measured.host_launch_seconds * 1e6:.1f} us to launch a small kernel, "
        f"{measured.host_copy_seconds * 1e6:.1f} us to begin a copy and have the device wait for it, "
        f"{measured.host_read_seconds * 1e6:.1f} us to read a small result",
    )
    return (
        f"measured: {measured.about}",
        f"link: {measured.link_about}; {fitted(measured.copies, copies)}",
        f"memory bandwidth and launches ({EXPERT_LAUNCHES} an expert): {fitted(measured.kernels, kernels)}",
        f"processor: experts computed where they lie; {fitted(measured.cpu_kernels, cpu)}",
        "rates: the largest product that was timed, on the device and on the processor",
        f"layer and step: decode steps of {depths} layers with everything resident, less what the rest explains",
        f"reserve: {measured.taken_about}, and {WORKSPACE_NBYTES // 2**20} MiB assumed for workspaces and the KV cache",
        *(host if measured.runs_ahead else ()),
        *measured.notes,
    )


def measurements_from(data: dict[str, Any]) -> Measurements:
    """Return the measurements that `asdict` and JSON made `data` of."""
    timings = {name: tuple(Timing(*row) for row in data[name]) for name in ("copies", "kernels", "cpu_kernels")}
    depths = tuple(Depth(*row) for row in data["depths"])
    notes = tuple(data.get("notes", ()))
    return Measurements(**{**data, **timings, "depths": depths, "layer": Geometry(**data["layer"]), "notes": notes})

"""What a preset of shapes will take, and why it cannot start here. Arithmetic from published sizes; no torch until a
GPU is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from mobile.costs.geometry import GEOMETRIES
from mobile.costs.hardware import parse_nbytes, profile
from mobile.errors import Refused
from mobile.links.registry import LINKS
from mobile.machine.host import host
from mobile.policies.strategy import BigLittle, HalfK, resolve
from suites.budget import SHOWN_SHARE, is_memory
from suites.synthetic.cells import SyntheticCell
from suites.synthetic.reference_cells import DEVICE_MAP, ReferenceCell

GB, GIB = 1e9, 2**30
ATTACH_SECONDS = 5  # an assumption: self-tests, and the link's own measurement
MAKE_GB_PER_S = 3  # an assumption: filling and page-locking the host store
START_SECONDS = 40  # an assumption: a process, its imports, and the recording of the shipped model's routing
CALIBRATION_SECONDS = 40  # an assumption: the machine, and the link at its speeds; once a geometry at most
PAGEABLE_GB_PER_S = 6  # an assumption: what whole layers move at
RESIDENT_TOKEN_SECONDS = 0.03  # an assumption: launches of an eager step


def describe(shapes: Sequence[tuple[SyntheticCell, bool]]) -> list[str]:
    """Lines for the plan: by model what it takes; each shape with whether it is done."""
    lines, total = [], 0.0
    for name, members in groupby(shapes, key=lambda each: each[0].model.name):
        told = list(members)
        left = [shape for shape, done in told if not done]
        seconds = seconds_of(left)
        total += seconds
        lines.append(
            f"{name}: {len(told)} cells, {len(told) - len(left)} done; {_memory(told[0][0])}; "
            f"about {seconds / 60:.0f} minutes"
        )
    first = shapes[0][0]
    return [
        *lines,
        f"together about {total / 60:.0f} minutes on link {first.link}, an estimate: every expert copied on demand, a "
        f"native link taken at {profile(first.hardware).link_gb_per_s:.0f} GB/s; no network needed; disk under 10 MB",
    ]


def _memory(shape: SyntheticCell) -> str:
    geometry = GEOMETRIES[shape.model.geometry]
    whole = geometry.total_experts * geometry.expert_nbytes
    if shape.shrink > 1:
        return f"every width divided by {shape.shrink}"
    layers = shape.layers or geometry.moe_layers
    usable = host().usable_nbytes
    if shape.layers is None and usable is not None and usable < whole:
        return (
            f"host memory {usable / GIB:.0f} GiB free of {whole / GIB:.0f}, so fewer than its {layers} layers are made"
        )
    return f"host memory {whole * layers / geometry.moe_layers / GIB:.0f} GiB for {layers} layers' experts"


def seconds_of(shapes: Sequence[SyntheticCell]) -> float:
    """An estimate for shapes of one model."""
    if not shapes:
        return 0.0
    geometry = GEOMETRIES[shapes[0].model.geometry]
    narrow = 1 / shapes[0].shrink ** 2
    making = geometry.total_experts * geometry.expert_nbytes * narrow / (MAKE_GB_PER_S * GB)
    foretold = [shape for shape in shapes if shape.foretold]
    clock = sum(ATTACH_SECONDS / 2 + 2 * _steps(shape) / shape.repeats * RESIDENT_TOKEN_SECONDS for shape in foretold)
    clock += CALIBRATION_SECONDS if foretold else 0
    return START_SECONDS + making + clock + sum(ATTACH_SECONDS + _playing(shape) for shape in shapes)


def beside_seconds(besides: Sequence[ReferenceCell]) -> float:
    """An estimate for what is measured beside shapes."""
    total = 0.0
    for beside in besides:
        geometry = GEOMETRIES[beside.model.geometry]
        gigabytes = geometry.total_experts * geometry.expert_nbytes / beside.shrink**2 / GB
        total += START_SECONDS + gigabytes / MAKE_GB_PER_S
        if beside.what == DEVICE_MAP:
            total += beside.repeats * (beside.decode_tokens + 2) * gigabytes / PAGEABLE_GB_PER_S
    return total


def _steps(shape: SyntheticCell) -> int:
    """Decode steps of every repeat, and of the warm-up before them."""
    return shape.repeats * (shape.warmup_tokens + shape.decode_tokens) + shape.warmup_tokens + 1


def _playing(shape: SyntheticCell) -> float:
    """Prefills and decode steps of every repeat, and of the warm-up before them."""
    geometry, strategy = GEOMETRIES[shape.model.geometry], resolve(shape.strategy, shape.gamma)
    steps = _steps(shape)
    if strategy.retain == "everything":
        return steps * RESIDENT_TOKEN_SECONDS
    rate = shape.link_gb_per_s or profile(shape.hardware).link_gb_per_s
    active = 1 - (1 - geometry.top_k / geometry.experts) ** shape.prompt_tokens
    prefill = active * geometry.total_experts * geometry.expert_nbytes / shape.shrink**2 / (rate * GB)
    half = isinstance(strategy.gating, HalfK | BigLittle)
    share = 0.5 * (1 + (shape.rate or 0)) if half else 1.0
    token = share / geometry.on_demand_ceiling(rate) / shape.shrink**2
    return (shape.repeats + 1) * prefill + steps * token


def check(name: str, shapes: Sequence[SyntheticCell]) -> list[str]:
    """Return what will be other here than the preset says, a sentence each.

    Raises Refused, in one sentence, if this machine has no GPU and the link needs one, or one that is too small.
    """
    if not any(LINKS[shape.link].needs_gpu for shape in shapes):
        return []
    import torch

    if not torch.cuda.is_available():
        raise Refused(
            f"Preset {name} is timed on an NVIDIA GPU and torch finds none here; run it on a CUDA machine, or try its "
            "code with --link paced or --link virtual, which measure nothing."
        )
    total = torch.cuda.mem_get_info()[1]
    most = max((parse_nbytes(shape.budget) for shape in shapes if is_memory(shape.budget)), default=0)
    if total < SHOWN_SHARE * most:
        raise Refused(
            f"A budget of {most / GIB:.0f} GiB is asked for and this GPU has {total / GIB:.1f} GiB; lower the preset's "
            "budgets, or pick other cells with --only."
        )
    return list(_remarks(shapes, total))


def _remarks(shapes: Sequence[SyntheticCell], total_nbytes: int) -> Iterator[str]:
    from mobile.links.cuda import NEAR

    budgets = dict.fromkeys(shape.budget for shape in shapes if is_memory(shape.budget))
    larger = [budget for budget in budgets if parse_nbytes(budget) > total_nbytes]
    if larger:
        yield f"This GPU shows {total_nbytes / GIB:.2f} GiB: cells of {', '.join(larger)} are given that."
    if any(shape.link_gb_per_s is not None for shape in shapes):
        yield (
            f"A link that is slower than a cell asks for, by {NEAR:.0%} at most, is taken as it is, which the record "
            "says; cells that ask for more are left out."
        )

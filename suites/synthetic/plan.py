"""The cost of synthetic and reference cells, and why they cannot start here.

Arithmetic from published sizes; no torch until a GPU is asked for.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from mobile.costs.geometry import GEOMETRIES
from mobile.costs.hardware import parse_nbytes, profile
from mobile.errors import Refused
from mobile.links.registry import LINKS
from mobile.machine.host import host
from mobile.policies.strategy import BigLittle, HalfK, resolve
from suites.budget import holds, is_memory
from suites.synthetic.cells import SyntheticCell
from suites.synthetic.reference_cells import DEVICE_MAP, ReferenceCell

GB, GIB = 1e9, 2**30
ATTACH_SECONDS = 5  # an assumption: self-tests, and the link's own measurement
MAKE_GB_PER_S = 3  # an assumption: filling and page-locking the host store
START_SECONDS = 40  # an assumption: a process, its imports, and the recording of the shipped model's routing
CALIBRATION_SECONDS = 40  # an assumption: the machine, and the link at its speeds; once a geometry at most
PAGEABLE_GB_PER_S = 6  # an assumption: what whole layers move at
DISK_GB_PER_S = 1.5  # an assumption: rows read past the page cache, and written
IN_TURN_SECONDS = 0.6  # an assumption: an attach and its self-tests on the processor, where nothing is page-locked
RESIDENT_TOKEN_SECONDS = 0.03  # an assumption: launches of an eager step


def describe(cells: Sequence[tuple[SyntheticCell, bool]]) -> list[str]:
    """Return lines for the plan, by model what its cells take; each cell comes with whether it is done."""
    lines, total = [], 0.0
    for name, members in groupby(cells, key=lambda each: each[0].model.name):
        of_model = list(members)
        left = [cell for cell, done in of_model if not done]
        seconds = seconds_of(left)
        total += seconds
        lines.append(
            f"{name}: {len(of_model)} cells, {len(of_model) - len(left)} done; "
            f"{_memory([cell for cell, _ in of_model])}; about {seconds / 60:.0f} minutes"
        )
    first = cells[0][0]
    room = (
        f"{max(map(files_nbytes, of_models(cell for cell, _ in cells))) / GB:.0f} GB while it runs"
        if _on_disk(first)
        else "under 10 MB"
    )
    return [
        *lines,
        f"together about {total / 60:.0f} minutes on link {first.link}, an estimate: every expert copied on demand, a "
        f"native link taken at {_native_gb_per_s(first):g} GB/s; no network needed; disk {room}",
    ]


def _on_disk(cell: SyntheticCell) -> bool:
    return LINKS[cell.link].store == "disk"


def _native_gb_per_s(cell: SyntheticCell) -> float:
    """Return what a link that is not throttled is taken to carry, decimal GB/s."""
    return DISK_GB_PER_S if _on_disk(cell) else profile(cell.hardware).link_gb_per_s


def file_nbytes(cell: SyntheticCell) -> int:
    """Return the bytes of the file that holds the experts of the cell's model in its row format."""
    geometry = GEOMETRIES[cell.model.geometry].with_rows(cell.rows)
    return (cell.layers or geometry.moe_layers) * geometry.experts * geometry.expert_nbytes // cell.shrink**2


def files_nbytes(cells: Sequence[SyntheticCell]) -> int:
    """Return the bytes of the files of one model's cells: one for each row format."""
    return sum(map(file_nbytes, {cell.rows: cell for cell in cells}.values()))


def of_models(cells: Iterable[SyntheticCell]) -> list[list[SyntheticCell]]:
    """Return the cells of each model."""
    found: dict[str, list[SyntheticCell]] = {}
    for cell in cells:
        found.setdefault(cell.model.name, []).append(cell)
    return list(found.values())


def _memory(cells: Sequence[SyntheticCell]) -> str:
    cell = cells[0]
    geometry = GEOMETRIES[cell.model.geometry].with_rows(cell.rows)
    whole = geometry.total_experts * geometry.expert_nbytes
    if cell.shrink > 1:
        return f"every width divided by {cell.shrink}"
    layers = cell.layers or geometry.moe_layers
    if _on_disk(cell):
        files = "a file" if len({each.rows for each in cells}) == 1 else "files"
        return f"{files} of {files_nbytes(cells) / GB:.0f} GB for the experts of {layers} layers, gone afterwards"
    usable = host().usable_nbytes
    if cell.layers is None and usable is not None and usable < whole:
        return (
            f"host memory {usable / GIB:.0f} GiB free of {whole / GIB:.0f}, so fewer than its {layers} layers are made"
        )
    return f"host memory {whole * layers / geometry.moe_layers / GIB:.0f} GiB for {layers} layers' experts"


def seconds_of(cells: Sequence[SyntheticCell]) -> float:
    """Estimate the seconds that cells of one model take."""
    if not cells:
        return 0.0
    making = files_nbytes(cells) / ((DISK_GB_PER_S if _on_disk(cells[0]) else MAKE_GB_PER_S) * GB)
    predicted = [cell for cell in cells if cell.is_predicted]
    clock = CALIBRATION_SECONDS if predicted else 0
    attach = sum(cell.repeats * IN_TURN_SECONDS if _on_disk(cell) else ATTACH_SECONDS for cell in cells)
    return START_SECONDS + making + clock + attach + sum(map(_playing, cells))


def reference_seconds(references: Sequence[ReferenceCell]) -> float:
    """Estimate the seconds that reference cells take."""
    total = 0.0
    for reference in references:
        geometry = GEOMETRIES[reference.model.geometry]
        gigabytes = geometry.total_experts * geometry.expert_nbytes / reference.shrink**2 / GB
        total += START_SECONDS + gigabytes / MAKE_GB_PER_S
        if reference.what == DEVICE_MAP:
            total += reference.repeats * (reference.decode_tokens + 2) * gigabytes / PAGEABLE_GB_PER_S
    return total


def _steps(cell: SyntheticCell) -> int:
    """Return the decode steps of every repeat, and of the warm-up before them."""
    return cell.repeats * (cell.warmup_tokens + cell.decode_tokens) + cell.warmup_tokens + 1


def _playing(cell: SyntheticCell) -> float:
    """Estimate the seconds of prefill and decode steps of every repeat, and of the warm-up before them."""
    geometry, strategy = GEOMETRIES[cell.model.geometry], resolve(cell.strategy, cell.gamma)
    steps = _steps(cell)
    if strategy.retain == "everything":
        return steps * RESIDENT_TOKEN_SECONDS
    rate = cell.link_gb_per_s or _native_gb_per_s(cell)
    active = 1 - (1 - geometry.top_k / geometry.experts) ** cell.prompt_tokens
    prefill = active * file_nbytes(cell) / (rate * GB)
    half = isinstance(strategy.gating, HalfK | BigLittle)
    share = 0.5 * (1 + (cell.rate or 0)) if half else 1.0
    made = (cell.layers or geometry.moe_layers) / geometry.moe_layers
    token = share * made / geometry.with_rows(cell.rows).on_demand_ceiling(rate) / cell.shrink**2
    return (cell.repeats + 1) * prefill + steps * token


def check(name: str, cells: Sequence[SyntheticCell]) -> list[str]:
    """Return what will differ here from what the preset asks for, a sentence each.

    Raise Refused, in one sentence, if this machine has no GPU and the link needs one, or one too small for any cell.
    """
    if not any(LINKS[cell.link].needs_gpu for cell in cells):
        return list(_too_large(cells, shutil.disk_usage(Path()).free))
    import torch

    if not torch.cuda.is_available():
        raise Refused(
            f"Preset {name} is timed on an NVIDIA GPU and torch finds none here; run it on a CUDA machine, or try its "
            "code with --link paced or --link virtual, which measure nothing."
        )
    total = torch.cuda.mem_get_info()[1]
    asked = [parse_nbytes(cell.budget) if is_memory(cell.budget) else 0 for cell in cells]
    if not holds(min(asked), total):
        raise Refused(
            f"A budget of {min(asked) / GIB:.0f} GiB is asked for and this GPU has {total / GIB:.1f} GiB; lower the "
            "preset's budgets, or pick other cells with --only."
        )
    return list(_remarks(cells, total))


def _too_large(cells: Sequence[SyntheticCell], free_nbytes: int) -> Iterator[str]:
    """Yield a sentence on each model whose experts the disk has no room for."""
    for of_model in of_models(cell for cell in cells if _on_disk(cell)):
        if files_nbytes(of_model) > free_nbytes:
            yield (
                f"The experts of {of_model[0].model.name} take {files_nbytes(of_model) / GB:.0f} GB of disk and "
                f"{free_nbytes / GB:.0f} GB are free: its cells will fail. Free some, or pick others with --only."
            )


def _remarks(cells: Sequence[SyntheticCell], total_nbytes: int) -> Iterator[str]:
    from mobile.links.cuda import NEAR

    budgets = dict.fromkeys(cell.budget for cell in cells if is_memory(cell.budget))
    larger = [budget for budget in budgets if parse_nbytes(budget) > total_nbytes]
    if near := [budget for budget in larger if holds(parse_nbytes(budget), total_nbytes)]:
        yield f"This GPU shows {total_nbytes / GIB:.2f} GiB: cells of {', '.join(near)} are given that."
    if apart := [budget for budget in larger if budget not in near]:
        yield f"This GPU shows {total_nbytes / GIB:.2f} GiB: cells of {', '.join(apart)} are left out, and only they."
    if any(cell.link_gb_per_s is not None for cell in cells):
        yield (
            f"A link that is slower than a cell asks for, by {NEAR:.0%} at most, is taken as it is, which the record "
            "says; cells that ask for more are left out."
        )

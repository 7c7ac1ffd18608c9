"""The cost of a preset, before it starts, and why it cannot start here.

Arithmetic from published sizes; no torch until a GPU is asked for.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from huggingface_hub import HfApi

from mobile.checkpoints.source import cache_folder, cached_whole, disk_shortage
from mobile.costs.geometry import GEOMETRIES, Geometry
from mobile.costs.hardware import parse_nbytes, profile
from mobile.errors import Refused
from mobile.links.registry import LINKS, needs_gpu
from mobile.machine.host import host
from mobile.policies.strategy import resolve
from suites.budget import holds, is_memory, replay_setup
from suites.identity import SHIPPED, Model
from suites.plan.cells import Cell, Generation
from suites.plan.preset import Preset
from suites.scoring.sandbox.run import check_walls
from suites.synthetic import plan
from suites.tasks.catalogue import PUBLISHED, TASKS
from suites.tasks.files import remarks

ANSWER_TOKENS = 150  # an assumption: no answer has been written yet; limits are 256 (GSM8K) and 1,024
GB, GIB = 1e9, 2**30
HUB_SECONDS = 10


@dataclass(frozen=True)
class Cost:
    """The cost of one model: bytes to download (0 from a folder), to hold on the host, and on the GPU at least.

    `seconds` is an estimate: every expert copied on demand at the profile's bandwidth, nothing cached, no compute.
    """

    model: Model
    download_nbytes: int
    host_nbytes: int
    gpu_nbytes: int
    seconds: float


def costs(preset: Preset) -> list[Cost]:
    """Return the cost of each model with cells that are timed live, in order; shipped ones on a virtual clock: none."""
    real = [cell for cell in preset.live if cell.generation.model.weights != SHIPPED or LINKS[str(cell.link)].real_time]
    models = dict.fromkeys(cell.generation.model for cell in real)
    return [_cost(model, [cell for cell in real if cell.generation.model == model]) for model in models]


def _cost(model: Model, cells: Sequence[Cell]) -> Cost:
    geometry = GEOMETRIES[model.geometry]
    store = geometry.total_experts * geometry.expert_nbytes
    return Cost(
        model=model,
        download_nbytes=0 if model.hub is None else store + geometry.resident_nbytes,
        host_nbytes=store,
        gpu_nbytes=max(_gpu_nbytes(geometry, cell) for cell in cells),
        seconds=sum(cell.generation.items * seconds_an_answer(geometry, cell) for cell in cells),
    )


def _gpu_nbytes(geometry: Geometry, cell: Cell) -> int:
    """Return the device memory of a cell: its budget, or the bytes of its slots and of everything beside them."""
    if is_memory(cell.budget):
        return parse_nbytes(cell.budget)
    strategy = resolve(cell.strategy, cell.gamma)
    return replay_setup(strategy, geometry, None, profile(cell.hardware), cell.budget).memory_nbytes


def seconds_an_answer(geometry: Geometry, cell: Cell) -> float:
    """Estimate one prefill, which streams every expert once, and `ANSWER_TOKENS` tokens at the on-demand ceiling."""
    rate = profile(cell.hardware).link_gb_per_s
    prefill = geometry.total_experts * geometry.expert_nbytes / (rate * GB)
    return prefill + ANSWER_TOKENS / geometry.on_demand_ceiling(rate)


def describe(preset: Preset) -> list[str]:
    """Return lines for the plan of a preset that is timed live; none for another."""
    needed = costs(preset)
    lines = [
        f"{one.model.name}: download {one.download_nbytes / GB:.0f} GB, host memory {one.host_nbytes / GIB:.0f} GiB "
        f"for the experts, GPU memory {one.gpu_nbytes / GIB:.1f} GiB, about {one.seconds / 3600:.1f} hours"
        for one in needed
    ]
    if needed:
        link = preset.live[0].link
        total = sum(one.seconds for one in needed) / 3600
        download = sum(one.download_nbytes for one in needed) / GB
        lines.append(
            f"together: disk {download:.0f} GB, about {total:.0f} hours on link {link}, an estimate: {ANSWER_TOKENS} "
            f"tokens an answer, every expert copied on demand at {_rate(preset):.0f} GB/s"
        )
    folder = next((c.generation.folder for c in preset.scored if c.generation.folder is not None), None)
    return lines + remarks(_tasks(preset), folder)


def _rate(preset: Preset) -> float:
    return profile(preset.live[0].hardware).link_gb_per_s


def _tasks(preset: Preset) -> list[str]:
    return list(dict.fromkeys(cell.generation.task for cell in preset.scored))


def answer(preset: Preset) -> str:
    """Return the line that says whether this machine can run the preset, and why not; below it, what else to know."""
    remarks: list[str] = []
    try:
        if preset.synthetic:
            remarks = plan.check(preset.name, preset.synthetic)
        if preset.scored:
            remarks += check(preset, run_generated_code=True)
    except Refused as refused:
        return f"does not run here: {preset.name}, because: {refused}"
    judged = any(_runs_foreign_code(cell.generation) for cell in preset.scored)
    return "\n".join([f"runs: {preset.name}" + (", with --run-generated-code" if judged else ""), *remarks])


def check(preset: Preset, *, run_generated_code: bool) -> list[str]:
    """Return what will differ here from what the preset asks for, a sentence each.

    Raise Refused, in one sentence, for the first thing that this machine or this command line lacks.
    """
    remarks: list[str] = []
    if any(TASKS[cell.task].runs_code for cell in preset.scored):
        check_walls()
    judged = [cell.generation for cell in preset.scored if _runs_foreign_code(cell.generation)]
    if judged and not run_generated_code:
        raise Refused(
            f"Task {judged[0].task} runs code that {judged[0].model.name} wrote, in a sandbox as strong as this "
            "machine's kernel; pass --run-generated-code to allow it, or take the task out of the preset."
        )
    if any(needs_gpu(cell.link) for cell in preset.live):
        needed = costs(preset)
        remarks += _check_gpu(preset)
        _check_host(max(needed, key=lambda one: one.host_nbytes))
        _check_disk(needed)
    _check_hub(preset)
    return remarks


def _runs_foreign_code(generation: Generation) -> bool:
    """Return whether code is run that is not written by our own models on our own prompts."""
    ours = generation.task not in PUBLISHED and generation.model.weights == SHIPPED
    return TASKS[generation.task].runs_code and not ours


def _check_gpu(preset: Preset) -> list[str]:
    """Return a sentence on the cells that this GPU is too small for. Raise Refused if those are all, or without one."""
    import torch

    live = [cell for cell in preset.live if needs_gpu(cell.link)]
    sizes = {cell: _gpu_nbytes(GEOMETRIES[cell.generation.model.geometry], cell) for cell in live}
    if not torch.cuda.is_available():
        raise Refused(
            f"Preset {preset.name} is timed on an NVIDIA GPU and torch finds none here; run it on a CUDA machine with "
            f"at least {max(sizes.values()) / GIB:.1f} GiB, or take the preset cpu, whose times are computed."
        )
    total = torch.cuda.mem_get_info()[1]
    least = min(live, key=lambda cell: sizes[cell])
    if not holds(sizes[least], total):
        raise Refused(
            f"{least.generation.model.name} is to be given {sizes[least] / GIB:.1f} GiB of GPU memory at least and "
            f"this GPU has {total / GIB:.1f} GiB; lower the preset's budgets, or use a larger card."
        )
    apart = [cell for cell in live if not holds(sizes[cell], total)]
    named = dict.fromkeys(f"{cell.generation.model.name} {cell.budget}" for cell in apart)
    sentence = f"This GPU shows {total / GIB:.2f} GiB: cells of {', '.join(named)} are left out, and only they."
    return [sentence] if apart else []


def _check_host(most: Cost) -> None:
    usable = host().usable_nbytes
    if usable is not None and usable < most.host_nbytes:
        raise Refused(
            f"The experts of {most.model.name} take {most.host_nbytes / GIB:.0f} GiB of host memory and "
            f"{usable / GIB:.0f} GiB are free; take the model out of the preset, or use a machine with more."
        )


def _check_disk(needed: Sequence[Cost]) -> None:
    missing = sum(one.download_nbytes for one in needed if not _cached(one.model))
    shortage = disk_shortage(missing, shutil.disk_usage(cache_folder()).free)
    if shortage is not None:
        raise Refused(f"{shortage[:1].upper()}{shortage[1:]}.")


def _cached(model: Model) -> bool:
    return model.hub is None or cached_whole(model.hub, model.revision)


def _check_hub(preset: Preset) -> None:
    """Raise Refused for a model or task that is neither in the cache nor to be reached on the hub."""
    api = HfApi()
    for model in dict.fromkeys(cell.generation.model for cell in preset.scored):
        if model.hub is not None and not _cached(model):
            try:
                api.model_info(model.hub, revision=model.revision, timeout=HUB_SECONDS)
            except Exception as error:  # requests', httpx's and the hub's own, whatever keeps us from it
                raise Refused(
                    f"Model {model.name} is {model.hub} of the hub, which cannot be reached "
                    f"({type(error).__name__}); give --model {model.name}=FOLDER with a copy."
                ) from error
    for cell in preset.scored:
        task, published = cell.task, PUBLISHED.get(cell.task)
        if published is not None and cell.generation.folder is None:
            try:
                api.dataset_info(published.hub, timeout=HUB_SECONDS)
            except Exception as error:
                wanted = ", ".join(" or ".join(names) for names in published.files.values())
                raise Refused(
                    f"Task {task} is {published.hub} of the hub, which cannot be reached ({type(error).__name__}); "
                    f"give --data-dir FOLDER with {wanted}, from {published.url}."
                ) from error
            break

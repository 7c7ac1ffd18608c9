"""The short text of a plan: does it run, how its memory is divided, speeds to expect, and what to run."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap
from typing import Any

from mobile.cli.planning.advice import Advised, Expected
from mobile.cli.planning.memory import CheckpointPart, Plan
from mobile.cli.terminal import show
from mobile.costs.expected import has_own_curves
from mobile.costs.geometry import Geometry
from mobile.costs.memory import Reserve
from mobile.costs.rows import AS_IS
from mobile.visible import visible

WIDTH = 100


def print_short(out: Any, plan: Plan) -> None:
    """Print the verdict, the division of the memory, the speeds to expect and the recommendation."""
    out.print(verdict(plan))
    for line in (*_about(plan), _division(plan)):
        out.print("\n".join(wrap(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)))
    if plan.expected:
        out.print()
        out.print(_speeds(plan.expected))
        out.print("\n".join(wrap(_note(plan), WIDTH, break_on_hyphens=False, break_long_words=False)))
    if plan.recommendation is not None:
        out.print()
        fastest, lossless = plan.recommendation.fastest, plan.recommendation.lossless
        if fastest == lossless:
            out.print(_advice("Run (lossless)", fastest))
        else:
            out.print(_advice("Run", fastest))
            if lossless is not None:
                out.print(_advice("Lossless", lossless))


def verdict(plan: Plan) -> str:
    """Return the first line: whether it runs on that card, in that host memory and on that disk, or why not."""
    where = f"{plan.model} on {plan.hardware} with {show.memory(plan.memory_nbytes)}"
    if plan.disk is not None:
        memory = show.memory(plan.memory_nbytes)
        where = f"{plan.model} from a disk of {plan.disk.gb_per_s:.3g} GB/s with {memory} of host memory"
    if not plan.runs:
        remedy = "" if plan.remedy is None else f"; {plan.remedy}"
        return f"does not run here: {where}, because {plan.because}{remedy}"
    if plan.disk is None:
        where += f", host memory {show.memory(plan.host_needed_nbytes)}"
        if plan.host_available_nbytes is not None:
            where += f" of {show.memory(plan.host_available_nbytes)}"
    elif not plan.disk.is_there:
        where += f", rows {show.moved(plan.disk.file_nbytes)}"
        if plan.disk.free_nbytes is not None:
            where += f" of {show.moved(plan.disk.free_nbytes)}"
    if plan.weights is not None:
        where += f", download {show.moved(plan.weights.missing_nbytes)} of {show.moved(plan.weights.free_nbytes)}"
    return f"runs: {where}"


def _about(plan: Plan) -> Iterator[str]:
    """Yield the lines on the model, its files, the card, and the strategies that cannot be had."""
    geometry = plan.geometry
    computed_on = "" if plan.disk is None else f" The processor of {plan.hardware} computes."
    yield (
        f"{plan.model}: {geometry.moe_layers} MoE layers of {geometry.experts} experts, top {geometry.top_k}."
        f"{computed_on}{_packed(geometry)} Computed from sizes; nothing was run."
    )
    if plan.checkpoint is not None:
        yield _files(plan.checkpoint, geometry)
    if plan.assumed is not None:
        yield f"Card: {plan.assumed}."
    for name, reason in plan.refused.items():
        yield f"{name} does not run: {reason}"


def _division(plan: Plan) -> str:
    """Return the line on the device's memory, or on the host's where experts lie on a disk."""
    of = "Device memory" if plan.disk is None else "Host memory"
    total = plan.geometry.total_experts
    return (
        f"{of}: dense weights {show.memory(plan.resident_nbytes)}, {reserve_in_words(plan.reserve)}, "
        f"prefill buffers {show.memory(plan.staging_nbytes)}, expert slots "
        f"{show.memory(plan.slots_nbytes)}: {plan.slots:,} of {total:,} experts ({plan.slots / total:.1%})."
    )


def reserve_in_words(reserve: Reserve) -> str:
    """Return what is kept back, by part where it is counted for a number of tokens."""
    if reserve.context_tokens is None:
        return f"reserve {show.memory(reserve.nbytes)} (context, workspace, KV cache)"
    cache = f"KV cache of {reserve.context_tokens:,} tokens {show.memory(reserve.cache_nbytes)}"
    context = f"CUDA context {show.memory(reserve.context_nbytes)}, " if reserve.context_nbytes else ""
    return f"{cache}, {context}workspace {show.memory(reserve.workspace_nbytes)}"


def _speeds(speeds: tuple[Expected, ...]) -> Any:
    """Return the table of speeds to expect."""
    table = show.table("Expected decode speed (projected)", "strategy", "tokens/s", "band", "lossless", "")
    for each in speeds:
        remarks = [] if each.fallback_rate is None else [f"runs {each.fallback_rate:.1%} of tokens twice"]
        if not each.budget_meets_needs:
            remarks.append("has fewer slots than it needs")
        band = f"{show.rate(each.low)} to {show.rate(each.high)}"
        lossless = "yes" if each.lossless else "no"
        table.add_row(each.strategy, show.rate(each.tokens_per_s), band, lossless, ", ".join(remarks))
    table.columns[-1].justify = "left"
    return table


def _note(plan: Plan) -> str:
    """Return the paragraph on where the speeds and their band come from."""
    geometry, router = plan.geometry, f"{plan.geometry.experts} experts, top {plan.geometry.top_k}"
    of = f"one of {router}" if has_own_curves(geometry) else f"of all of them, for none has {router}"
    note = f"Projected from the routing of small models trained for this project ({of}); the band spans its tasks"
    if any("cpu-hybrid" in each.strategy.split("+") for each in plan.expected):
        note += ", and of cpu-hybrid also a processor that the link slows down"
    note += ". Other models route otherwise."
    if any(not each.lossless for each in plan.expected):
        note += " Lossy strategies change some answers: the README says how many of these models'."
    return note


def _advice(label: str, advised: Advised) -> str:
    band = f"{show.rate(advised.low)} to {show.rate(advised.high)}"
    return f"{label}, {show.rate(advised.tokens_per_s)} tokens/s expected ({band}):\n  {advised.command}"


def _files(checkpoint: CheckpointPart, geometry: Geometry) -> str:
    """Return the line on a checkpoint's files, and on what becomes of experts that are packed in them."""
    line = f"Checkpoint: its files take {show.moved(checkpoint.nbytes)}"
    if checkpoint.missing_nbytes:
        line += f", of which {show.moved(checkpoint.missing_nbytes)} are to be fetched"
    if checkpoint.unkept is not None:
        return visible(
            f"{line}. They are quantised with {checkpoint.quantised} in a way that rows do not keep "
            f"({checkpoint.unkept}): the experts are dequantised."
        )
    if checkpoint.quantised == geometry.rows:
        return f"{line}; rows keep their {geometry.rows} as it is."
    return f"{line}. They are quantised with {checkpoint.quantised}, and dequantised while they are read."


def _packed(geometry: Geometry) -> str:
    """Return the sentence on packed experts, with a space before it; nothing for experts as they are."""
    if geometry.rows == AS_IS:
        return ""
    decoded = show.memory(geometry.decoded_expert_nbytes)
    return f" Experts lie in {geometry.rows}: {show.memory(geometry.expert_nbytes)} each, {decoded} when decoded."

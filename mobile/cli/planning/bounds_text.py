"""The long text of a plan, behind --verbose: memory by part, bounds of every strategy, ceilings, formulas, sources."""

from __future__ import annotations

from typing import Any

from mobile.cli.planning.memory import DiskPart, Plan
from mobile.cli.terminal import show
from mobile.costs.bounds import Ceilings
from mobile.costs.hardware import HardwareProfile
from mobile.residency.residency import PREFILL_BUFFERS


def print_bounds(out: Any, plan: Plan, hardware: HardwareProfile) -> None:
    """Print the division of the memory, the bounds and the ceilings."""
    geometry = plan.geometry
    device = show.table("Device memory" if plan.disk is None else "Host memory", "part", "size", "")
    device.add_row("dense weights", show.memory(plan.resident_nbytes), "with embedding and head")
    reserve = plan.reserve
    if reserve.context_tokens is None:
        device.add_row("reserve", show.memory(reserve.nbytes), "context, workspace, KV cache")
    else:
        device.add_row("KV cache", show.memory(reserve.cache_nbytes), f"of {reserve.context_tokens:,} tokens")
        device.add_row("context", show.memory(reserve.context_nbytes), "CUDA's, on a card")
        device.add_row("workspace", show.memory(reserve.workspace_nbytes), "activations of a prompt, libraries")
    each = show.memory(geometry.expert_nbytes)
    device.add_row("prefill buffers", show.memory(plan.staging_nbytes), f"{PREFILL_BUFFERS} experts of {each}")
    share = f"{plan.slots:,} of {geometry.total_experts:,} experts ({plan.slots / geometry.total_experts:.1%})"
    device.add_row("expert slots", show.memory(plan.slots_nbytes), share)
    device.columns[-1].justify = "left"
    out.print()
    out.print(device)
    out.print(f"\n{_elsewhere(plan)}\n")
    rows = show.table(
        "Bounds per decode token (projected)",
        "strategy",
        "loss-\nless",
        "needs\nslots",
        "needs\nmemory",
        "fits",
        "bytes\na token",
        "link\ntokens/s",
        "compute\ntokens/s",
        *(() if plan.disk is None else ("link, if routing\nwere uniform",)),
    )
    for row in plan.strategies:
        for bound in row.bounds:
            rows.add_row(
                row.strategy if bound.fallback_rate is None else f"{row.strategy}, r = {bound.fallback_rate:g}",
                "yes" if row.lossless else "no",
                f"{row.needs_slots:,}",
                show.memory(row.needs_nbytes),
                "yes" if row.budget_meets_needs else "no",
                show.moved(bound.nbytes),
                _or_dash(bound.link_tokens_per_s),
                show.rate(bound.compute_tokens_per_s),
                *(() if plan.disk is None else (_or_dash(bound.uniform_link_tokens_per_s),)),
            )
    out.print(rows)
    for line in _footnotes(plan, hardware):
        out.print(line)
    if plan.ceilings is not None:
        _print_ceilings(out, plan.ceilings)


def _or_dash(tokens_per_s: float | None) -> str:
    return "-" if tokens_per_s is None else show.rate(tokens_per_s)


def _elsewhere(plan: Plan) -> str:
    """Return the line on what holds all experts: host memory, or a disk."""
    if plan.disk is None:
        holds = {True: "fits", False: "DOES NOT FIT", None: "unknown"}[plan.host_fits]
        return (
            f"Host memory: all experts need {show.memory(plan.host_needed_nbytes)}; "
            f"{show.memory(plan.host_available_nbytes)} available: {holds}."
        )
    disk, needs = plan.disk, f"the file of all experts takes {show.moved(plan.disk.file_nbytes)}"
    if disk.is_there:
        return f"Disk: {needs}, and is in {disk.folder}."
    if disk.free_nbytes is None:
        return f"Disk: {needs}; give --store FOLDER to see whether it has room here."
    fits = "fits" if disk.file_nbytes <= disk.free_nbytes else "DOES NOT FIT"
    return f"Disk: {needs}; {show.moved(disk.free_nbytes)} are free in {disk.folder}: {fits}."


def _print_ceilings(out: Any, bounds: Ceilings) -> None:
    """Print the ceilings of MoBiLE over on-demand loading."""
    table = show.table(
        "Ceilings of MoBiLE over on-demand loading (closed forms)",
        "fallback\nrate r",
        "all loading\n2 / (1 + r)",
        "with compute\n1 / (1 - f/2 + r phi)",
    )
    for rate, loading, whole in bounds.speedups:
        table.add_row(f"{rate:g}", f"{loading:.2f}x", f"{whole:.2f}x")
    out.print()
    out.print(table)
    even = "at no rate" if bounds.break_even is None else f"at r = {bounds.break_even:.2f}"
    out.print(
        f"On-demand loading, which alternates with compute: {show.rate(bounds.on_demand_tokens_per_s)} tokens/s at "
        f"most. f = {bounds.loading_share:.3f} of its step grows with the experts run; a fallback costs "
        f"phi = {bounds.fallback_cost:.3f} of a step; both are as fast {even}. Overlap or a cache on the other side "
        "makes f smaller."
    )


def _footnotes(plan: Plan, hardware: HardwareProfile) -> list[str]:
    """Return the lines below the bounds: their formulas, and their sources."""
    geometry = plan.geometry
    full, little = geometry.top_k, geometry.little_k
    times = "2 / (1 + r)" if full == 2 * little else f"{full} / ({little} + {full - little} r)"
    lines = [
        "",
        f"link: {hardware.link_gb_per_s:.4g} GB/s over the bytes of one token's experts, without any cache. Strategies "
        "that keep experts beat it by 1 / (1 - hit rate); routing decides the hit rate. Copy latency is left out.",
        f"mobile: at the fallback rate r a token moves {little} + {full - little} r experts a layer, so the bound is "
        f"{times} times plain offloading's, if its needs fit and every prefetch is in time.",
        f"compute: without any waiting; max(bytes / {hardware.memory_gb_per_s:g} GB/s, flops / {hardware.tflops:g} "
        f"TFLOP/s) + {hardware.launch_seconds * 1e6:g} us a launch. Attention over the KV cache is left out.",
        "The lower of both bounds holds. needs: slots with which a strategy works as intended; with fewer it still "
        "runs exactly, only slower (resident does not run).",
        *(f"{hardware.name}: {source}" for source in hardware.sources),
    ]
    if plan.disk is not None:
        lines[1:1] = _disk_notes(plan.disk)
    if any("cpu-hybrid" in row.strategy.split("+") for row in plan.strategies):
        lines.append(
            "cpu-hybrid: missing experts are divided between link and CPU, and its bound is the lower one of both. The "
            f"CPU reads at {hardware.cpu_gb_per_s:g} GB/s."
        )
    if plan.slots == geometry.total_experts:
        lines.append("Every expert has a slot here, so a strategy that keeps experts loads each of them only once.")
    return lines


def _disk_notes(disk: DiskPart) -> list[str]:
    """Return the lines on a disk's rate, and on the projection."""
    lines = [
        "if routing were uniform: a projection, in which a token finds the share of its experts in slots that all "
        "slots are of all experts. Real routing repeats itself, and the hit rate decides.",
        "compute is the processor's. Strategies that compute experts where they lie are left out: a disk cannot.",
    ]
    if disk.measured is not None:
        rates = ", ".join(f"{rate:.2f} with {depth}" for depth, rate in disk.measured.items())
        lines.insert(0, f"disk: measured just now, GB/s by reads at once: {rates}.")
    return lines

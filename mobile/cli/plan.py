"""`mobile plan`: whether a model fits, and the bounds of each strategy, from the model's configuration alone."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobile.cli.memory_plan import Plan, plan
from mobile.cli.terminal import options, show
from mobile.costs.bounds import Ceilings
from mobile.costs.geometry import GEOMETRIES, Geometry
from mobile.costs.hardware import HardwareProfile, parse_nbytes, profile
from mobile.errors import Refused
from mobile.machine.host import host
from mobile.residency.residency import PREFILL_BUFFERS

if TYPE_CHECKING:
    from mobile.checkpoints.source import Source

EXAMPLES = """
examples:
  mobile plan olmoe-1b-7b --memory 8GiB             a preset: nothing is fetched
  mobile plan Qwen/Qwen3-30B-A3B --memory 12GiB     a hub id: only its configuration is fetched
  mobile plan qwen3-30b-a3b --host-memory 64GiB     on a machine with that much host memory
  mobile plan ./checkpoint --memory 2GiB --json | jq .slots
  mobile plan olmoe-1b-7b --hardware here.json      this machine, measured by: mobile doctor --calibrate --out here.json
  mobile plan olmoe-1b-7b --fallback-rate 0.2       MoBiLE's bound at that rate

The first line says whether the model runs here. exit code: 0 if it does; 1 if this host lacks the memory for its
experts, or the disk for its weights; 2 if it is refused, by `mobile.load` as well, like a budget that cannot hold it.
"""


def declare(commands: Any) -> None:
    """Add the command and its options."""
    parser = options.command(
        commands,
        "plan",
        run,
        help="whether a model fits, and the bounds of its speed",
        description="Divide a memory budget and compute the bounds of each strategy. No weight is read or fetched.",
        epilog=EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help=f"a folder, a hub id or a preset: {', '.join(GEOMETRIES)}")
    parser.add_argument("--memory", metavar="SIZE", help="device memory to use, like 12GiB (default: all of the card)")
    parser.add_argument("--host-memory", metavar="SIZE", help="host memory for experts (default: this machine's)")
    parser.add_argument("--hardware", default="auto", metavar="NAME", help=f"the card: {options.CARDS}")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=options.DTYPES,
        metavar="TYPE",
        help=f"dtype of the weights: {', '.join(options.DTYPES)}",
    )
    parser.add_argument(
        "--fallback-rate", type=float, metavar="R", help="fallback rate of `mobile` (default: both 0 and 1)"
    )
    options.trust(parser)
    options.json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; return 0 if the model runs here and 1 if the host lacks memory or disk. Raise Refused."""
    model = None
    try:
        rates: tuple[float, ...] = (0.0, 1.0)
        if arguments.fallback_rate is not None:
            if not 0 <= arguments.fallback_rate <= 1:
                raise Refused(f"A fallback rate lies between 0 and 1, and {arguments.fallback_rate} does not.")
            rates = (arguments.fallback_rate,)
        if arguments.model not in GEOMETRIES:
            show.waiting(f"reading {arguments.model} ...")
        hardware = profile(arguments.hardware)
        memory = hardware.vram_nbytes if arguments.memory is None else parse_nbytes(arguments.memory)
        usable = host().usable_nbytes if arguments.host_memory is None else parse_nbytes(arguments.host_memory)
        model = find(arguments.model, arguments.dtype, arguments.trust_remote_code)
        geometry, shortage = sizes(model, arguments.dtype, arguments.trust_remote_code)
        divided = plan(arguments.model, geometry, memory, hardware, usable, rates, shortage)
    except Refused as refused:
        if arguments.json:
            show.as_json({"runs": False, "because": str(refused), "fits": False, "reason": str(refused)})
        elif model is not None:
            print(f"does not run here: {arguments.model}, because: {refused}")
        raise
    if arguments.json:
        show.as_json(asdict(divided) | {"geometry": divided.geometry.as_record()})
    else:
        _print(divided, hardware)
    return 0 if divided.runs else 1


def find(model: str, dtype: str = "auto", trust_remote_code: bool = False) -> Geometry | Source:
    """Return a preset's sizes, or the checkpoint in a folder or of a hub id. Raise Refused if there is none."""
    if model in GEOMETRIES and not Path(model).is_dir():
        if dtype not in ("auto", "bfloat16"):
            raise Refused(f"The preset {model} is bfloat16; leave --dtype out, or name a checkpoint.")
        return GEOMETRIES[model]
    from mobile.checkpoints import examine

    return examine.find(model, trust_remote_code=trust_remote_code, patterns=examine.CONFIGURATION)


def sizes(
    model: Geometry | Source, dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[Geometry, str | None]:
    """Return the model's sizes, and why the disk has no room for its weights, or None if it has.

    The model is built without weights. Raise Refused as `mobile.load` does before it has the weights.
    """
    if isinstance(model, Geometry):
        return model, None
    from mobile.checkpoints.examine import examine
    from mobile.live_model import compat

    checkpoint = examine(model, dtype=dtype, trust_remote_code=trust_remote_code, bare=True)
    geometry = compat.geometry_of(checkpoint.empty, checkpoint.layers, checkpoint.layout)
    return geometry, checkpoint.disk_shortage()


def _print(plan: Plan, hardware: HardwareProfile) -> None:
    """Print the verdict, the division of the memory, the bounds and the ceilings."""
    out, geometry = show.console(), plan.geometry
    where = f"{plan.model} on {plan.hardware} with {show.memory(plan.memory_nbytes)}"
    verdict = f"runs: {where}" if plan.runs else f"does not run here: {where}, because {plan.because}"
    out.print(verdict)
    out.print(
        f"{plan.model}: {geometry.moe_layers} MoE layers of {geometry.experts} experts, top {geometry.top_k}, on "
        f"{plan.hardware} with {show.memory(plan.memory_nbytes)}. Computed from sizes; nothing was run.\n"
    )
    device = show.table("Device memory", "part", "size", "")
    device.add_row("dense weights", show.memory(plan.resident_nbytes), "with embedding and head")
    device.add_row("reserve", show.memory(plan.reserve_nbytes), "context, workspace, KV cache")
    each = show.memory(geometry.expert_nbytes)
    device.add_row("prefill buffers", show.memory(plan.staging_nbytes), f"{PREFILL_BUFFERS} experts of {each}")
    share = f"{plan.slots:,} of {geometry.total_experts:,} experts ({plan.slots / geometry.total_experts:.1%})"
    device.add_row("expert slots", show.memory(plan.slots_nbytes), share)
    device.columns[-1].justify = "left"
    out.print(device)
    holds = {True: "fits", False: "DOES NOT FIT", None: "unknown"}[plan.host_fits]
    out.print(
        f"\nHost memory: all experts need {show.memory(plan.host_needed_nbytes)}; "
        f"{show.memory(plan.host_available_nbytes)} available: {holds}.\n"
    )
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
                "-" if bound.link_tokens_per_s is None else show.rate(bound.link_tokens_per_s),
                show.rate(bound.compute_tokens_per_s),
            )
    out.print(rows)
    for line in _footnotes(plan, hardware):
        out.print(line)
    if plan.ceilings is not None:
        _print_ceilings(out, plan.ceilings)


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
        f"link: {hardware.link_gb_per_s:g} GB/s over the bytes of one token's experts, without any cache. Strategies "
        "that keep experts beat it by 1 / (1 - hit rate); routing decides the hit rate. Copy latency is left out.",
        f"mobile: at the fallback rate r a token moves {little} + {full - little} r experts a layer, so the bound is "
        f"{times} times plain offloading's, if its needs fit and every prefetch is in time.",
        f"compute: without any waiting; max(bytes / {hardware.memory_gb_per_s:g} GB/s, flops / {hardware.tflops:g} "
        f"TFLOP/s) + {hardware.launch_seconds * 1e6:g} us a launch. Attention over the KV cache is left out.",
        "The lower of both bounds holds. needs: slots with which a strategy works as intended; with fewer it still "
        "runs exactly, only slower (resident does not run).",
        *(f"{hardware.name}: {source}" for source in hardware.sources),
    ]
    if any(row.strategy == "cpu-hybrid" for row in plan.strategies):
        lines.append(
            "cpu-hybrid: missing experts are divided between link and CPU, and its bound is the lower one of both. The "
            f"CPU reads at {hardware.cpu_gb_per_s:g} GB/s."
        )
    if plan.slots == geometry.total_experts:
        lines.append("Every expert has a slot here, so a strategy that keeps experts loads each of them only once.")
    return lines

"""`mobile plan`: whether a model fits, and the bounds of each strategy, from the model's configuration alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobile.cli.disk_plan import disk_part, host_budget, on_processor, plan_on_disk
from mobile.cli.memory_plan import CheckpointPart, DiskPart, Plan, plan, strategy_rows
from mobile.cli.terminal import options, show
from mobile.costs.bounds import Ceilings
from mobile.costs.cost_model import CostModel
from mobile.costs.geometry import GEOMETRIES, Geometry
from mobile.costs.hardware import HardwareProfile, parse_gb_per_s, parse_nbytes, profile
from mobile.costs.rows import AS_IS, check_rows
from mobile.errors import Refused
from mobile.machine.host import host
from mobile.policies.strategy import resolve
from mobile.residency.residency import PREFILL_BUFFERS
from mobile.visible import visible

if TYPE_CHECKING:
    from mobile.checkpoints.examine import Examined
    from mobile.checkpoints.source import Source

MEASURE = "measure"
EXAMPLES = """
examples:
  mobile plan olmoe-1b-7b --memory 8GiB             a preset: nothing is fetched
  mobile plan Qwen/Qwen3-30B-A3B --memory 12GiB     a hub id: only its configuration is fetched
  mobile plan qwen3-30b-a3b --host-memory 64GiB     on a machine with that much host memory
  mobile plan ./checkpoint --memory 2GiB --json | jq .slots
  mobile plan olmoe-1b-7b --hardware here.json      this machine, measured by: mobile doctor --calibrate --out here.json
  mobile plan olmoe-1b-7b --fallback-rate 0.2       MoBiLE's bound at that rate
  mobile plan olmoe-1b-7b --strategy mobile --strategy mobile+cpu-hybrid
  mobile plan qwen3-30b-a3b --host-memory 16GiB --disk 3.5GB/s
  mobile plan qwen3-30b-a3b --disk measure --store /data/rows
  mobile plan qwen3-30b-a3b --memory 12GiB --rows int4

With --disk the experts lie in a file and the processor computes. Host memory is then divided: --memory, or all of
--host-memory, or four fifths of what is free here, which is what `mobile.load` takes. The disk's room is looked at
where its rate is measured or --store is given.

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
    parser.add_argument("--host-memory", metavar="SIZE", help="host memory (default: this machine's)")
    parser.add_argument(
        "--disk", metavar="RATE", help="keep experts on a disk of that rate, like 3.5GB/s, or `measure` this machine's"
    )
    parser.add_argument("--store", metavar="FOLDER", help="where their file would lie (default: `disk`, in the cache)")
    parser.add_argument("--hardware", default="auto", metavar="NAME", help=f"the card: {options.CARDS}")
    options.rows(parser, "as-is")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=options.DTYPES,
        metavar="TYPE",
        help=f"dtype of the weights: {', '.join(options.DTYPES)}",
    )
    parser.add_argument(
        "--strategy", action="append", metavar="NAME", help="only this one; repeat it to compare (default: all)"
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
        check_rows(arguments.rows)
        chosen = list(map(resolve, dict.fromkeys(arguments.strategy or ())))
        if arguments.model not in GEOMETRIES:
            show.waiting(f"reading {arguments.model} ...")
        hardware = profile(arguments.hardware)
        asked = _asked(arguments)
        memory = hardware.vram_nbytes if arguments.memory is None else parse_nbytes(arguments.memory)
        usable = host().usable_nbytes if arguments.host_memory is None else parse_nbytes(arguments.host_memory)
        model = find(arguments.model, arguments.dtype, arguments.trust_remote_code)
        found = sizes(model, arguments.dtype, arguments.trust_remote_code, arguments.rows)
        if asked is None:
            divided = plan(arguments.model, found.geometry, memory, hardware, usable, rates, found.weights_shortage)
        else:
            budget = host_budget(arguments.memory, arguments.host_memory, usable)
            disk = asked.part(found)
            hardware = on_processor(hardware, disk.gb_per_s)
            divided = plan_on_disk(arguments.model, found.paged, budget, hardware, disk, rates, found.weights_shortage)
        divided = replace(divided, checkpoint=found.checkpoint)
        if chosen:
            cost, on_disk = CostModel(hardware, divided.geometry), asked is not None
            rows = strategy_rows(cost, divided.slots, rates, on_disk=on_disk, chosen=chosen)
            divided = replace(divided, strategies=rows)
    except Refused as refused:
        if arguments.json:
            show.as_json({"runs": False, "because": str(refused), "fits": False, "reason": str(refused)})
        elif model is not None:
            print(visible(f"does not run here: {arguments.model}, because: {refused}"))
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


@dataclass(frozen=True)
class Sizes:
    """A model's sizes, with rows in memory and, `paged`, on a disk, where each takes whole pages.

    `weights_shortage` says why the disk has no room for its weights, None if it has. `rows_path` gives the file of its
    experts in a folder, None for a preset. `checkpoint` are the files of a quantised
    one.
    """

    geometry: Geometry
    paged: Geometry
    weights_shortage: str | None = None
    rows_path: Callable[[Path], Path] | None = None
    checkpoint: CheckpointPart | None = None


def sizes(model: Geometry | Source, dtype: str = "auto", trust_remote_code: bool = False, rows: str = "as-is") -> Sizes:
    """Return the model's sizes with its experts in a row format; it is built without weights.

    Raise Refused as `mobile.load` does before it has them.
    """
    if isinstance(model, Geometry):
        return Sizes(model.with_rows(rows), model.with_rows(rows))
    from mobile.checkpoints.examine import examine
    from mobile.checkpoints.loading import rows_path
    from mobile.live_model import compat

    checkpoint = examine(model, dtype=dtype, trust_remote_code=trust_remote_code, bare=True, rows=rows)
    layout = compat.packed_layout(checkpoint.layout, checkpoint.layers, rows)
    layouts = layout, layout.page_aligned()
    in_memory, paged = (compat.geometry_of(checkpoint.empty, checkpoint.layers, layout) for layout in layouts)
    path = partial(rows_path, checkpoint, rows=layout.rows)
    return Sizes(in_memory, paged, checkpoint.disk_shortage(), path, _part(checkpoint))


def _part(checkpoint: Examined) -> CheckpointPart | None:
    """Return what a plan says of a quantised checkpoint's files, None for others."""
    if checkpoint.weights is None or checkpoint.quantiser is None:
        return None
    source, files = checkpoint.source, checkpoint.weights.files
    method = checkpoint.quantiser.quantization_config.quant_method
    return CheckpointPart(source.nbytes(files), source.missing_nbytes(files), method.value, checkpoint.unkept)


@dataclass(frozen=True)
class AskedDisk:
    """The disk of --disk: its rate (decimal GB/s), None to measure it, and the folder, None on another machine."""

    gb_per_s: float | None
    folder: Path | None

    def part(self, found: Sizes) -> DiskPart:
        """Return the disk as a plan has it; measures it if asked to. Raise Refused if that cannot be done."""
        rate, rates = self.gb_per_s, None
        if rate is None:
            from mobile.machine.disk import disk

            assert self.folder is not None
            show.waiting(f"measuring the disk under {self.folder} ...")
            measured = disk(self.folder, found.paged.expert_nbytes)
            rate, rates = measured.link_gb_per_s, measured.gb_per_s
            if rate is None:
                raise Refused(f"The disk cannot be measured: {measured.problem}")
        path = found.rows_path(self.folder) if self.folder is not None and found.rows_path is not None else None
        is_there = path is not None and path.exists()
        return disk_part(found.paged, rate, rates, self.folder, is_there=is_there)


def _asked(arguments: argparse.Namespace) -> AskedDisk | None:
    """Return the disk asked for; None where experts lie in memory. Raise Refused for a rate or a folder that is none.

    A folder is looked at where the disk is measured, and where one is named; else the rate is of another machine.
    """
    if arguments.disk is None:
        if arguments.store is not None:
            raise Refused("--store is a place for experts on a disk; add --disk measure, or a rate like 3.5GB/s.")
        return None
    rate = None if arguments.disk == MEASURE else parse_gb_per_s(arguments.disk)
    if rate is not None and arguments.store is None:
        return AskedDisk(rate, None)
    show.waiting("importing PyTorch ...")
    from mobile.runtime.attach_plan import AttachOptions, folder_of

    return AskedDisk(rate, folder_of(AttachOptions(link="disk", store=arguments.store)))


def _print(plan: Plan, hardware: HardwareProfile) -> None:
    """Print the verdict, the division of the memory, the bounds and the ceilings."""
    out, geometry = show.console(), plan.geometry
    where = f"{plan.model} on {plan.hardware} with {show.memory(plan.memory_nbytes)}"
    computed_on = f"{plan.hardware} with {show.memory(plan.memory_nbytes)}"
    if plan.disk is not None:
        computed_on = f"the processor of {plan.hardware}, from a disk"
        where = (
            f"{plan.model} from a disk of {plan.disk.gb_per_s:.3g} GB/s with {show.memory(plan.memory_nbytes)} of host "
            "memory"
        )
    verdict = f"runs: {where}" if plan.runs else f"does not run here: {where}, because {plan.because}"
    out.print(verdict)
    out.print(
        f"{plan.model}: {geometry.moe_layers} MoE layers of {geometry.experts} experts, top {geometry.top_k}, on "
        f"{computed_on}.{_packed(geometry)} Computed from sizes; nothing was run."
    )
    if plan.checkpoint is not None:
        out.print(_files(plan.checkpoint, geometry))
    out.print()
    device = show.table("Device memory" if plan.disk is None else "Host memory", "part", "size", "")
    device.add_row("dense weights", show.memory(plan.resident_nbytes), "with embedding and head")
    device.add_row("reserve", show.memory(plan.reserve_nbytes), "context, workspace, KV cache")
    each = show.memory(geometry.expert_nbytes)
    device.add_row("prefill buffers", show.memory(plan.staging_nbytes), f"{PREFILL_BUFFERS} experts of {each}")
    share = f"{plan.slots:,} of {geometry.total_experts:,} experts ({plan.slots / geometry.total_experts:.1%})"
    device.add_row("expert slots", show.memory(plan.slots_nbytes), share)
    device.columns[-1].justify = "left"
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

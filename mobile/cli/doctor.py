"""`mobile doctor`: this machine's software, memory, GPUs, disk and link rates, and advice on what to change."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from mobile.cli.calibrate import calibrate
from mobile.cli.terminal import options, show
from mobile.costs.geometry import GEOMETRIES
from mobile.errors import Refused
from mobile.machine.gpu import UNKNOWN_LINK, Gpu, LinkRates, LinkState, cuda_uuid, gpus, link_rates
from mobile.machine.host import Host, Limit, Software, host, memcpy_gb_per_s, software

if TYPE_CHECKING:
    from mobile.machine.disk import Disk

EXAMPLES = """
examples:
  mobile doctor
  mobile doctor --json | jq .host.memlock_nbytes
  mobile doctor --store /data/rows --json | jq .disk.gb_per_s
  mobile doctor --calibrate --out here.json         then: mobile plan olmoe-1b-7b --hardware here.json
  mobile doctor --calibrate --link disk --out disk.json

Unknown is null in the JSON. Measuring takes a few seconds, 0.5 GiB of host memory, and 0.2 GB of the disk for a file
that has no name and is gone afterwards.

--calibrate times copies, kernels and decode steps of this machine the way the engine does them, and fits the numbers
of the virtual clock. It takes about a minute, with nothing else running. On a GPU it takes 8 GiB of
device memory and 4 GiB of host memory. Without a GPU the link is a copy within host memory, and the profile describes
this processor. With --link disk rows of 6 to 50 MB are read from 1.5 GB of files in the folder, which have no names and
are gone afterwards, and the processor computes, which takes 4 GiB of host memory.
"""


@dataclass(frozen=True)
class Report:
    """The state of this machine. `rates` are of torch's current CUDA device, where models go, of UUID `rates_of`."""

    software: Software
    host: Host
    memcpy_gb_per_s: float | None
    memcpy_threads: int
    gpus: tuple[Gpu, ...]
    cuda: bool
    rates: LinkRates | None
    rates_of: str | None
    disk: Disk | None


def examine(store: str | None = None) -> Report:
    """Return the state of this machine; copies are measured, and reads from the folder that `store` names.

    Imports torch. Raise Refused for a store that is no folder.
    """
    show.waiting("looking at this machine ...")
    import torch

    from mobile.machine.disk import disk
    from mobile.runtime.attach_plan import AttachOptions, folder_of

    folder = folder_of(AttachOptions(link="disk", store=store))
    assert folder is not None
    return Report(
        software=software(),
        host=host(),
        memcpy_gb_per_s=memcpy_gb_per_s(),
        memcpy_threads=torch.get_num_threads(),
        gpus=tuple(gpus()),
        cuda=torch.cuda.is_available(),
        rates=link_rates(),
        rates_of=cuda_uuid(),
        disk=disk(folder),
    )


def advice(report: Report) -> list[str]:
    """Return one sentence for each problem, with its remedy."""
    return [*_software_advice(report), *_link_advice(report), *_host_advice(report), *_disk_advice(report)]


def _software_advice(report: Report) -> Iterator[str]:
    if report.software.problem is not None:
        yield report.software.problem
    if report.cuda:
        if report.software.pynvml is None:
            yield "Install nvidia-ml-py to see the link's generation and width."
    elif report.gpus and report.software.torch_cuda is None:
        yield f"There is a {report.gpus[0].name}, but this torch is built without CUDA; install a CUDA build of torch."
    elif report.gpus:
        yield (
            f"There is a {report.gpus[0].name}, but torch cannot use it; check that driver {report.gpus[0].driver} "
            f"supports CUDA {report.software.torch_cuda} and that CUDA_VISIBLE_DEVICES does not hide it."
        )
    else:
        yield (
            "No CUDA device: bytes are moved and answers are real, time is virtual (computed). Speed needs a GPU; "
            "experts on a disk take real time: --link disk."
        )


def _link_advice(report: Report) -> Iterator[str]:
    rates = report.rates
    if rates is None:
        return
    best = next((gpu.link_max for gpu in report.gpus if gpu.uuid == report.rates_of), UNKNOWN_LINK)
    now = rates.under_load
    if now.width is not None and best.width is not None and now.width < best.width:
        yield (
            f"The link runs {now.width} of {best.width} lanes under load; move the card to a full-width slot, and look "
            "for a riser or an M.2 drive that shares its lanes."
        )
    if now.generation is not None and best.generation is not None and now.generation < best.generation:
        yield (
            f"The link runs at generation {now.generation} of {best.generation} under load; set the slot's PCIe speed "
            "to auto in the firmware, and check the riser."
        )
    if not rates.registers:
        yield (
            "The driver would not page-lock ordinary memory, so experts move at the pageable rate; WSL2 and some "
            "sandboxes allow little or none of it, whatever RLIMIT_MEMLOCK says: run on Linux itself, outside of the "
            "sandbox, or free host memory."
        )


def _host_advice(report: Report) -> Iterator[str]:
    usable = report.host.usable_nbytes
    if usable is None:
        return
    needs = {name: preset.total_experts * preset.expert_nbytes for name, preset in GEOMETRIES.items()}
    short = [f"{name} ({show.memory(need)})" for name, need in needs.items() if need > usable]
    if short:
        limited = isinstance(report.host.container_limit_nbytes, int)
        remedy = "raise the container's limit or add memory" if limited else "free or add memory"
        yield (
            f"{show.memory(usable)} of host memory cannot hold the experts of {', '.join(short)}; {remedy} for those, "
            "or keep their experts on a disk: --link disk."
        )


def _disk_advice(report: Report) -> Iterator[str]:
    if report.disk is None:
        return
    if report.disk.problem is not None:
        yield f"The disk was not measured: {report.disk.problem}"
    if report.disk.direct is False:
        yield (
            f"{report.disk.folder} takes no direct reads, so experts there would be read through the page cache, and "
            "the rates may be the cache's; name a folder on a disk of this machine with --store."
        )


# --- the command ------------------------------------------------------------------------------------


def declare(commands: Any) -> None:
    """Add the command and its options."""
    parser = options.command(
        commands,
        "doctor",
        run,
        help="what this machine offers, and what to change",
        description="Show versions, GPU, link, host memory and disk; measure copies and reads; say what to change.\n"
        "With --calibrate: fit a hardware profile to this machine.",
        epilog=EXAMPLES,
    )
    options.json(parser)
    group = parser.add_argument_group("calibration")
    group.add_argument("--calibrate", action="store_true", help="time this machine and fit a hardware profile to it")
    group.add_argument("--out", type=Path, metavar="FILE.json", help="write the profile, for --hardware FILE.json")
    group.add_argument(
        "--device", metavar="NAME", help="the device to time: cpu, cuda, cuda:1 (default: a GPU if there)"
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=options.DTYPES,
        metavar="TYPE",
        help="dtype of the timed weights (default: bfloat16 on a GPU or from a disk, else float32)",
    )
    group.add_argument(
        "--link", default="auto", choices=("auto", "disk"), metavar="KIND", help="disk: rows are read from a file"
    )
    parser.add_argument("--store", metavar="FOLDER", help="where rows would lie (default: `disk`, in the cache)")


def run(arguments: argparse.Namespace) -> int:
    """Print the state of this machine and advice, or calibrate; return 0. Raise Refused."""
    if arguments.calibrate:
        calibrate(
            arguments.device,
            arguments.dtype,
            arguments.out,
            as_json=arguments.json,
            link=arguments.link,
            store=arguments.store,
        )
        return 0
    only = (arguments.out, arguments.device, None if arguments.dtype == "auto" else arguments.dtype)
    if any(given is not None for given in only) or arguments.link != "auto":
        raise Refused("--out, --device, --dtype and --link belong to a calibration; add --calibrate.")
    report = examine(arguments.store)
    if arguments.json:
        show.as_json({**asdict(report), "usable_nbytes": report.host.usable_nbytes, "advice": advice(report)})
        return 0
    out = show.console()
    gpus_here = [_gpu(report, gpu) for gpu in report.gpus]
    for section in (_software(report.software), _host(report), _disk(report.disk), *gpus_here):
        out.print(section)
        out.print()
    if not report.gpus:
        out.print("No GPU memory.\n")
    out.print("What to change", style="bold")
    for line in advice(report) or ["Nothing."]:
        out.print(f"- {line}")
    return 0


def _section(title: str, rows: dict[str, str]) -> Table:
    """Return a table of names and values."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", min_width=24)
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _software(versions: Software) -> Table:
    return _section(
        "Software",
        {
            "Python": versions.python,
            "torch": f"{versions.torch}, CUDA {versions.torch_cuda or 'not built in'}",
            "Transformers": f"{versions.transformers}, {'supported' if versions.problem is None else 'NOT SUPPORTED'}",
            "triton": versions.triton or "absent",
            "pynvml (nvidia-ml-py)": versions.pynvml or "absent",
        },
    )


def _host(report: Report) -> Table:
    memory = report.host
    return _section(
        "Host",
        {
            "CPU": f"{memory.cpu or 'unknown'}, {memory.cpus_allowed or 'unknown'} allowed",
            "memory": f"{show.memory(memory.memory_available_nbytes)} available of "
            f"{show.memory(memory.memory_total_nbytes)}",
            "container limit": _limit(memory.container_limit_nbytes),
            "swap": "none"
            if memory.swap_total_nbytes == 0
            else f"{show.memory(memory.swap_free_nbytes)} free of {show.memory(memory.swap_total_nbytes)}",
            "RLIMIT_MEMLOCK": _limit(memory.memlock_nbytes),
            "memcpy": f"{_rate(report.memcpy_gb_per_s)}, {report.memcpy_threads} thread(s), measured",
        },
    )


def _disk(found: Disk | None) -> Table:
    """Return the disk's rates, as the link would read it."""
    if found is None or found.depth is None:
        return _section("Disk", {"reads": "unknown"})
    rates = ", ".join(f"{rate:.2f}" for rate in found.gb_per_s.values())
    return _section(
        "Disk",
        {
            "folder": found.folder,
            "page cache": "avoided" if found.direct else "IN THE WAY",
            f"{', '.join(map(str, found.gb_per_s))} reads at once": f"{rates} GB/s, rows of "
            f"{show.moved(found.row_nbytes)}, measured",
            "the link would take": f"{found.depth} at once",
        },
    )


def _gpu(report: Report, gpu: Gpu) -> Table:
    rows = {
        "driver": gpu.driver or "unknown",
        "memory": f"{show.memory(gpu.memory_free_nbytes)} free of {show.memory(gpu.memory_total_nbytes)}",
        "compute capability": gpu.compute_capability or "unknown",
        "link now / max": f"{_pcie(gpu.link_now)} / {_pcie(gpu.link_max)}",
    }
    if report.rates is not None and gpu.uuid == report.rates_of:
        rows |= {
            "link under load": _pcie(report.rates.under_load),
            "copies, page-locked": f"{_rate(report.rates.pinned_gb_per_s)}, measured",
            "copies, pageable": f"{_rate(report.rates.pageable_gb_per_s)}, measured",
        }
    return _section(gpu.name, rows)


def _limit(nbytes: Limit) -> str:
    return nbytes if isinstance(nbytes, str) else show.memory(nbytes)


def _rate(gb_per_s: float | None) -> str:
    return "unknown" if gb_per_s is None else f"{gb_per_s:.1f} GB/s"


def _pcie(link: LinkState) -> str:
    if link.generation is None or link.width is None:
        return "unknown"
    return f"PCIe {link.generation}.0 x{link.width}"

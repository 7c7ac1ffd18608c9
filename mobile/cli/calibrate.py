"""`mobile doctor --calibrate`: time this machine, fit a hardware profile to it, print it and write it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mobile import outputs
from mobile.cli.terminal import show
from mobile.costs.hardware import HardwareProfile, write_profile
from mobile.errors import Refused
from mobile.visible import on_one_line

if TYPE_CHECKING:
    import torch


def calibrate(
    device: str | None, dtype: str, out: Path | None, *, as_json: bool, link: str = "auto", store: str | None = None
) -> None:
    """Measure, fit, print, and write `out`. Imports torch. Raise Refused, if possible before anything is measured.

    The link "disk" reads a file of rows where `store` says, as `mobile.load` has it, and the processor computes.
    """
    if out is not None and out.suffix != ".json":
        raise Refused(f"--out {out} must end in .json, which is how --hardware tells a file from a name.")
    if out is not None and not out.absolute().parent.is_dir():
        raise Refused(f"The folder of --out {outputs.printable(out)} does not exist; make it first.")
    if out is not None:
        outputs.check_file(out)
    show.waiting("importing PyTorch ...")
    import torch

    from mobile.machine.fit_profile import fit
    from mobile.machine.measure import measure
    from mobile.runtime.attach_plan import AttachOptions, folder_of

    folder = folder_of(AttachOptions(link=link, store=store))
    timed = _device("cpu" if folder and device is None else device)
    if folder and timed.type != "cpu":
        raise Refused(f"With experts on a disk the processor computes; leave --device {device} out.")
    halved = folder or timed.type == "cuda"
    torch_dtype = getattr(torch, {"auto": "bfloat16" if halved else "float32"}.get(dtype, dtype))
    screen = show.console(stderr=True)
    with Progress(
        SpinnerColumn(),
        TextColumn("measuring {task.description}", markup=False),
        TimeElapsedColumn(),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    ) as progress:
        task = progress.add_task("this machine", total=None)

        def say(part: str) -> None:
            progress.update(task, description=on_one_line(part))
            if not screen.is_terminal:
                show.note(f"measuring {part}")

        measured = measure(timed, torch_dtype, folder=folder, say=say)
    card = fit(measured)
    if out is not None:
        write_profile(card, out)
    if as_json:
        show.as_json(
            {"profile": asdict(card), "measurements": asdict(measured), "file": None if out is None else str(out)}
        )
        return
    _print(card, out)


def _print(card: HardwareProfile, out: Path | None) -> None:
    """Print a fitted profile and where it was written."""
    screen = show.console()
    print_profile(screen, card, "fitted")
    if out is not None:
        screen.print(f"\nWritten to {out}; use it like: mobile plan olmoe-1b-7b --hardware {out}")
    else:
        screen.print("\nNothing was written; give --out FILE.json to use it as --hardware FILE.json.")


def _device(name: str | None) -> torch.device:
    """Return the device to time: the one of that name, or a GPU if there is one. Raise Refused if it is not here."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda" if gpus else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise Refused(f"--device {name} is no device; give cpu, cuda or cuda:1, or leave it out.") from None
    if device.type == "cuda" and not gpus:
        raise Refused("There is no CUDA device that torch can use here; leave --device out, or give cpu.")
    if device.type not in ("cpu", "cuda") or (device.index or 0) >= max(1, gpus):
        raise Refused(f"--device {name} is not among what can be timed here: cpu, and {gpus} CUDA device(s).")
    return device


def print_profile(screen: Console, card: HardwareProfile, numbers_are: str) -> None:
    """Print the numbers of a profile, which are "fitted" or "assumed", and the sources of each."""
    table = show.table(card.name, "number", numbers_are)
    for name, value in _rows(card).items():
        table.add_row(name, value)
    screen.print(table)
    screen.print()
    for source in card.sources:
        screen.print(f"- {source}")


def _rows(card: HardwareProfile) -> dict[str, Any]:
    """Return the profile's numbers as text, by a name for each."""

    def micro(seconds: float) -> str:
        return f"{seconds * 1e6:,.1f} us"

    ahead = {
        "the host: a kernel launch": micro(card.host_launch_seconds),
        "the host: a copy begun": micro(card.host_copy_seconds),
        "the host: a result read": micro(card.host_read_seconds),
        "the host: a layer beyond its launches": micro(card.host_layer_seconds),
        "the host: a step beyond its layers": micro(card.host_step_seconds),
    }
    return {
        "link": f"{card.link_gb_per_s:,.2f} GB/s",
        "link, latency of a copy": micro(card.link_latency_seconds),
        "device memory, read by kernels": f"{card.memory_gb_per_s:,.1f} GB/s",
        "a kernel launch": micro(card.launch_seconds),
        "dense products": f"{card.tflops:,.3g} TFLOP/s",
        "a layer beyond its bytes and launches": micro(card.layer_seconds),
        "a step beyond its layers": micro(card.step_seconds),
        **(ahead if card.host_launch_seconds else {}),
        "processor, reading experts": f"{card.cpu_gb_per_s:,.1f} GB/s",
        "processor, dense products": f"{card.cpu_tflops:,.3g} TFLOP/s",
        "device memory": show.memory(card.vram_nbytes),
        "of it reserved": show.memory(card.reserve_nbytes),
    }

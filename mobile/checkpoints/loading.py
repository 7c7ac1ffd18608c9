"""`mobile.load`: from a checkpoint to an offloaded model.

Experts go from the files into the host store and are never all held anywhere else. Some settings of Transformers and
PyTorch are changed for the time of reading; each change leaves a step on a `Cleanup` list that undoes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from safetensors import SafetensorError
from torch import nn

from mobile.checkpoints import examine
from mobile.checkpoints.direct import Reading, plan_readings, stored_in
from mobile.checkpoints.examine import Examined
from mobile.checkpoints.packing import Unkept, own_packing
from mobile.checkpoints.reading import read_converted, read_directly
from mobile.checkpoints.source import Source
from mobile.costs.hardware import HardwareProfile
from mobile.costs.rows import AS_IS
from mobile.errors import Refused, one_line
from mobile.live_model import caller_modes, compat
from mobile.live_model.cleanup import Cleanup, with_cleanup
from mobile.machine.host import free_disk_nbytes, host, memory_shortage, nearest_folder, share_of_free
from mobile.policies.strategy import Strategy, resolve
from mobile.residency.residency import PREFILL_BUFFERS
from mobile.runtime.attach_plan import AttachOptions, AttachPlan, folder_of, plan_attach
from mobile.runtime.attachment import install
from mobile.runtime.device_memory import refusing
from mobile.store import DiskStore, HostStore, Store

ONE_AT_A_TIME = threading.RLock()  # one load at a time: it changes settings of Transformers that all threads share


def load(
    source: str | os.PathLike[str],
    strategy: str | Strategy = "mobile",
    *,
    memory: int | str | None = None,
    slots: int | None = None,
    hardware: str | HardwareProfile = "auto",
    link: str = "auto",
    link_gb_per_s: float | None = None,
    gamma: float | str | os.PathLike[str] | None = None,
    geometry: str | None = None,
    kernel: str = "auto",
    device: str | int | torch.device | None = "auto",
    dtype: torch.dtype | str | None = "auto",
    progress: bool | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    store: str | os.PathLike[str] | None = None,
    rows: str = "as-is",
    context_tokens: int | None = None,
) -> nn.Module:
    """Load a safetensors checkpoint (a folder or a hub id) and `attach` it; most keywords are attach's.

    The weights are those that Transformers itself would load. `device` "auto" is the GPU if there is one, or the CPU
    for experts on disk; a number is that GPU. `dtype` "auto" is the checkpoint's; MXFP4 and FP8 checkpoints are
    dequantised to it. `progress` shows a bar on stderr; None shows it on a terminal. `revision` is a branch, a tag or a
    commit of a hub id. Experts go from the files into the host store one layer at a time, so that host memory peaks at
    the store and the dense weights, plus one layer. With `link="disk"`, or a `store`, they are written into a file
    instead, once, which later loads of the same weights use again. With `rows` "int8" or "int4" each expert is
    quantised as it is read, and the store, the file and the slots hold packed rows; no calibration data is needed.

    Raise Refused, if possible before any weight is fetched or read, for a missing, truncated or incomplete checkpoint,
    one without safetensors or with an adapter, and for everything that attach refuses. Neither that nor an interrupt
    leaves anything behind. The caller's default device, inference mode and autocast change nothing.
    """
    compat.check_version()
    strategy = resolve(strategy, gamma)
    on_disk = folder_of(AttachOptions(link=link, store=store)) is not None
    target = _device("cpu" if on_disk and device in ("auto", None) else device)

    def work() -> Any:
        # 1. Everything that can be refused: the checkpoint, the strategy's budget, the host's memory.
        location = examine.find(source, revision=revision, trust_remote_code=trust_remote_code)
        checkpoint = with_cleanup(lambda cleanup: _examine(location, dtype, trust_remote_code, rows, cleanup))
        options = AttachOptions(
            strategy=strategy,
            memory=share_of_free(host().usable_nbytes) if on_disk and memory is None and slots is None else memory,
            slots=slots,
            hardware=hardware,
            link=link,
            link_gb_per_s=link_gb_per_s,
            gamma=gamma,
            geometry=geometry,
            kernel=kernel,
            store=store,
            rows=rows,
            context_tokens=context_tokens,
        )
        plan = plan_attach(checkpoint.empty, checkpoint.layers, checkpoint.layout, target, options)
        if plan.folder is not None:
            _check_room(checkpoint, plan, plan.folder)
            _check_host_memory(_other_nbytes(plan), "the dense weights and the slots")
        elif target.type == "cpu":
            experts = plan.native.experts_nbytes + _other_nbytes(plan)
            _check_host_memory(experts, "the experts, the other weights and the slots")
        else:
            _check_host_memory(plan.native.experts_nbytes)
        # 2. The weights: into the cache, then the experts into the store and the others into the model.
        shown = sys.stderr.isatty() if progress is None else progress
        _fetch(checkpoint, shown)
        with refusing("Reading the weights", "close other programs, or give a store on a disk"):
            model, filled = with_cleanup(lambda cleanup: _read(checkpoint, plan, shown, cleanup))
        if checkpoint.unkept is not None:
            warnings.warn(_dequantised(checkpoint, plan), stacklevel=2)
        # 3. The model is complete but for its experts, which the engine runs from the store.
        with refusing(f"Putting the dense weights on {target}", "give less memory, or end what else uses it"):
            model = model.eval().to(target)
        return install(model, compat.moe_layers(model), filled, plan)

    try:
        return caller_modes.plain(work)()
    except Refused as refused:
        if _interrupted(refused):
            raise KeyboardInterrupt from refused
        raise


def _interrupted(error: BaseException | None) -> bool:
    """Return whether the error came of Ctrl-C.

    An interrupt inside of Transformers or of a clean-up step may be followed by another error, which is raised in its
    place and is turned into a refusal. The interrupt is then among the contexts of the refusal.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _device(device: str | int | torch.device | None) -> torch.device:
    """Return the device of that name or number; "auto" is a GPU if there is one. Raise Refused if it is not here."""
    if device in ("auto", None):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    number = str(device).isdecimal() and not isinstance(device, bool)
    try:
        place = torch.device(f"cuda:{device}" if number else device)
    except (RuntimeError, TypeError, ValueError):
        place = torch.device("meta")
    if place.type == "cpu":
        return torch.device("cpu")
    if place.type == "cuda" and (place.index or 0) < torch.cuda.device_count():
        return place
    here = "cpu, cuda or cuda:N" if torch.cuda.is_available() else "cpu"
    raise Refused(f"There is no device {device} here; leave device out, or give {here}.")


def _other_nbytes(plan: AttachPlan) -> int:
    """Return the bytes that a model on the CPU takes in host memory besides the store: dense weights and slots."""
    return plan.native.resident_nbytes + (plan.slots + PREFILL_BUFFERS) * plan.layout.nbytes


def _check_room(checkpoint: Examined, plan: AttachPlan, folder: Path) -> None:
    """Raise Refused if the folder's disk has no room for the experts, unless a file from an earlier load is there."""
    free = free_disk_nbytes(folder)
    needed = plan.native.experts_nbytes
    if free < needed and not rows_path(checkpoint, folder, plan.layout.rows).is_file():
        raise Refused(
            f"The experts take {needed / 1e9:.1f} GB on disk and {free / 1e9:.1f} GB are free under "
            f"{nearest_folder(folder)}; name a folder with room as store."
        )


def _check_host_memory(nbytes: int, of: str = "the experts") -> None:
    """Raise Refused if this machine, or the container's limit, leaves less than `nbytes`, which the parts `of` take."""
    shortage = memory_shortage(nbytes, host().usable_nbytes, of)
    if shortage is not None:
        raise Refused(
            f"{shortage[:1].upper()}{shortage[1:]}; close other programs, raise the container's limit if there is one, "
            "or load a smaller dtype."
        )


def _examine(
    source: Source, dtype: torch.dtype | str | None, trust_remote_code: bool, rows: str, cleanup: Cleanup
) -> Examined:
    """Return `examine.examine` of the source, run while no other thread loads. Raise Refused."""
    _take_lock(cleanup)
    return examine.examine(source, dtype=dtype, trust_remote_code=trust_remote_code, rows=rows)


def _fetch(checkpoint: Examined, shown: bool) -> None:
    """Fetch all files of the weights. Raise Refused, before that, if the disk has no room for them."""
    assert checkpoint.weights is not None
    shortage = checkpoint.disk_shortage()
    if shortage is not None:
        raise Refused(f"{checkpoint.source.name} cannot be fetched: {shortage}.")
    checkpoint.source.fetch(checkpoint.weights.files, shown=shown)
    examine.check_headers(checkpoint.source, checkpoint.weights)


def _dequantised(checkpoint: Examined, plan: AttachPlan) -> str:
    """Return the sentence on a checkpoint whose own packing is not kept."""
    return (
        f"{checkpoint.source.name} is quantised in a way that rows do not keep ({checkpoint.unkept}), so its experts "
        f"were dequantised, to {plan.native.experts_nbytes / 2**30:.3g} GiB."
    )


# --- reading --------------------------------------------------------------------------------------


def rows_path(checkpoint: Examined, folder: Path, rows: str = "as-is") -> Path:
    """Return the file in the folder that holds this checkpoint's experts once it was loaded from a disk, by format."""
    name = re.sub(r"[^\w.-]+", "-", checkpoint.source.name).strip("-.")[-60:]
    return folder / f"{name}-{hashlib.sha256(_identity(checkpoint, rows).encode()).hexdigest()[:12]}.safetensors"


def _identity(checkpoint: Examined, rows: str) -> str:
    """Return text that changes with the bytes of the experts' rows. It is the checkpoint's for rows as they are."""
    return checkpoint.identity if rows == AS_IS else json.dumps([checkpoint.identity, rows])


def _store(checkpoint: Examined, plan: AttachPlan) -> Store:
    """Return the store to fill: memory, or a file on disk, which may hold all experts from an earlier load."""
    layers, experts, layout = len(checkpoint.layers), checkpoint.layers[0].count, plan.layout
    if plan.folder is None:
        return HostStore(layout, layers, experts)
    path, source = rows_path(checkpoint, plan.folder, layout.rows), _identity(checkpoint, layout.rows)
    return DiskStore(layout, layers, experts, path, source=source, keep=True)


def _read(checkpoint: Examined, plan: AttachPlan, shown: bool, cleanup: Cleanup) -> tuple[Any, Store]:
    """Return the model without its experts, and the store with them. Raise Refused."""
    _take_lock(cleanup)
    _silence_transformers(cleanup)
    readings = _readings(checkpoint)
    store = _store(checkpoint, plan)  # only now: the files hold what it is for
    bar = _start_bar(shown, cleanup)
    nbytes = sum(file.stat().st_size for file in checkpoint.files)
    name, task = checkpoint.source.name, bar.add_task("", total=nbytes)
    advance = partial(bar.advance, task)
    try:
        if readings is None:
            model = read_converted(checkpoint, store, advance, cleanup)
        else:
            model = read_directly(checkpoint, store, readings, advance, cleanup)
    except Refused:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError) as error:
        raise Refused(f"Cannot load {name}: {one_line(error)}") from error
    store.finish()
    bar.update(task, completed=nbytes)
    model.config.name_or_path = model.name_or_path = name
    return model, store


def _readings(checkpoint: Examined) -> Sequence[Reading] | None:
    """Return how every expert is read straight from the files, None if Transformers has to convert them."""
    if checkpoint.quantiser is None:
        return plan_readings(checkpoint.empty, checkpoint.layers, checkpoint.files)
    if checkpoint.layout.packing is None:
        return None
    stored = stored_in(checkpoint.files)
    try:
        own = own_packing(checkpoint.empty, checkpoint.layers, stored, checkpoint.quantiser)
    except Unkept:
        own = None
    if own is None or own.format != checkpoint.layout.packing.format:
        raise Refused(f"The files of {checkpoint.source.name} have changed since they were examined; load it again.")
    return own.readings


# --- settings changed for the time of reading -----------------------------------------------------


def _take_lock(cleanup: Cleanup) -> None:
    """Wait until no other thread examines or reads a checkpoint; the others wait until the clean-up.

    Transformers builds models under a default dtype that all threads share.
    """

    def release() -> None:
        # The step is taken twice, and also after an interrupt before the lock was had: RuntimeError says that this
        # thread does not hold it.
        with suppress(RuntimeError):
            ONE_AT_A_TIME.release()

    cleanup.append(release)  # before the change that it undoes, as everywhere here
    ONE_AT_A_TIME.acquire()
    caller_modes.keep(cleanup)


def _silence_transformers(cleanup: Cleanup) -> None:
    """Switch off Transformers' own bar, and its report of the experts that it was not given."""
    log = transformers.utils.logging
    cleanup.append(partial(log.set_verbosity, log.get_verbosity()))
    if log.is_progress_bar_enabled():
        cleanup.append(log.enable_progress_bar)
    log.set_verbosity_error()
    log.disable_progress_bar()


def _start_bar(shown: bool, cleanup: Cleanup) -> Progress:
    """Start a bar on stderr with bytes and bytes per second; nothing is drawn unless `shown`."""
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, console=Console(stderr=True), disable=not shown)
    cleanup.append(bar.stop)
    bar.start()
    return bar

"""Loading: from a checkpoint to an offloaded model, holding all experts only in the host store.

Experts are read directly where a plan of `direct` says how, else through Transformers' conversions.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mobile.checkpoints import examine
from mobile.checkpoints.direct import Reading, Renaming, plan_readings
from mobile.checkpoints.examine import Examined
from mobile.checkpoints.source import Source
from mobile.costs.hardware import HardwareProfile
from mobile.errors import Refused, said
from mobile.live_model import caller_modes, compat
from mobile.live_model.cleanup import Cleanup, with_cleanup
from mobile.machine.host import host, memory_shortage
from mobile.policies.strategy import Strategy, resolve
from mobile.residency.residency import PREFILL_BUFFERS
from mobile.runtime.attach_plan import AttachOptions, plan_attach
from mobile.runtime.attachment import install
from mobile.store.memory import HostStore

Advance = Callable[[int], None]  # called with the number of bytes read

ONE_AT_A_TIME = threading.RLock()  # a load changes settings of Transformers that all threads share


def load(
    source: str | os.PathLike[str],
    strategy: str | Strategy = "mobile",
    *,
    memory: int | str | None = None,
    slots: int | None = None,
    hardware: str | HardwareProfile = "auto",
    link: str = "auto",
    link_gb_per_s: float | None = None,
    gamma: float | None = None,
    geometry: str | None = None,
    kernel: str = "auto",
    device: str | int | torch.device | None = "auto",
    dtype: torch.dtype | str | None = "auto",
    progress: bool | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a safetensors checkpoint (a folder or a hub id) and `attach` it; most keywords are attach's.

    The weights are those that Transformers itself would load. `device` "auto" is the GPU if there is one, a
    number is that GPU. `dtype` "auto" is the checkpoint's; MXFP4 and FP8 checkpoints are dequantised to it. `progress`
    shows a bar on stderr; None shows it on a terminal. `revision` is a branch, a tag or a commit of a hub id. Experts
    go from the files into the host store one layer at a time, so that host memory peaks at the store and the dense
    weights, plus one layer.

    Raise Refused, before any weight is fetched or read where it can be known, for a missing, truncated or incomplete
    checkpoint, one without safetensors or with an adapter, and whatever attach refuses. Neither that nor an interrupt
    leaves anything behind. The caller's default device, inference mode and autocast change nothing.
    """
    compat.check_version()
    strategy, place = resolve(strategy, gamma), _device(device)

    def work() -> Any:
        found = examine.find(source, revision=revision, trust_remote_code=trust_remote_code)
        known = with_cleanup(lambda cleanup: _examine(found, dtype, trust_remote_code, cleanup))
        options = AttachOptions(
            strategy=strategy,
            memory=memory,
            slots=slots,
            hardware=hardware,
            link=link,
            link_gb_per_s=link_gb_per_s,
            geometry=geometry,
            kernel=kernel,
        )
        plan = plan_attach(known.empty, known.layers, known.layout, place, options)
        if place.type == "cpu":
            beside = _beside_nbytes(known, plan.slots)
            _check_host_memory(known.experts_nbytes + beside, "the experts, the other weights and the slots")
        else:
            _check_host_memory(known.experts_nbytes)
        shown = sys.stderr.isatty() if progress is None else progress
        _fetch(known, shown)
        model, store = with_cleanup(lambda cleanup: _read(known, shown, cleanup))
        model = model.eval().to(place)
        return install(model, compat.moe_layers(model), store, plan)

    try:
        return caller_modes.plain(work)()
    except Refused as refused:
        if _interrupted(refused):
            raise KeyboardInterrupt from refused
        raise


def _interrupted(error: BaseException | None) -> bool:
    """Return whether Ctrl-C caused an error: cleaning up a half-made state may raise another one."""
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


def _beside_nbytes(known: Examined, slots: int) -> int:
    """Return the bytes of a CPU model beside the host store: its other weights, and the slots."""
    own = compat.geometry_of(known.empty, known.layers, known.layout)
    return own.resident_nbytes + (slots + PREFILL_BUFFERS) * known.layout.nbytes


def _check_host_memory(nbytes: int, of: str = "the experts") -> None:
    """Raise Refused if this machine, or the container's limit, leaves less than `nbytes`, which `of` take."""
    shortage = memory_shortage(nbytes, host().usable_nbytes, of)
    if shortage is not None:
        raise Refused(
            f"{shortage[:1].upper()}{shortage[1:]}; close other programs, raise the container's limit if there is one, "
            "or load a smaller dtype."
        )


def _examine(found: Source, dtype: torch.dtype | str | None, trust_remote_code: bool, cleanup: Cleanup) -> Examined:
    """Examine the checkpoint while no other thread loads one."""
    _take_turn(cleanup)
    return examine.examine(found, dtype=dtype, trust_remote_code=trust_remote_code)


def _fetch(known: Examined, shown: bool) -> None:
    """Fetch the weights' files that are not here. Raise Refused first if the disk has no room for them."""
    assert known.weights is not None
    shortage = known.disk_shortage()
    if shortage is not None:
        raise Refused(f"{known.source.name} cannot be fetched: {shortage}.")
    known.source.fetch(known.weights.files, shown=shown)
    examine.check_headers(known.source, known.weights)


# --- reading --------------------------------------------------------------------------------------


def _read(known: Examined, shown: bool, cleanup: Cleanup) -> tuple[Any, HostStore]:
    """Read the weights; return the model without its experts, and the store with them."""
    _take_turn(cleanup)
    _quieten(cleanup)
    store = HostStore(known.layout, len(known.layers), known.layers[0].count)
    readings = None if known.quantised else plan_readings(known.empty, known.layers, known.files)
    bar = _bar(shown, cleanup)
    nbytes = sum(file.stat().st_size for file in known.files)
    task = bar.add_task("", total=nbytes)
    advance = partial(bar.advance, task)
    try:
        if readings is None:
            model = _read_converted(known, store, advance, cleanup)
        else:
            model = _read_directly(known, store, readings, advance, cleanup)
    except Refused:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError) as error:
        if "above report" in str(error):  # Transformers' list of them, which is not shown
            raise Refused(f"The weights of {known.source.name} do not fit its configuration; copy it again.") from error
        raise Refused(f"Cannot load {known.source.name}: {said(error)}") from error
    bar.update(task, completed=nbytes)
    model.config.name_or_path = model.name_or_path = known.source.name
    return model, store


def _read_directly(
    known: Examined, store: HostStore, readings: Sequence[Reading], advance: Advance, cleanup: Cleanup
) -> Any:
    """Read the experts by our own threads and the rest by Transformers; return the model."""
    # 1. Copy every reading into its place in the store.
    handles: dict[Any, Any] = {}
    cleanup.append(lambda: list(map(_close, handles.values())))
    for file in known.files:
        handles[file] = safe_open(file, framework="pt")

    def read(one: Reading) -> int:
        tensor = handles[one.file].get_tensor(one.key)
        into = store.weights(one.layer, one.weight)
        if one.expert is not None:
            into = into[one.expert, one.start : one.start + tensor.shape[0]]
        into.copy_(tensor)
        return tensor.nbytes

    threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    cleanup.append(partial(threads.shutdown, cancel_futures=True))
    for nbytes in threads.map(read, readings):
        advance(nbytes)
    # 2. Have Transformers load the other weights, its experts staying empty.
    slices = {key: handle.get_slice(key) for handle in handles.values() for key in handle.keys()}  # noqa: SIM118
    experts = {one.key for one in readings}
    _keep_experts_out(lambda module, name, weight: None, cleanup)
    kind: Any = type(known.empty)
    model, info = kind.from_pretrained(
        None,
        config=known.config,
        output_loading_info=True,
        dtype=known.options["dtype"],
        state_dict={key: one for key, one in slices.items() if key not in experts},
    )
    ours = {f"{layer.name}.{name}" for layer in compat.moe_layers(model) for name in compat.weight_names(layer.experts)}
    _check_complete([key for key in info["missing_keys"] if key not in ours])
    # 3. Do what from_pretrained does beside: remember the conversions, read the generation configuration.
    renaming = Renaming(model)
    for key in slices:
        renaming.target(key)
    model._weight_conversions = renaming.used()  # as Transformers does, which has seen the dense weights alone
    if hasattr(model, "adjust_generation_fn"):
        model.adjust_generation_fn(
            None,
            False,
            None,
            str(known.source.folder),
            cache_dir=None,
            force_download=False,
            proxies=None,
            local_files_only=True,
            token=None,
            revision="main",
            subfolder="",
            trust_remote_code=known.options["trust_remote_code"],
        )
    return model


def _close(file: Any) -> None:
    """Close a safetensors file, or leave that to the thread that is reading it and that Ctrl-C made Python forget."""
    with suppress(RuntimeError):
        file.__exit__(None, None, None)


def _read_converted(known: Examined, store: HostStore, advance: Advance, cleanup: Cleanup) -> Any:
    """Read everything by Transformers, moving each experts weight into the store as soon as it is complete.

    Return the model.
    """
    order: dict[nn.Module, int] = {}

    def take(module: nn.Module, name: str, weight: torch.Tensor) -> None:
        store.weights(order.setdefault(module, len(order)), name).copy_(weight)
        advance(weight.nbytes)
        _return_freed_memory()

    # Transformers' switch against reading ahead, which would hold as many tensors as its threads are fast.
    _set_environment("HF_DEACTIVATE_ASYNC_LOAD", "1", cleanup)
    _keep_experts_out(take, cleanup)
    model, info = known.kind.from_pretrained(
        known.source.folder, output_loading_info=True, use_safetensors=True, **known.options
    )
    _check_complete(info["missing_keys"])
    store.reorder([order[layer.experts] for layer in compat.moe_layers(model)])
    return model


def _keep_experts_out(take: Callable[[nn.Module, str, torch.Tensor], None], cleanup: Cleanup) -> None:
    """Pass every experts weight that is loaded from now on to `take`, leaving an empty placeholder in its module.

    It uses PyTorch's hook on the registration of parameters, which is how Transformers sets each loaded weight, on the
    thread that loads. The models of other threads are not touched.
    """
    thread, taking = threading.get_ident(), [take]

    def register(module: nn.Module, name: str, weight: Any) -> Any:
        if not taking or threading.get_ident() != thread:
            return None
        experts = all(hasattr(module, flag) for flag in compat.FLAGS)
        if not experts or weight is None or weight.device.type == "meta" or name not in compat.weight_names(module):
            return None
        taking[0](module, name, weight.data)
        empty: Any = nn.Parameter(weight.data.new_empty(0), requires_grad=weight.requires_grad)
        empty._is_hf_initialized = True
        return empty

    cleanup.append(taking.clear)
    cleanup.append(register_module_parameter_registration_hook(register).remove)


def _return_freed_memory() -> None:
    """Have glibc give freed pages back: else the pieces of converted layers stay, 190 MB of 400 in half of all runs."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _check_complete(missing: Sequence[str]) -> None:
    """Raise Refused if weights are missing."""
    if missing:
        raise Refused(f"The checkpoint lacks {len(missing)} weights, {sorted(missing)[0]} among them; copy it again.")


# --- settings that are changed while reading ------------------------------------------------------


def _take_turn(cleanup: Cleanup) -> None:
    """Wait until no other thread examines or reads a checkpoint; the others wait from now on.

    Transformers builds models under a default dtype that all threads share.
    """

    def release() -> None:
        with suppress(RuntimeError):  # not ours, because it was interrupted, or not any more
            ONE_AT_A_TIME.release()

    cleanup.append(release)
    ONE_AT_A_TIME.acquire()
    caller_modes.keep(cleanup)


def _set_environment(name: str, value: str, cleanup: Cleanup) -> None:
    """Set an environment variable until the cleanup."""
    before = os.environ.get(name)
    back = partial(os.environ.pop, name, None) if before is None else partial(os.environ.update, {name: before})
    cleanup.append(back)
    os.environ[name] = value


def _quieten(cleanup: Cleanup) -> None:
    """Turn off Transformers' own progress bar and its report of missing experts, until the cleanup."""
    log = transformers.utils.logging
    cleanup.append(partial(log.set_verbosity, log.get_verbosity()))
    if log.is_progress_bar_enabled():
        cleanup.append(log.enable_progress_bar)
    log.set_verbosity_error()
    log.disable_progress_bar()


def _bar(shown: bool, cleanup: Cleanup) -> Progress:
    """Start a progress bar on stderr, with bytes and bytes per second."""
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, console=Console(stderr=True), disable=not shown)
    cleanup.append(bar.stop)
    bar.start()
    return bar

"""From a checkpoint to an offloaded model, without ever holding all experts anywhere but in the host store."""

from __future__ import annotations

import ctypes
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from safetensors import safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from mobile import checkpoint, compat
from mobile.attachment import serve, settle
from mobile.hardware import HardwareProfile
from mobile.host import host
from mobile.refusal import Refused
from mobile.store import HostStore
from mobile.strategy import Strategy, resolve

Advance = Callable[[int], None]  # told of bytes read


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
    device: str | torch.device = "auto",
    dtype: torch.dtype | str = "auto",
    progress: bool | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a safetensors checkpoint (a folder or a hub id) and `attach` it; most keywords are attach's.

    `device` "auto" is the GPU if there is one. `dtype` "auto" is the checkpoint's; MXFP4 and FP8 checkpoints are
    dequantised to it. `progress` shows a bar on stderr; None shows it on a terminal. Experts go from the files into
    the host store one layer at a time, so that host memory peaks at the store and the dense weights, plus one layer.

    Raises Refused, before any weight is read where it can be known, for a missing, truncated or incomplete
    checkpoint, one without safetensors, and whatever attach refuses.
    """
    compat.check_version()
    strategy, place = resolve(strategy, gamma), _device(device)
    found = checkpoint.find(source, trust_remote_code=trust_remote_code)
    config = checkpoint.config_of(found.folder, trust_remote_code=trust_remote_code)
    dtype = checkpoint.dtype_of(config, dtype)
    dequantised = _dequantised(config)
    empty = checkpoint.skeleton(found.folder, dtype=dtype, trust_remote_code=trust_remote_code)
    layers = compat.moe_layers(empty)
    layout = compat.common_layout(layers)
    settled = settle(
        empty, layers, layout, place, strategy, memory=memory, slots=slots, hardware=hardware, link=link,
        link_gb_per_s=link_gb_per_s, gamma=None, geometry=geometry, kernel=kernel,
    )  # fmt: skip
    store = HostStore(layout, len(layers), layers[0].count)
    _check_host_memory(store.nbytes)
    readings = None if dequantised else plan_readings(empty, layers, found.files)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, **dequantised}
    kind = checkpoint.model_class(config)
    with _bar(progress, found.nbytes) as advance, _quiet():
        try:
            if readings is None:
                model = _read_converted(kind, found.folder, options, store, advance)
            else:
                model = _read_directly(type(empty), config, found, options, store, readings, advance)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            if isinstance(error, Refused):
                raise
            raise Refused(f"Cannot load {source}: {str(error).splitlines()[0]}") from error
    model = model.eval().to(place)
    return serve(model, compat.moe_layers(model), store, settled)


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    if place.type not in ("cpu", "cuda") or (place.type == "cuda" and not torch.cuda.is_available()):
        raise Refused(f"There is no device {device} here; leave device out, or give cpu.")
    return place


def _dequantised(config: Any) -> dict[str, Any]:
    """Options that dequantise a quantised checkpoint while it is read. Raises Refused for a method that cannot."""
    quantised = getattr(config, "quantization_config", None)
    if quantised is None:
        return {}
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
    if method == "mxfp4":
        return {"quantization_config": Mxfp4Config(dequantize=True)}
    if method == "fp8":
        return {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    raise Refused(f"The checkpoint is quantised with {method}, which cannot be offloaded; use one in bf16 or fp32.")


def _check_host_memory(nbytes: int) -> None:
    """Raises Refused where this machine, or the container's limit, leaves less than that."""
    usable = host().usable_nbytes
    if usable is not None and nbytes > usable:
        raise Refused(
            f"The experts take {nbytes / 2**30:.1f} GiB of host memory and {usable / 2**30:.1f} GiB are free; "
            "close other programs, raise the container's limit if there is one, or load a smaller dtype."
        )


# --- straight from the files into the rows --------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """One tensor of a file and where in the store it goes: all experts, or one; all rows of the weight, or a part."""

    file: Path
    key: str
    layer: int
    weight: str
    expert: int | None = None
    start: int | None = None


def plan_readings(empty: nn.Module, layers: Sequence[compat.MoeLayer], files: Sequence[Path]) -> list[Reading] | None:
    """How to read every expert, following Transformers' own renaming of checkpoint keys.

    None if the checkpoint needs a conversion other than stacking experts and joining gate with up.
    Raises Refused if an expert's weight is missing.
    """
    mapping: Any = get_model_conversion_mapping(empty)  # type: ignore[arg-type]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = empty.state_dict()
    prefix = getattr(empty, "base_model_prefix", None)
    targets = {
        f"{layer.name}.{weight}": (number, weight)
        for number, layer in enumerate(layers)
        for weight in compat.weight_names(layer.experts)
    }
    readings: list[Reading] = []
    stacked: dict[tuple[str, str], int] = defaultdict(int)
    read: dict[str, int] = defaultdict(int)
    keys = {key: file for file in files for key in _keys(file)}
    handles = {file: safe_open(file, framework="pt") for file in files}
    for key in sorted(keys, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if target not in targets:
            continue
        number, weight = targets[target]
        shape = list(handles[keys[key]].get_slice(key).get_shape())
        whole = list(state[target].shape)
        if pattern is None:
            if shape != whole:
                return None
            readings.append(Reading(keys[key], key, number, weight))
            read[target] += state[target].numel()
            continue
        kinds = [type(operation) for operation in of_pattern[pattern].operations]
        parts = of_pattern[pattern].source_patterns
        joined = [MergeModulelist, Concatenate] if len(parts) > 1 else [MergeModulelist]
        if kinds != joined or [len(parts) * shape[0], *shape[1:]] != whole[1:]:
            return None
        start = parts.index(pattern) * shape[0]
        readings.append(Reading(keys[key], key, number, weight, stacked[target, pattern], start))
        stacked[target, pattern] += 1
        read[target] += torch.Size(shape).numel()
    lacking = [target for target in targets if read[target] != state[target].numel()]
    if lacking and readings:
        raise Refused(f"The checkpoint lacks weights of {lacking[0]}; copy it again.")
    return readings or None


def _keys(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as handle:
        return list(handle.keys())


def _read_directly(
    kind: Any, config: Any, found: checkpoint.Checkpoint, options: dict[str, Any], store: HostStore,
    readings: Sequence[Reading], advance: Advance,
) -> Any:  # fmt: skip
    """Experts by our own threads, everything else by Transformers, whose experts stay empty."""
    with ExitStack() as opened:
        handles = {file: opened.enter_context(safe_open(file, framework="pt")) for file in found.files}

        def read(one: Reading) -> int:
            tensor = handles[one.file].get_tensor(one.key)
            into = store.weights(one.layer, one.weight)
            if one.expert is not None:
                into = into[one.expert, one.start : one.start + tensor.shape[0]]
            into.copy_(tensor)
            return tensor.nbytes

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            for nbytes in threads.map(read, readings):
                advance(nbytes)
        dense = {key: handles[file].get_slice(key) for file in found.files for key in _keys(file)}
        for one in readings:
            del dense[one.key]
        with _experts_kept_out(lambda module, name, weight: None):
            model, info = kind.from_pretrained(
                None, config=config, state_dict=dense, output_loading_info=True, dtype=options["dtype"]
            )
    experts = {f"{layer.name}." for layer in compat.moe_layers(model)}
    _check_complete([key for key in info["missing_keys"] if not key.startswith(tuple(experts))])
    if model.can_generate() and (found.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(found.folder)
    model.config.name_or_path = str(found.folder)
    return model


# --- through Transformers' conversions ------------------------------------------------------------


def _read_converted(kind: Any, folder: Path, options: dict[str, Any], store: HostStore, advance: Advance) -> Any:
    """Everything by Transformers; each experts weight is moved into its row as soon as it is whole."""
    order: dict[nn.Module, int] = {}

    def take(module: nn.Module, name: str, weight: torch.Tensor) -> None:
        store.weights(order.setdefault(module, len(order)), name).copy_(weight)
        advance(weight.nbytes)
        _return_freed_memory()

    with _experts_kept_out(take), _one_at_a_time():
        model, info = kind.from_pretrained(folder, output_loading_info=True, use_safetensors=True, **options)
    _check_complete(info["missing_keys"])
    store.reorder([order[layer.experts] for layer in compat.moe_layers(model)])
    return model


@contextmanager
def _experts_kept_out(take: Callable[[nn.Module, str, torch.Tensor], None]) -> Iterator[None]:
    """Inside the block, loaded experts weights are handed to `take`, and their modules keep empty placeholders.

    By PyTorch's own hook on the registration of parameters: Transformers sets each loaded weight that way.
    """

    def register(module: nn.Module, name: str, weight: Any) -> Any:
        experts = all(hasattr(module, flag) for flag in compat.FLAGS)
        if not experts or weight is None or weight.device.type == "meta" or name not in compat.weight_names(module):
            return None
        take(module, name, weight.data)
        empty: Any = nn.Parameter(weight.data.new_empty(0), requires_grad=False)
        empty._is_hf_initialized = True
        return empty

    hook = register_module_parameter_registration_hook(register)
    try:
        yield
    finally:
        hook.remove()


def _return_freed_memory() -> None:
    """Have glibc give freed pages back: else the pieces of converted layers stay, 190 MB of 400 in half of all runs."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Transformers' switch against reading ahead, which would hold as many tensors as its threads are fast."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _check_complete(missing: Sequence[str]) -> None:
    if missing:
        raise Refused(f"The checkpoint lacks {len(missing)} weights, {sorted(missing)[0]} among them; copy it again.")


# --- what the user sees ---------------------------------------------------------------------------


@contextmanager
def _bar(progress: bool | None, nbytes: int) -> Iterator[Advance]:
    """A bar on stderr with bytes and bytes per second; yields what moves it."""
    shown = sys.stderr.isatty() if progress is None else progress
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task("", total=nbytes)
        yield lambda more: bar.advance(task, more)
        bar.update(task, completed=nbytes)


@contextmanager
def _quiet() -> Iterator[None]:
    """Transformers' own bar and its report of the experts it was not given, off."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()

"""The experts of a checkpoint, read into the host store: straight from the files, or as Transformers converts them.

Transformers loads all other weights either way. Whatever is changed meanwhile leaves a step on a `Cleanup` list.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mobile.checkpoints.configuration import DTYPES
from mobile.checkpoints.direct import Reading, Renaming, store_places, stored_in
from mobile.checkpoints.examine import Examined
from mobile.checkpoints.headers import Stored, Unread
from mobile.errors import Refused, one_line
from mobile.live_model import compat
from mobile.live_model.cleanup import Cleanup
from mobile.store import PackedWeights, Store, Weights

Advance = Callable[[int], None]  # moves the progress bar by bytes read


def read_directly(
    checkpoint: Examined, store: Store, readings: Sequence[Reading], advance: Advance, cleanup: Cleanup
) -> Any:
    """Return the model, its experts read into the store as `readings` say; Transformers reads all other weights.

    `advance` is called with the bytes of each tensor. Raise Refused if a weight is missing.
    """
    files = _opened(checkpoint, cleanup)

    def read(together: Sequence[Reading]) -> int:
        first = together[0]
        weights = store.weights(first.layer, first.weight)
        if isinstance(weights, PackedWeights) and first.part is not None:
            for reading in together:
                assert reading.part is not None, "either all tensors of a weight are parts of it, or none is"
                _read_into(weights.parts[reading.part][reading.expert], reading, files)
        elif isinstance(weights, torch.Tensor):
            for reading in together:
                _read_into(weights if reading.expert is None else weights[reading.expert], reading, files)
        elif first.expert is None:
            weights.copy_(first.stored.read(files[first.stored.path]))
        else:
            whole = torch.empty(weights.shape[1:], dtype=weights.dtype)
            for reading in together:
                _read_into(whole, reading, files)
            weights.pack(first.expert, whole)
        return sum(reading.stored.nbytes for reading in together)

    # 1. Copy the experts into their rows, on several threads: a layer at a time, so that a store on disk has no more
    #    than one of them in memory.
    threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    cleanup.append(partial(threads.shutdown, cancel_futures=True))
    for layer, group in groupby(sorted(readings, key=attrgetter("layer")), key=attrgetter("layer")):
        if not store.is_complete:
            for nbytes in threads.map(read, _packed_together(group)):
                advance(nbytes)
            store.complete(layer)
    # 2. Let Transformers load the rest. It allocates the experts that it was not given, and the hook replaces each of
    #    them by an empty placeholder. Only experts may be missing.
    stored, experts = stored_in(checkpoint.files), {reading.stored.key for reading in readings}
    _keep_experts_out(lambda module, name, weight: None, cleanup)
    model, missing = _by_transformers(checkpoint, files, stored, experts, cleanup)
    in_store = store_places(compat.moe_layers(model))
    _check_complete([key for key in missing if key not in in_store])
    if checkpoint.quantiser is not None:
        _check_weights(checkpoint, model)
    return model


def _opened(checkpoint: Examined, cleanup: Cleanup) -> dict[Path, BinaryIO]:
    """Return every file, open until the clean-up."""
    # The step that closes them comes before the first is opened, so that an interrupt between two of them leaves none
    # open.
    files: dict[Path, BinaryIO] = {}
    cleanup.append(lambda: [file.close() for file in files.values()])
    for path in checkpoint.files:
        files[path] = path.open("rb", buffering=0)
    return files


def _by_transformers(
    checkpoint: Examined,
    files: Mapping[Path, BinaryIO],
    stored: Mapping[str, Stored],
    without: Container[str],
    cleanup: Cleanup,
) -> tuple[Any, list[str]]:
    """Return the model as Transformers loads it from `stored`, `without` some keys, and the weights that it misses.

    Each tensor is read when it is its turn, by an explicit read: Transformers would map the files into memory.
    """
    quantised: dict[str, Any] = {}
    if checkpoint.quantiser is not None:
        quantised["quantization_config"] = checkpoint.options["quantization_config"]
        # Transformers reads ahead with several threads, and would hold many converted layers at once.
        _set_environment("HF_DEACTIVATE_ASYNC_LOAD", "1", cleanup)
    unread = {key: Unread(tensor, files[tensor.path]) for key, tensor in stored.items() if key not in without}
    model_class: Any = type(checkpoint.empty)
    with _refusals_of(checkpoint):
        model, info = model_class.from_pretrained(
            None,
            config=checkpoint.config,
            output_loading_info=True,
            dtype=checkpoint.options["dtype"],
            state_dict=unread,
            **quantised,
        )
    # Complete what `from_pretrained` does for a model from a folder, which this one is not to Transformers: the
    # conversions by which it is saved again, of which it may have seen only those of dense weights, and the settings of
    # generate().
    renaming = Renaming(model, checkpoint.quantiser)
    for key in stored:
        renaming.target(key)
    model._weight_conversions = renaming.used_conversions()
    if hasattr(model, "adjust_generation_fn"):
        with _refusals_of(checkpoint):
            model.adjust_generation_fn(
                None,
                False,
                None,
                str(checkpoint.source.folder),
                cache_dir=None,
                force_download=False,
                proxies=None,
                local_files_only=True,
                token=None,
                revision="main",
                subfolder="",
                trust_remote_code=checkpoint.options["trust_remote_code"],
            )
    return model, list(info["missing_keys"])


def _by_transformers_mapped(checkpoint: Examined, cleanup: Cleanup) -> tuple[Any, list[str]]:
    """Return the same, from files that Transformers maps into memory: plain weights that it converts.

    A file that another program cuts short meanwhile ends this process (SIGBUS). Reading such weights, which are of full
    size, would take a layer more of memory.
    """
    _set_environment("HF_DEACTIVATE_ASYNC_LOAD", "1", cleanup)  # as in `_by_transformers`
    with _refusals_of(checkpoint):
        model, info = checkpoint.model_class.from_pretrained(
            checkpoint.source.folder, output_loading_info=True, use_safetensors=True, **checkpoint.options
        )
    return model, list(info["missing_keys"])


def _packed_together(readings: Iterable[Reading]) -> list[list[Reading]]:
    """Return the readings of a layer in groups, each of one expert's weight, which is packed as a whole."""
    groups: dict[tuple[str, int | None], list[Reading]] = defaultdict(list)
    for reading in readings:
        groups[reading.weight, reading.expert].append(reading)
    return list(groups.values())


def _read_into(weight: torch.Tensor, reading: Reading, files: Mapping[Path, BinaryIO]) -> None:
    """Read a tensor into its place in a weight: that of all experts of a layer, or one expert's matrix."""
    stored = reading.stored
    place = weight if reading.start is None else weight[reading.start : reading.start + stored.shape[0]]
    tensor = stored.read(files[stored.path], place)
    if tensor is not place:
        place.copy_(tensor)


def read_converted(checkpoint: Examined, store: Store, advance: Advance, cleanup: Cleanup) -> Any:
    """Return the model as Transformers reads and converts it; each experts weight goes into the store once complete.

    `advance` is called with the bytes of each. Raise Refused if a weight is missing.
    """
    # Layers may come in any order: a module gets the next free layer of the store, and `reorder` sorts them at the end.
    order: dict[nn.Module, int] = {}
    taken: dict[nn.Module, set[str]] = defaultdict(set)

    def take(module: nn.Module, name: str, weight: torch.Tensor) -> None:
        if store.is_complete:
            return
        layer = order.setdefault(module, len(order))
        _check_weight(f"{type(module).__name__}.{name}", weight, store.weights(layer, name))
        store.weights(layer, name).copy_(weight)
        taken[module].add(name)
        if len(taken[module]) == len(store.layout.fields):
            store.complete(layer)
        advance(weight.nbytes)
        _return_freed_memory()

    if checkpoint.quantiser is None:
        _keep_experts_out(take, cleanup)
        model, missing = _by_transformers_mapped(checkpoint, cleanup)
    else:
        files, stored = _opened(checkpoint, cleanup), stored_in(checkpoint.files)
        _keep_experts_out(take, cleanup)
        model, missing = _by_transformers(checkpoint, files, stored, (), cleanup)
    _check_complete(missing)
    _check_weights(checkpoint, model)
    if not store.is_complete:
        store.reorder([order[layer.experts] for layer in compat.moe_layers(model)])
    return model


@contextmanager
def _refusals_of(checkpoint: Examined) -> Iterator[None]:
    """Have whatever Transformers raises over a checkpoint's files come as Refused, with the checkpoint's name."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:  # each model's constructor and each conversion has its own
        if "above report" in str(error):  # Transformers' list of weights, which is not shown
            raise Refused(
                f"The weights of {checkpoint.source.name} do not fit its configuration; copy it again."
            ) from error
        raise Refused(f"Cannot load {checkpoint.source.name}: {one_line(error)}") from error


def _keep_experts_out(take: Callable[[nn.Module, str, torch.Tensor], None], cleanup: Cleanup) -> None:
    """Call `take(module, name, weight)` for each loaded experts weight, and leave an empty placeholder in the module.

    It is PyTorch's own hook on the registration of parameters: Transformers sets each loaded weight that way, on the
    thread that loads. The models of other threads are left alone.
    """
    # The hook asks `active` whether it is still wanted. An interrupt can fall between the hook's registration and the
    # line that records how to remove it; then the hook stays, but does nothing once `active` is empty.
    thread, active = threading.get_ident(), [take]

    def register(module: nn.Module, name: str, weight: Any) -> Any:
        if not active or threading.get_ident() != thread:
            return None
        experts = all(hasattr(module, flag) for flag in compat.FLAGS)
        if not experts or weight is None or weight.device.type == "meta" or name not in compat.weight_names(module):
            return None
        active[0](module, name, weight.data)
        empty: Any = nn.Parameter(weight.data.new_empty(0), requires_grad=weight.requires_grad)
        empty._is_hf_initialized = True
        return empty

    cleanup.append(active.clear)
    cleanup.append(register_module_parameter_registration_hook(register).remove)


def _return_freed_memory() -> None:
    """Make glibc give freed pages back to the system.

    Without it the freed pieces of converted layers stayed with the process: 190 MB of 400 in half of all runs.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _check_complete(missing: Sequence[str]) -> None:
    """Raise Refused if any weight is missing."""
    if missing:
        raise Refused(f"The checkpoint lacks {len(missing)} weights, {sorted(missing)[0]} among them; copy it again.")


def _check_weights(checkpoint: Examined, model: nn.Module) -> None:
    """Raise Refused where a weight outside of the experts is none that `_check_weight` passes."""
    wanted, in_store = checkpoint.empty.state_dict(), store_places(compat.moe_layers(model))
    for name, weight in model.state_dict().items():
        if name in wanted and name not in in_store:
            _check_weight(name, weight, wanted[name])


def _check_weight(name: str, weight: torch.Tensor, wanted: Weights) -> None:
    """Raise Refused for a weight of another shape than `wanted`, or one that was not dequantised.

    Transformers checks neither in a quantised checkpoint, and a copy would repeat a weight of size 1.
    """
    if weight.shape != wanted.shape:
        shape, right = tuple(weight.shape), tuple(wanted.shape)
        raise Refused(f"The checkpoint has {name} of shape {shape}, and its configuration {right}; copy it again.")
    if wanted.dtype.is_floating_point and weight.dtype not in DTYPES:
        raise Refused(f"The checkpoint has {name} in {weight.dtype} and nothing to dequantise it with; copy it again.")


def _set_environment(name: str, value: str, cleanup: Cleanup) -> None:
    """Set an environment variable until the clean-up."""
    before = os.environ.get(name)
    restore = partial(os.environ.pop, name, None) if before is None else partial(os.environ.update, {name: before})
    cleanup.append(restore)
    os.environ[name] = value

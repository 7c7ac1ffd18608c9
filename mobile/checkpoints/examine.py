"""A checkpoint before its weights are read: its files, its model class, its dtype, and every reason to refuse it.

All of it is known from the configuration, the index and the headers, so a checkpoint that cannot be offloaded is
refused before gigabytes are fetched.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoModelForCausalLM
from transformers.utils import is_peft_available

from mobile.checkpoints.configuration import (
    choose_model_class,
    config_of,
    dequantising_options,
    dtype_of,
    needs_trust,
    quantisation_of,
    quantiser_of,
    text_config,
)
from mobile.checkpoints.direct import check_names, check_untied
from mobile.checkpoints.generation import check_generation
from mobile.checkpoints.headers import read_header
from mobile.checkpoints.packing import Unkept, own_packing
from mobile.checkpoints.small_files import CONFIGURATION, CONFIGURATION_AND_TOKENIZER, json_object
from mobile.checkpoints.source import Source, cache_folder, disk_shortage, locate
from mobile.checkpoints.weights import Weights, holds_weights, stored_dtype, stored_keys, stored_tensors, weights_of
from mobile.costs.rows import AS_IS
from mobile.errors import Refused, one_line, shortened
from mobile.live_model import caller_modes, compat
from mobile.live_model.cleanup import Cleanup, with_cleanup
from mobile.store import ExpertLayout

ADAPTER = "adapter_config.json"
MOST_MODULES = 50_000  # of a model: the largest published ones have a few thousand


def find(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    patterns: Sequence[str] = CONFIGURATION_AND_TOKENIZER,
) -> Source:
    """Return the checkpoint in a folder or of a hub id; files that match `patterns` are fetched.

    Raise Refused for anything else, and for a checkpoint with an adapter that Transformers would apply.
    """
    compat.check_docstrings()
    checkpoint = locate(source, revision, [*patterns, *(["*.py"] if trust_remote_code else [])])
    name, adapter = checkpoint.name, checkpoint.has(ADAPTER)
    if not checkpoint.holds("config.json"):
        if adapter:
            base = _base_of_adapter(checkpoint)
            raise Refused(f"{name} holds only an adapter{base}; merge the two, and load what comes out.")
        raise Refused(f"{name} has no config.json, so it is not a Transformers checkpoint.")
    if adapter and is_peft_available():
        raise Refused(
            f"{name} has an adapter beside the model, which Transformers applies and offloading cannot; merge it "
            f"(merge_and_unload of peft), or move {ADAPTER} away."
        )
    return checkpoint


def _base_of_adapter(source: Source) -> str:
    """Return " of " and the model that the adapter was made for, or nothing if its configuration does not name one."""
    if source.holds(ADAPTER):
        name = json_object(source.folder / ADAPTER, "copy it again").get("base_model_name_or_path")
        if name:
            return f" of {shortened(str(name))}"
    return ""


def download(source: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """Return the checkpoint's folder, with all files that are read in it fetched. Raise Refused."""
    checkpoint = find(source, revision=revision)
    config = text_config(config_of(checkpoint))
    checkpoint.fetch(weights_of(checkpoint, getattr(config, "transformers_weights", None)).files)
    return checkpoint.folder


# --- everything before the weights ----------------------------------------------------------------


@dataclass(frozen=True)
class Examined:
    """A checkpoint that can be offloaded, and all that is known of it before its weights are read.

    `empty` is the model on the meta device: every shape and no weight. `model_class` loads it with `from_pretrained`,
    and `options` are keywords for that. `weights` is None for a bare configuration. `layout` is that of the experts as
    the checkpoint packs them, if it does and rows keep that; `unkept` says why they do not, and are dequantised.
    """

    source: Source
    weights: Weights | None
    config: Any
    model_class: Any
    empty: nn.Module
    layers: Sequence[compat.MoeLayer]
    layout: ExpertLayout
    options: dict[str, Any]
    unkept: str | None = None

    @property
    def quantiser(self) -> Any:
        """Transformers' own quantiser, by which weights are dequantised while they are read; None if they are plain."""
        chosen = self.options.get("quantization_config")
        return None if chosen is None else quantiser_of(chosen)

    @property
    def experts_nbytes(self) -> int:
        """Bytes of all experts in the host store."""
        return len(self.layers) * self.layers[0].count * self.layout.nbytes

    @property
    def files(self) -> tuple[Path, ...]:
        """The weights' files, in the order they are read."""
        return tuple(self.source.folder / file for file in (self.weights.files if self.weights is not None else ()))

    @property
    def identity(self) -> str:
        """Text that changes with the experts' numbers: files by commit, or by size and time, and what they become."""
        files = [] if self.weights is None else sorted(self.weights.files)
        facts = [(self.source.folder / file).stat() for file in files] if self.source.commit is None else []
        of = self.source.commit or str(self.source.folder.resolve())
        stamps = [(fact.st_size, fact.st_mtime_ns) for fact in facts]
        dtype = str(self.layout.weight_dtype)
        return json.dumps([self.source.name, of, files, stamps, type(self.empty).__name__, dtype])

    def disk_shortage(self) -> str | None:
        """Return why the hub's cache has no room for the weights that are not in it yet, or None if it has."""
        missing = 0 if self.weights is None else self.source.missing_nbytes(self.weights.files)
        return disk_shortage(missing, shutil.disk_usage(cache_folder()).free) if missing else None


def examine(
    source: Source,
    *,
    dtype: torch.dtype | str | None = "auto",
    trust_remote_code: bool = False,
    bare: bool = False,
    rows: str = AS_IS,
) -> Examined:
    """Return all that a checkpoint's configuration, index and headers say of it.

    `bare` lets a configuration without any weights pass. `rows` as they are keep a checkpoint's own packing. Raise
    Refused, before a weight is fetched, for a checkpoint that is broken, incomplete, not safetensors, quantised by a
    method that is not supported, or no model with experts that generates text.
    """
    compat.check_version()
    # 1. The configuration: it names the class to load and how the weights are quantised. The class for text generation
    #    takes only a part of the configuration of a model that sees or hears as well.
    whole_config = config_of(source, trust_remote_code=trust_remote_code)
    model_class = choose_model_class(source, whole_config, trust_remote_code=trust_remote_code)
    config, options = text_config(whole_config), dequantising_options(whole_config)
    if options:  # stands in the whole configuration, or in the part for text
        config.quantization_config = quantisation_of(whole_config)
    # 2. The files of the weights, without their contents: those that are here must be readable.
    weights = None
    if not bare or holds_weights(source) or getattr(config, "transformers_weights", None) is not None:
        _check_not_distributed(source)
        weights = weights_of(source, getattr(config, "transformers_weights", None))
        check_headers(source, weights)
        _check_layers(source, weights, config)
    check_generation(source, config)

    def stored() -> torch.dtype:
        return torch.float32 if weights is None else stored_dtype(source, weights)

    # 3. The dtype, which may be known from the weights' headers alone.
    options |= {"dtype": dtype_of(config, dtype, stored), "trust_remote_code": trust_remote_code}
    # 4. The model on the meta device, where its experts' shapes are read off and checked.
    empty = _build_empty(source, whole_config, model_class, options["dtype"], trust_remote_code)
    layers = compat.moe_layers(empty)
    layout = compat.common_layout(layers)
    if model_class is AutoModelForCausalLM and getattr(config, "is_encoder_decoder", False):
        raise Refused(
            f"The configuration of {source.name} has is_encoder_decoder, and its model has no encoder; mend it."
        )
    _check_sizes(source, empty, layers, layout)
    if weights is not None:
        _check_held(source, weights, empty)
    check_untied(empty, layers)
    # 5. The names of the weights, as far as an index lists them. A quantised checkpoint has others.
    if weights is not None and "quantization_config" not in options:
        _check_index(source, weights, empty, layers)
    examined = Examined(source, weights, config, model_class, empty, layers, layout, options)
    return _with_own_packing(examined) if rows == AS_IS and "quantization_config" in options else examined


def _with_own_packing(plain: Examined) -> Examined:
    """Return the quantised checkpoint with its own packing in its rows, or with the reason why that is not kept."""
    if plain.weights is None:
        return replace(plain, unkept="there are no weights to see it in")
    stored = stored_tensors(plain.source, plain.weights)
    try:
        own = own_packing(plain.empty, plain.layers, stored, plain.quantiser)
    except Unkept as reason:
        return replace(plain, unkept=str(reason))
    if own is None:
        return plain
    transposed = bool(plain.layers[0].experts.is_transposed)
    return replace(plain, layout=plain.layout.packed(own.format, transposed=transposed))


def _check_index(source: Source, weights: Weights, empty: nn.Module, layers: Sequence[compat.MoeLayer]) -> None:
    """Raise Refused if files that are still to be fetched lack the weights of some experts.

    Transformers takes only the names of files from an index. So where the index lacks a weight, the files' headers
    decide.
    """
    if weights.keys is None or all(map(source.holds, weights.files)):
        return
    try:
        check_names(empty, layers, weights.keys)
    except Refused:
        check_names(empty, layers, stored_keys(source, weights))


def skeleton(
    source: str | os.PathLike[str], *, dtype: torch.dtype | str | None = "auto", trust_remote_code: bool = False
) -> nn.Module:
    """Return the model on the meta device, from its configuration alone: every shape and no weight. Raise Refused."""
    checkpoint = find(source, trust_remote_code=trust_remote_code, patterns=CONFIGURATION)
    return examine(checkpoint, dtype=dtype, trust_remote_code=trust_remote_code, bare=True).empty


def _build_empty(
    source: Source, config: Any, model_class: Any, dtype: torch.dtype, trust_remote_code: bool
) -> nn.Module:
    """Return the model on the meta device. Raise Refused if it cannot be built, or does not generate text."""

    def build(cleanup: Cleanup) -> Any:
        _limit_modules(cleanup)
        if model_class is AutoModelForCausalLM:
            return model_class.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        return model_class._from_config(config, dtype=dtype)

    try:
        model = with_cleanup(caller_modes.on_meta(build))
    except Exception as error:  # any exception of the model, or of code in the checkpoint
        if "trust_remote_code" in str(error):
            raise Refused(needs_trust(source)) from error
        raise Refused(f"The configuration of {source.name} makes no model: {one_line(error)}") from error
    if not model.can_generate():
        raise Refused(f"{type(model).__name__} does not generate text, and only what does is offloaded.")
    return model


def _limit_modules(cleanup: Cleanup) -> None:
    """Raise Refused, in a model's constructor, once it has more modules than any model: a count in its configuration.

    It is PyTorch's own hook on the registration of modules. The models of other threads are left alone.
    """
    thread, active, modules = threading.get_ident(), [True], count()

    def register(*_: Any) -> None:
        if active and threading.get_ident() == thread and next(modules) > MOST_MODULES:
            raise Refused(f"it has more than {MOST_MODULES:,} modules, which no model has; copy its config.json again.")

    cleanup.append(active.clear)
    cleanup.append(register_module_module_registration_hook(register).remove)


# --- the configuration against the files --------------------------------------------------------------


def check_headers(source: Source, weights: Weights) -> None:
    """Raise Refused if a file of the weights, of those that are here, is damaged or cut short."""
    for file in weights.files:
        if source.holds(file):
            read_header(source.folder / file)


def _check_layers(source: Source, weights: Weights, config: Any) -> None:
    """Raise Refused if the configuration has more layers than the files have weights, before a model is built of it."""
    if not all(map(source.holds, weights.files)):
        return
    layers, keys = getattr(config.get_text_config(), "num_hidden_layers", None), stored_keys(source, weights)
    if isinstance(layers, int) and layers > len(keys):
        raise Refused(
            f"The configuration of {source.name} has {layers:,} layers, and its files hold {len(keys):,} weights; copy "
            "it again."
        )


def _check_sizes(source: Source, empty: nn.Module, layers: Sequence[compat.MoeLayer], layout: ExpertLayout) -> None:
    """Raise Refused for experts without weights, and for a token that runs none of them or more than there are."""
    for layer in layers:
        if not 1 <= layer.top_k <= layer.count:
            raise Refused(
                f"The configuration of {source.name} has {layer.count} experts in {layer.name}, of which a token runs "
                f"{layer.top_k}; copy it again."
            )
    if layout.nbytes == 0 or any(not weight.numel() for weight in empty.parameters()):
        raise Refused(f"The configuration of {source.name} has weights of size 0; copy it again.")


def _check_held(source: Source, weights: Weights, empty: nn.Module) -> None:
    """Raise Refused if the model has more weights than the files can hold, at 4 bits each, before memory is taken.

    Buffers are computed, and may take a gigabyte besides.
    """
    stored = source.nbytes(weights.files)
    wanted, computed = (sum(tensor.numel() for tensor in of) for of in (empty.parameters(), empty.buffers()))
    if wanted > 2 * stored or computed > 2 * stored + 2**30:
        raise Refused(
            f"The configuration of {source.name} makes a model of {wanted + computed:,} numbers, and its files hold "
            f"{stored:,} bytes; copy it again."
        )


def _check_not_distributed(source: Source) -> None:
    """Raise Refused where this Transformers would read a distributed checkpoint in place of the safetensors."""
    name = "transformers.distributed.checkpoint"  # newer than the oldest Transformers that is supported
    if importlib.util.find_spec(name) is not None and import_module(name).is_sharded_checkpoint(source.folder):
        raise Refused(f"{source.name} is a distributed checkpoint; load it with Transformers, and save_pretrained it.")

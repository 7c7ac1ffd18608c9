"""A checkpoint before its weights are read: its files, its model class, its dtype, and every reason to refuse it.

All of it is known from the configuration, the index and the headers, so a checkpoint that cannot be offloaded is
refused before gigabytes are fetched.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.auto_factory import _get_model_class
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import is_peft_available
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from mobile.checkpoints.direct import check_names, check_untied
from mobile.checkpoints.source import Source, cache_folder, disk_shortage, locate
from mobile.checkpoints.weights import (
    Weights,
    holds_weights,
    json_object,
    opened,
    stored_dtype,
    stored_keys,
    weights_of,
)
from mobile.errors import Refused, one_line
from mobile.live_model import caller_modes, compat
from mobile.store import ExpertLayout

CONFIGURATION = ("config.json", "config.*.json", "*.index.json", "generation_config.json", "adapter_config.json")
CONFIGURATION_AND_TOKENIZER = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
ADAPTER = "adapter_config.json"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
            return f" of {name}"
    return ""


def download(source: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """Return the checkpoint's folder, with all files that are read in it fetched. Raise Refused."""
    checkpoint = find(source, revision=revision)
    config = _text_config(config_of(checkpoint))
    checkpoint.fetch(weights_of(checkpoint, getattr(config, "transformers_weights", None)).files)
    return checkpoint.folder


def config_of(source: Source, *, trust_remote_code: bool = False) -> Any:
    """Return a checkpoint's configuration, a PretrainedConfig. Raise Refused if it cannot be read."""
    json_object(source.folder / "config.json", "copy it again")
    try:
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # any exception of Transformers, or of code in the checkpoint
        if "trust_remote_code" in str(error):
            raise Refused(_needs_trust(source)) from error
        raise Refused(f"Cannot read the configuration of {source.name}: {one_line(error)}") from error


def _needs_trust(source: Source) -> str:
    """Return the refusal of a checkpoint with Python code in it."""
    return f"{source.name} runs code of its own; read it, then pass trust_remote_code=True."


def choose_model_class(source: Source, config: Any, *, trust_remote_code: bool = False) -> Any:
    """Return the class that loads this configuration: AutoModelForCausalLM, or the one that the checkpoint names.

    Raise Refused if none of them generates text, or if it is code of the checkpoint that is not trusted.
    """
    has_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) in AutoModelForCausalLM._model_mapping or (has_code and trust_remote_code):
        return AutoModelForCausalLM
    for name in config.architectures or ():
        named = getattr(transformers, name, None)
        if isinstance(named, type) and issubclass(named, PreTrainedModel) and named.can_generate():
            return named
    if has_code:
        raise Refused(_needs_trust(source))
    raise Refused(f"{type(config).__name__} names no model class that generates text.")


def _text_config(config: Any) -> Any:
    """Return the part of the configuration that the class for text generation takes, by AutoModel's own rule."""
    if type(config) in AutoModelForCausalLM._model_mapping:
        config_class = getattr(_get_model_class(config, AutoModelForCausalLM._model_mapping), "config_class", None)
        if config_class is not None and config_class == config.sub_configs.get("text_config"):
            return config.get_text_config()
    return config


def dtype_of(config: Any, dtype: torch.dtype | str | None, stored: Callable[[], torch.dtype]) -> torch.dtype:
    """Return the dtype to load in: the one given, or for "auto" the configuration's, or without that the `stored` one.

    Raise Refused for an unknown name, and for a dtype that no model computes in.
    """
    auto = dtype in (None, "auto")
    named: object = getattr(config, "dtype", None) if auto else dtype
    if auto and named is None:
        named = stored()
    chosen = getattr(torch, named, None) if isinstance(named, str) else named
    if not isinstance(chosen, torch.dtype) or chosen not in DTYPES:
        problem = f"The checkpoint's weights are {named}" if auto else f"Unknown dtype {named!r}"
        raise Refused(f"{problem}; give bfloat16, float16 or float32.")
    return chosen


def dequantising_options(config: Any) -> dict[str, Any]:
    """Return the options of `from_pretrained` that dequantise a checkpoint while it is read.

    They are empty if it is not quantised. Raise Refused for a method of quantisation that is not supported.
    """
    quantised = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if not quantised:
        return {}
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
    options = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
    if method not in options:
        named = "a method that its configuration does not name" if method is None else method
        raise Refused(f"The checkpoint is quantised with {named}, which cannot be offloaded; use one in bf16 or fp32.")
    chosen = options[method](dequantize=True)
    try:
        AutoHfQuantizer.from_config(chosen, pre_quantized=True).validate_environment(device_map=None, weights_only=True)
    except (ImportError, RuntimeError, ValueError) as error:
        raise Refused(f"The checkpoint is quantised with {method}, and Transformers says: {one_line(error)}") from error
    return {"quantization_config": chosen}


# --- everything before the weights ----------------------------------------------------------------


@dataclass(frozen=True)
class Examined:
    """A checkpoint that can be offloaded, and all that is known of it before its weights are read.

    `empty` is the model on the meta device: every shape and no weight. `model_class` loads it with `from_pretrained`,
    and `options` are keywords for that. `weights` is None for a bare configuration.
    """

    source: Source
    weights: Weights | None
    config: Any
    model_class: Any
    empty: nn.Module
    layers: Sequence[compat.MoeLayer]
    layout: ExpertLayout
    options: dict[str, Any]

    @property
    def quantised(self) -> bool:
        """Whether the weights are dequantised while they are read."""
        return "quantization_config" in self.options

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
        return json.dumps([self.source.name, of, files, stamps, type(self.empty).__name__, str(self.layout.dtype)])

    def disk_shortage(self) -> str | None:
        """Return why the hub's cache has no room for the weights that are not in it yet, or None if it has."""
        missing = 0 if self.weights is None else self.source.missing_nbytes(self.weights.files)
        return disk_shortage(missing, shutil.disk_usage(cache_folder()).free) if missing else None


def examine(
    source: Source, *, dtype: torch.dtype | str | None = "auto", trust_remote_code: bool = False, bare: bool = False
) -> Examined:
    """Return all that a checkpoint's configuration, index and headers say of it.

    `bare` lets a configuration without any weights pass. Raise Refused, before a weight is fetched, for a checkpoint
    that is broken, incomplete, not safetensors, quantised by a method that is not supported, or no model with experts
    that generates text.
    """
    compat.check_version()
    # 1. The configuration: it names the class to load and how the weights are quantised. The class for text generation
    #    takes only a part of the configuration of a model that sees or hears as well.
    whole_config = config_of(source, trust_remote_code=trust_remote_code)
    model_class = choose_model_class(source, whole_config, trust_remote_code=trust_remote_code)
    config, options = _text_config(whole_config), dequantising_options(whole_config)
    # 2. The files of the weights, without their contents: those that are here must be readable.
    weights = None
    if not bare or holds_weights(source) or getattr(config, "transformers_weights", None) is not None:
        _check_not_distributed(source)
        weights = weights_of(source, getattr(config, "transformers_weights", None))
        check_headers(source, weights)

    def stored() -> torch.dtype:
        return torch.float32 if weights is None else stored_dtype(source, weights)

    # 3. The dtype, which may be known from the weights' headers alone.
    options |= {"dtype": dtype_of(config, dtype, stored), "trust_remote_code": trust_remote_code}
    # 4. The model on the meta device, where its experts' shapes are read off and checked.
    empty = _build_empty(source, whole_config, model_class, options["dtype"], trust_remote_code)
    layers = compat.moe_layers(empty)
    layout = compat.common_layout(layers)
    check_untied(empty, layers)
    # 5. The names of the weights, as far as an index lists them. A quantised checkpoint has others.
    if weights is not None and "quantization_config" not in options:
        _check_index(source, weights, empty, layers)
    return Examined(source, weights, config, model_class, empty, layers, layout, options)


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

    def build() -> Any:
        if model_class is AutoModelForCausalLM:
            return model_class.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        return model_class._from_config(config, dtype=dtype)

    try:
        model = caller_modes.on_meta(build)()
    except Exception as error:  # any exception of the model, or of code in the checkpoint
        if "trust_remote_code" in str(error):
            raise Refused(_needs_trust(source)) from error
        raise Refused(f"The configuration of {source.name} makes no model: {one_line(error)}") from error
    if not model.can_generate():
        raise Refused(f"{type(model).__name__} does not generate text, and only what does is offloaded.")
    return model


def check_headers(source: Source, weights: Weights) -> None:
    """Raise Refused if a file of the weights, of those that are here, is damaged or cut short."""
    for file in weights.files:
        if source.holds(file):
            with opened(source.folder / file):
                pass


def _check_not_distributed(source: Source) -> None:
    """Raise Refused where this Transformers would read a distributed checkpoint in place of the safetensors."""
    name = "transformers.distributed.checkpoint"  # newer than the oldest Transformers that is supported
    if importlib.util.find_spec(name) is not None and import_module(name).is_sharded_checkpoint(source.folder):
        raise Refused(f"{source.name} is a distributed checkpoint; load it with Transformers, and save_pretrained it.")

"""A checkpoint before its weights are read: where its files are, which class it is, and what makes it unreadable."""

from __future__ import annotations

import importlib.util
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
from mobile.errors import Refused, said
from mobile.live_model import caller_modes, compat
from mobile.store.layout import ExpertLayout

CONFIGURATION = ("config.json", "config.*.json", "*.index.json", "generation_config.json", "adapter_config.json")
READ = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")  # configuration and tokenizer: no weights
ADAPTER = "adapter_config.json"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def find(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    patterns: Sequence[str] = READ,
) -> Source:
    """Find a checkpoint: a folder, or a hub id, of which the configuration and the tokenizer are fetched.

    Raise Refused for anything else, and for one with an adapter that Transformers would apply.
    """
    found = locate(source, revision, [*patterns, *(["*.py"] if trust_remote_code else [])])
    adapter = found.has(ADAPTER)
    if not found.holds("config.json"):
        if adapter:
            raise Refused(f"{found.name} holds only an adapter{_base(found)}; merge the two, and load what comes out.")
        raise Refused(f"{found.name} has no config.json, so it is not a Transformers checkpoint.")
    if adapter and is_peft_available():
        raise Refused(
            f"{found.name} has an adapter beside the model, which Transformers applies and offloading cannot; merge it "
            f"(merge_and_unload of peft), or move {ADAPTER} away."
        )
    return found


def _base(source: Source) -> str:
    """Return " of NAME", the model that the adapter is for, or "" if it does not say."""
    if source.holds(ADAPTER):
        name = json_object(source.folder / ADAPTER, "copy it again").get("base_model_name_or_path")
        if name:
            return f" of {name}"
    return ""


def download(source: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """Download a checkpoint's files that are read, if they are not here; return its folder. Raise Refused."""
    found = find(source, revision=revision)
    config = _text_config(config_of(found))
    found.fetch(weights_of(found, getattr(config, "transformers_weights", None)).files)
    return found.folder


def config_of(source: Source, *, trust_remote_code: bool = False) -> Any:
    """Return a checkpoint's configuration. Raise Refused if it cannot be read, or needs code that is not trusted."""
    json_object(source.folder / "config.json", "copy it again")
    try:
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # what a foreign configuration makes Transformers, or its own code, raise
        if "trust_remote_code" in str(error):
            raise Refused(_own_code(source)) from error
        raise Refused(f"Cannot read the configuration of {source.name}: {said(error)}") from error


def _own_code(source: Source) -> str:
    """Return the refusal of a checkpoint that brings its own code."""
    return f"{source.name} runs code of its own; read it, then pass trust_remote_code=True."


def model_class(source: Source, config: Any, *, trust_remote_code: bool = False) -> Any:
    """Return the class that loads this configuration: the one for text generation, or the one the checkpoint names.

    Raise Refused if there is none, or its code is not trusted.
    """
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) in AutoModelForCausalLM._model_mapping or (own_code and trust_remote_code):
        return AutoModelForCausalLM
    for name in config.architectures or ():
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel) and kind.can_generate():
            return kind
    if own_code:
        raise Refused(_own_code(source))
    raise Refused(f"{type(config).__name__} names no model class that generates text.")


def _text_config(config: Any) -> Any:
    """Return the part of the configuration that the class for text generation takes, by AutoModel's own rule."""
    if type(config) in AutoModelForCausalLM._model_mapping:
        taken = getattr(_get_model_class(config, AutoModelForCausalLM._model_mapping), "config_class", None)
        if taken is not None and taken == config.sub_configs.get("text_config"):
            return config.get_text_config()
    return config


def dtype_of(config: Any, dtype: torch.dtype | str | None, stored: Callable[[], torch.dtype]) -> torch.dtype:
    """Return the dtype to load in: the given one, or with "auto" the configuration's, else the `stored` one.

    Raise Refused for an unknown name, and for a dtype that no model computes in.
    """
    auto = dtype in (None, "auto")
    named: object = getattr(config, "dtype", None) if auto else dtype
    if auto and named is None:
        named = stored()
    found = getattr(torch, named, None) if isinstance(named, str) else named
    if not isinstance(found, torch.dtype) or found not in DTYPES:
        whose = f"The checkpoint's weights are {named}" if auto else f"Unknown dtype {named!r}"
        raise Refused(f"{whose}; give bfloat16, float16 or float32.")
    return found


def dequantising(config: Any) -> dict[str, Any]:
    """Return options that dequantise a quantised checkpoint while it is read; none if it is not quantised.

    Raise Refused for a method that cannot.
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
        raise Refused(f"The checkpoint is quantised with {method}, and Transformers says: {said(error)}") from error
    return {"quantization_config": chosen}


# --- everything before the weights ----------------------------------------------------------------


@dataclass(frozen=True)
class Examined:
    """Everything that is known of a checkpoint before its weights are read.

    `empty` is the model on the meta device: every shape and no weight. `options` are for Transformers' loading.
    `weights` is None for a bare configuration.
    """

    source: Source
    weights: Weights | None
    config: Any
    kind: Any
    empty: nn.Module
    layers: Sequence[compat.MoeLayer]
    layout: ExpertLayout
    options: dict[str, Any]

    @property
    def quantised(self) -> bool:
        """Return whether the weights are dequantised while they are read."""
        return "quantization_config" in self.options

    @property
    def experts_nbytes(self) -> int:
        """Return the bytes of all experts in the host store."""
        return len(self.layers) * self.layers[0].count * self.layout.nbytes

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the paths of the weights' files, in the order they are read."""
        return tuple(self.source.folder / file for file in (self.weights.files if self.weights is not None else ()))

    def disk_shortage(self) -> str | None:
        """Return why the hub's cache has no room for the weights that are not in it yet, or None."""
        missing = 0 if self.weights is None else self.source.missing_nbytes(self.weights.files)
        return disk_shortage(missing, shutil.disk_usage(cache_folder()).free) if missing else None


def examine(
    source: Source, *, dtype: torch.dtype | str | None = "auto", trust_remote_code: bool = False, bare: bool = False
) -> Examined:
    """Decide everything about a checkpoint that its configuration, index and headers can decide.

    `bare` lets a configuration without any weights pass. Raise Refused, before a weight is fetched, for a checkpoint
    that is broken, incomplete, not safetensors, quantised with what is not supported, or no model with experts that
    generates text.
    """
    compat.check_version()
    whole = config_of(source, trust_remote_code=trust_remote_code)
    kind = model_class(source, whole, trust_remote_code=trust_remote_code)
    config, options = _text_config(whole), dequantising(whole)
    weights = None
    if not bare or holds_weights(source) or getattr(config, "transformers_weights", None) is not None:
        _check_not_distributed(source)
        weights = weights_of(source, getattr(config, "transformers_weights", None))
        check_headers(source, weights)

    def stored() -> torch.dtype:
        return torch.float32 if weights is None else stored_dtype(source, weights)

    options |= {"dtype": dtype_of(config, dtype, stored), "trust_remote_code": trust_remote_code}
    empty = _empty(source, whole, kind, options["dtype"], trust_remote_code)
    layers = compat.moe_layers(empty)
    layout = compat.common_layout(layers)
    check_untied(empty, layers)
    if weights is not None and "quantization_config" not in options:
        _check_listed(source, weights, empty, layers)
    return Examined(source, weights, config, kind, empty, layers, layout, options)


def _check_listed(source: Source, weights: Weights, empty: nn.Module, layers: Sequence[compat.MoeLayer]) -> None:
    """Raise Refused if the index of files that are still to be fetched has no weights for some experts.

    Transformers reads an index for its files' names alone, so the files' headers decide.
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
    """Return the model on the meta device, from its configuration alone: all shapes, no weights. Raise Refused."""
    found = find(source, trust_remote_code=trust_remote_code, patterns=CONFIGURATION)
    return examine(found, dtype=dtype, trust_remote_code=trust_remote_code, bare=True).empty


def _empty(source: Source, config: Any, kind: Any, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    """Build the model on the meta device. Raise Refused if that fails, or it does not generate text."""

    def build() -> Any:
        if kind is AutoModelForCausalLM:
            return kind.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        return kind._from_config(config, dtype=dtype)

    try:
        model = caller_modes.on_meta(build)()
    except Exception as error:  # what a foreign configuration makes a model, or its own code, raise
        if "trust_remote_code" in str(error):
            raise Refused(_own_code(source)) from error
        raise Refused(f"The configuration of {source.name} makes no model: {said(error)}") from error
    if not model.can_generate():
        raise Refused(f"{type(model).__name__} does not generate text, and only what does is offloaded.")
    return model


def check_headers(source: Source, weights: Weights) -> None:
    """Raise Refused for a file of the weights, as far as they are here, that is damaged or cut short."""
    for file in weights.files:
        if source.holds(file):
            with opened(source.folder / file):
                pass


def _check_not_distributed(source: Source) -> None:
    """Raise Refused where this Transformers would read a distributed checkpoint in place of the safetensors."""
    name = "transformers.distributed.checkpoint"  # newer than the oldest Transformers that is supported
    if importlib.util.find_spec(name) is not None and import_module(name).is_sharded_checkpoint(source.folder):
        raise Refused(f"{source.name} is a distributed checkpoint; load it with Transformers, and save_pretrained it.")

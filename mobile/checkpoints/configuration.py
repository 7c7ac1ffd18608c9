"""A checkpoint's config.json: read by Transformers once its counts are sane, and the class and dtype it asks for.

Transformers makes lists as long as a count says, and modules, so absurd ones are refused before it sees them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _get_model_class
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from mobile.checkpoints.small_files import json_object
from mobile.checkpoints.source import Source
from mobile.errors import Refused, one_line, shortened

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Names of counts, from which Transformers makes lists and modules, and the most that one may be. The deepest published
# models have a few hundred layers.
COUNTS = {re.compile(r"(^|_)(layers?|depth|blocks)$"): 10_000, re.compile(r"^num_labels$"): 1_000_000}
OF_THE_CLASS = ("sub_configs", "attribute_map")  # attributes of a configuration's class, which are no settings


def config_of(source: Source, *, trust_remote_code: bool = False) -> Any:
    """Return a checkpoint's configuration, a PretrainedConfig. Raise Refused if it cannot be read, or is absurd."""
    path = source.folder / "config.json"
    content = json_object(path, "copy it again")
    for name in content:
        if name in OF_THE_CLASS or name.startswith("__") or callable(getattr(PreTrainedConfig, name, None)):
            raise Refused(
                f"{path} sets {shortened(name)}, which is no setting but a part of Transformers; take it out."
            )
    try:
        _check_counts(path, content)
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except Refused:
        raise
    except Exception as error:  # any exception of Transformers, or of code in the checkpoint
        if "trust_remote_code" in str(error):
            raise Refused(needs_trust(source)) from error
        raise Refused(f"Cannot read the configuration of {source.name}: {one_line(error)}") from error


def _check_counts(path: Path, settings: dict[str, Any]) -> None:
    """Raise Refused if the settings, or those inside of them, have a count that no model has."""
    for name, value in settings.items():
        most = next((most for pattern, most in COUNTS.items() if pattern.search(name)), None)
        if isinstance(value, dict):
            _check_counts(path, value)
        elif most is not None and isinstance(value, int | float) and value > most:
            raise Refused(
                f"{path} says that {shortened(name)} is {shortened(f'{value:,}')}, which no model has; copy it again."
            )


def needs_trust(source: Source) -> str:
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
        named = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(named, type) and issubclass(named, PreTrainedModel) and named.can_generate():
            return named
    if has_code:
        raise Refused(needs_trust(source))
    raise Refused(f"{type(config).__name__} names no model class that generates text.")


def text_config(config: Any) -> Any:
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
        shown = shortened(f"{named}" if auto else f"{named!r}")
        problem = f"The checkpoint's weights are {shown}" if auto else f"Unknown dtype {shown}"
        raise Refused(f"{problem}; give bfloat16, float16 or float32.")
    return chosen


def quantisation_of(config: Any) -> Any:
    """Return what a configuration, or the part of it for text, says of quantised weights; nothing if they are not."""
    return getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )


def dequantising_options(config: Any) -> dict[str, Any]:
    """Return the options of `from_pretrained` that dequantise a checkpoint while it is read.

    They are empty if it is not quantised. Raise Refused for a method of quantisation that is not supported.
    """
    quantised = quantisation_of(config)
    if not quantised:
        return {}
    method = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
    options = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
    if not isinstance(method, str) or method not in options:
        named = "a method that its configuration does not name" if method is None else shortened(str(method))
        raise Refused(
            f"The checkpoint is quantised with {named}, which cannot be offloaded; use one in bf16 or fp32 (rows of "
            "int4 take as few bytes), or in FP8 or MXFP4."
        )
    chosen = options[method](dequantize=True)
    try:
        quantiser_of(chosen).validate_environment(device_map=None, weights_only=True)
    except (ImportError, RuntimeError, ValueError) as error:
        raise Refused(f"The checkpoint is quantised with {method}, and Transformers says: {one_line(error)}") from error
    return {"quantization_config": chosen}


def quantiser_of(chosen: Any) -> Any:
    """Return Transformers' own quantiser for a checkpoint that is read with this `quantization_config`."""
    return AutoHfQuantizer.from_config(chosen, pre_quantized=True)

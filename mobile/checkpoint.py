"""A checkpoint before it is read: where its files are, which class it is, and what makes it unreadable."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mobile.refusal import Refused

READ = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class Checkpoint:
    """A complete local checkpoint: its folder, and its safetensors files in order."""

    folder: Path
    files: tuple[Path, ...]

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def find(source: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Checkpoint:
    """The checkpoint in a folder, or of a hub id, which is downloaded unless it is in the cache.

    Files are checked by their headers alone. Raises Refused naming what is missing or cut short.
    """
    folder = _folder(source)
    if folder is None:
        wanted = [*READ, "*.py"] if trust_remote_code else list(READ)
        try:
            folder = Path(snapshot_download(str(source), allow_patterns=wanted))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise Refused(f"Cannot load {source}: {str(error).splitlines()[0]}") from error
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise Refused(f"{folder} lacks {name}; only complete safetensors checkpoints are read.")
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except SafetensorError as error:
            raise Refused(f"{folder / name} is damaged or cut short ({error}); copy it again.") from error
    return Checkpoint(folder, tuple(folder / name for name in names))


def _folder(source: str | os.PathLike[str]) -> Path | None:
    """The local folder, None for a hub id; Refused for what is neither."""
    folder = Path(source)
    if not folder.is_dir():
        if folder.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") > 1:
            raise Refused(f"There is no folder {source}; give a checkpoint folder or a hub id like owner/name.")
        return None
    if not (folder / "config.json").is_file():
        raise Refused(f"{folder} has no config.json, so it is not a Transformers checkpoint.")
    return folder


def config_of(source: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """The checkpoint's configuration; of a hub id, nothing else is fetched. Raises Refused."""
    _folder(source)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise Refused(f"{source} runs code of its own; read it, then pass trust_remote_code=True.") from error
        raise Refused(f"Cannot load {source}: {str(error).splitlines()[0]}") from error


def model_class(config: Any) -> Any:
    """What loads this configuration: the class for text generation, or the one the checkpoint names."""
    if type(config) in AutoModelForCausalLM._model_mapping or getattr(config, "auto_map", None):
        return AutoModelForCausalLM
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    raise Refused(f"{type(config).__name__} names no model class that generates text.")


def dtype_of(config: Any, dtype: torch.dtype | str) -> torch.dtype:
    """The dtype to load in: the one given, or with "auto" the checkpoint's. Raises Refused for another word."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise Refused(f"Unknown dtype {dtype!r}; give auto, bfloat16, float16 or float32.")
    return found


def skeleton(
    source: str | os.PathLike[str], *, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False
) -> nn.Module:
    """The model on the meta device, from its configuration alone: every shape and no weight. Raises Refused."""
    config = config_of(source, trust_remote_code=trust_remote_code)
    return _empty(config, dtype_of(config, dtype), trust_remote_code)


def _empty(config: Any, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    kind = model_class(config)
    with torch.device("meta"):
        if kind is AutoModelForCausalLM:
            return kind.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        return kind._from_config(config, dtype=dtype)

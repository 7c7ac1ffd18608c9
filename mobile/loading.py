"""From a checkpoint to an offloaded model, refusing a bad checkpoint before any weight is read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from mobile.attachment import attach
from mobile.hardware import HardwareProfile
from mobile.refusal import Refused
from mobile.strategy import Strategy, resolve


def load(
    source: str | os.PathLike[str],
    strategy: str | Strategy = "mobile",
    *,
    memory: int | str | None = None,
    slots: int | None = None,
    hardware: str | HardwareProfile = "auto",
    link: str = "auto",
    gamma: float | None = None,
    geometry: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = "auto",
) -> nn.Module:
    """Load a safetensors checkpoint (a folder or a hub id) and `attach` it; the keywords are attach's.

    `device` can only be the CPU so far, where time is virtual. Raises Refused for a missing or truncated
    checkpoint, or one without safetensors, and for whatever attach refuses.
    """
    if torch.device(device).type != "cpu":
        raise Refused(f"This version runs on the CPU, in virtual time, and not on {device}; leave device out.")
    resolve(strategy, gamma)
    check_checkpoint(source)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise Refused(f"Cannot load {source}: {str(error).splitlines()[0]}") from error
    return attach(
        model.eval(), strategy, memory=memory, slots=slots, hardware=hardware, link=link, gamma=gamma, geometry=geometry
    )


def check_checkpoint(source: str | os.PathLike[str]) -> None:
    """Check a local folder's files by their headers alone; anything else is taken for a hub id.

    Raises Refused naming the file that is missing or cut short.
    """
    folder = Path(source)
    if not folder.is_dir():
        if folder.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") > 1:
            raise Refused(f"There is no folder {source}; give a checkpoint folder or a hub id like owner/name.")
        return
    if not (folder / "config.json").is_file():
        raise Refused(f"{folder} has no config.json, so it is not a Transformers checkpoint.")
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

"""A checkpoint's files beside its weights, which are a stranger's: read whole only up to a size. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mobile.errors import Refused, one_line

CONFIGURATION = ("config.json", "config.*.json", "*.index.json", "generation_config.json", "adapter_config.json")
CONFIGURATION_AND_TOKENIZER = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
LARGEST_NBYTES = 100_000_000  # of a file beside the weights, and of a header; known ones take up to 40 MB
SETTINGS_NBYTES = 10_000_000  # of a file of settings: as Python's objects it takes up to thirty times as much


def json_object(path: Path, remedy: str, *, largest_nbytes: int = SETTINGS_NBYTES) -> dict[str, Any]:
    """Return the JSON object in a file. Raise Refused, with the remedy, if it holds none or is too large."""
    check_size(path, remedy, largest_nbytes)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{path} is no valid JSON ({one_line(error)}); {remedy}.") from error
    if not isinstance(content, dict):
        raise Refused(f"{path} holds {type(content).__name__} where a JSON object should be; {remedy}.")
    return content


def check_size(path: Path, remedy: str, largest_nbytes: int = LARGEST_NBYTES) -> None:
    """Raise Refused, with the remedy, if the file is larger than any such file of a checkpoint, or cannot be seen."""
    try:
        nbytes = path.stat().st_size
    except (OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read ({one_line(error)}); {remedy}.") from error
    if nbytes > largest_nbytes:
        raise Refused(f"{path} has {nbytes:,} bytes, and such a file has {largest_nbytes:,} at most; {remedy}.")

"""The settings of generate() in a checkpoint: generation_config.json, or where there is none, words of config.json.

Transformers takes most of them as they are, and fails on them in the middle of generate(), or takes all memory.
"""

from __future__ import annotations

import json
from math import inf
from pathlib import Path
from typing import Any

from mobile.checkpoints.small_files import SETTINGS_NBYTES, check_size
from mobile.checkpoints.source import Source
from mobile.errors import Refused, shortened

FILE = "generation_config.json"
COUNTS = (
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "top_k",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "prefill_chunk_size",
    "assistant_early_exit",
)
FEW = ("num_beams", "num_return_sequences", "num_beam_groups")  # each multiplies the rows of a batch
MOST_ROWS = 1000
NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "encoder_repetition_penalty",
    "length_penalty",
    "diversity_penalty",
    "guidance_scale",
    "penalty_alpha",
    "max_time",
    "assistant_confidence_threshold",
)
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")  # -1 is none in old checkpoints
CHOSEN_TOKENS = ("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")
OUTPUTS = ("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate")


def check_generation(source: Source, config: Any) -> None:
    """Raise Refused for settings of generate() that are no numbers, tokens or counts where such should be.

    `config` is the checkpoint's configuration. Words that Transformers does not know have no effect and are left alone.
    """
    path = source.folder / FILE
    if source.holds(FILE):
        settings = _settings(path)
    else:
        path, settings = source.folder / "config.json", config.to_dict()
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    for name, value in settings.items():
        wanted = None if value is None else _wanted(name, value, vocabulary)
        if wanted is not None:
            raise Refused(f"{path} says that {name} is {shortened(repr(value))}, and it is {wanted}; mend it there.")


def _settings(path: Path) -> dict[str, Any]:
    """Return the settings in the file; Transformers leaves one out that is no JSON. Raise Refused for another object."""
    check_size(path, "copy it again", SETTINGS_NBYTES)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    except RecursionError as error:
        raise Refused(f"{path} is nested without end; copy it again.") from error
    if not isinstance(settings, dict):
        raise Refused(f"{path} holds {type(settings).__name__} where a JSON object should be; copy it again.")
    return settings


def _wanted(name: str, value: Any, vocabulary: Any) -> str | None:
    """Return what the setting should be, or None if it is that."""
    if name in COUNTS and not _whole(value, 0, 2**31 - 1):
        return "a whole number from 0 on"
    if name in FEW and not _whole(value, 1, MOST_ROWS):
        return f"a whole number from 1 to {MOST_ROWS}"
    if name in NUMBERS and not (isinstance(value, int | float) and abs(value) < inf):
        return "a number"
    if name in TOKENS and not _tokens(value, -1, 2**31 - 1):
        return "a token's id, or a list of such"
    last = vocabulary - 1 if isinstance(vocabulary, int) else 2**31 - 1
    if name in CHOSEN_TOKENS and not (value == [] or _tokens(value, 0, last)):
        return f"a token's id from 0 to {last}, or a list of such"
    if name in OUTPUTS and value not in (True, False):
        return "true or false"
    return None


def _whole(value: Any, first: int, last: int) -> bool:
    return isinstance(value, int) and first <= value <= last


def _tokens(value: Any, first: int, last: int) -> bool:
    ids = value if isinstance(value, list) else [value]
    return bool(ids) and all(_whole(each, first, last) for each in ids)

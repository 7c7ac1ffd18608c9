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
)
FEW = ("num_beams", "num_return_sequences", "num_beam_groups")  # each multiplies the rows of a batch
MOST_ROWS = 1000
LAST = 2**31 - 1
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
    text = config.get_text_config()
    vocabulary, layers = (getattr(text, name, None) for name in ("vocab_size", "num_hidden_layers"))
    for name, value in settings.items():
        wanted = None if value is None else _wanted(name, value, vocabulary, layers)
        if wanted is not None:
            raise Refused(f"{path} says that {name} is {shortened(repr(value))}, and it is {wanted}; mend it there.")


def _settings(path: Path) -> dict[str, Any]:
    """Return the settings in the file, none where it is no JSON, as Transformers has it. Raise Refused."""
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


def _wanted(name: str, value: Any, vocabulary: Any, layers: Any) -> str | None:
    """Return what the setting should be, or None if it is that, for a model of so many tokens and layers."""
    last = vocabulary - 1 if isinstance(vocabulary, int) else LAST
    most_layers = layers if isinstance(layers, int) else LAST
    wanted = {
        **dict.fromkeys(COUNTS, ("a whole number from 0 on", _whole(value, 0, LAST))),
        **dict.fromkeys(FEW, (f"a whole number from 1 to {MOST_ROWS}", _whole(value, 1, MOST_ROWS))),
        **dict.fromkeys(NUMBERS, ("a number", isinstance(value, int | float) and abs(value) < inf)),
        **dict.fromkeys(TOKENS, ("a token's id, or a list of such", _tokens(value, -1, LAST))),
        **dict.fromkeys(CHOSEN_TOKENS, (f"a list of tokens' ids up to {last}", value == [] or _tokens(value, 0, last))),
        **dict.fromkeys(OUTPUTS, ("true or false", value in (True, False))),
        "assistant_early_exit": (f"a layer from 1 to {most_layers}", _whole(value, 1, most_layers)),
        "stop_strings": ("a text, or a list of such", _texts(value)),
        "bad_words_ids": ("a list of lists of tokens' ids", _lists_of_tokens(value)),
        "sequence_bias": ("a list of pairs of tokens' ids and a number", _biases(value)),
    }
    return None if name not in wanted or wanted[name][1] else wanted[name][0]


def _whole(value: Any, first: int, last: int) -> bool:
    return isinstance(value, int) and first <= value <= last


def _tokens(value: Any, first: int, last: int) -> bool:
    ids = value if isinstance(value, list) else [value]
    return bool(ids) and all(_whole(each, first, last) for each in ids)


def _lists_of_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(e, list) and _tokens(e, 0, LAST) for e in value)


def _biases(value: Any) -> bool:
    pairs = value if isinstance(value, list) and all(isinstance(e, list) and len(e) == 2 for e in value) else []
    return _lists_of_tokens([ids for ids, _ in pairs]) and all(type(bias) is float for _, bias in pairs)


def _texts(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) and text != "" for text in texts)

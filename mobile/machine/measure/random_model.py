"""A small OLMoE model with random weights: its kernels and its decode steps are timed."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, OlmoeConfig

from mobile.live_model import compat


def random_model(
    device: torch.device, dtype: torch.dtype, layers: int, hidden: int, width: int, experts: int, top_k: int
) -> Any:
    """Return the model on the device, in eval mode; its experts are `hidden` by `width`. Raise Refused under -OO."""
    compat.check_docstrings()
    config = OlmoeConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 128),
        num_key_value_heads=max(1, hidden // 128),
        num_experts=experts,
        num_experts_per_tok=top_k,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.set_experts_implementation("eager")
    return model

"""The four shipped families: each with its real expert count, top-k and router, and nothing else of its real size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

END, PAD = 0, 1  # token ids
VOCABULARY = 1024
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": END,
    "eos_token_id": END,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Family:
    """A stock model class and its small configuration; `geometry` is the real model it stands for."""

    model: type[PreTrainedModel]
    config: Any
    geometry: str
    says: str


FAMILIES = {
    "olmoe": Family(
        OlmoeForCausalLM,
        OlmoeConfig(
            **SHARED,
            intermediate_size=24,
            num_key_value_heads=4,
            num_experts=64,
            num_experts_per_tok=8,
            norm_topk_prob=False,
            clip_qkv=None,
        ),
        "olmoe-1b-7b",
        "64 experts, 8 active, weights not normalised",
    ),
    "qwen2-moe": Family(
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig(
            **SHARED,
            intermediate_size=96,
            num_key_value_heads=4,
            num_experts=60,
            num_experts_per_tok=4,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=96,
            norm_topk_prob=False,
        ),
        "qwen1.5-moe-a2.7b",
        "60 experts, 4 active, weights not normalised, and a gated shared expert",
    ),
    "deepseek-v2": Family(
        DeepseekV2ForCausalLM,
        DeepseekV2Config(
            **SHARED,
            intermediate_size=192,
            num_key_value_heads=4,
            n_routed_experts=64,
            num_experts_per_tok=6,
            moe_intermediate_size=24,
            n_shared_experts=2,
            first_k_dense_replace=1,
            q_lora_rank=None,
            kv_lora_rank=32,
            qk_nope_head_dim=24,
            qk_rope_head_dim=16,
            v_head_dim=24,
            topk_method="greedy",
            norm_topk_prob=False,
            routed_scaling_factor=1.0,
        ),
        "deepseek-v2-lite",
        "64 experts, 6 active, 2 shared, a dense first layer, latent attention",
    ),
    "qwen3-moe": Family(
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            **SHARED,
            intermediate_size=96,
            num_key_value_heads=2,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=16,
            norm_topk_prob=True,
        ),
        "qwen3-30b-a3b",
        "128 experts, 8 active, weights normalised, grouped-query attention",
    ),
}

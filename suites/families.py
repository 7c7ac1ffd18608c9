"""The four model families, a row each: classes, the published model's sizes, and the small model that is shipped.

`mobile.costs.geometry` has the same sizes in bytes, which are all that times are computed from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

END, PAD = 0, 1  # token ids of the shipped models
VOCABULARY = 1024
SHARED: dict[str, Any] = {  # by all shipped models
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
class ModelFamily:
    """One family: its classes in Transformers, and keyword arguments of `config_class` for two of its models.

    `published` are those of the real model, from its config.json; `geometry` is its name in `mobile.costs.geometry`.
    `shipped` are those of the small model: the real expert count, top-k and router, and nothing else of its real size;
    `routing` describes these in words.
    """

    model_class: type[PreTrainedModel]
    config_class: type[PreTrainedConfig]
    geometry: str
    routing: str
    published: dict[str, Any]
    shipped: dict[str, Any]

    @property
    def config(self) -> Any:
        """Return the configuration of the small model."""
        return self.config_class(**self.shipped)


FAMILIES = {
    "olmoe": ModelFamily(
        model_class=OlmoeForCausalLM,
        config_class=OlmoeConfig,
        geometry="olmoe-1b-7b",
        routing="64 experts, 8 active, weights not normalised",
        published={
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
        },
        shipped={
            **SHARED,
            "intermediate_size": 24,
            "num_key_value_heads": 4,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "clip_qkv": None,
        },
    ),
    "qwen2-moe": ModelFamily(
        model_class=Qwen2MoeForCausalLM,
        config_class=Qwen2MoeConfig,
        geometry="qwen1.5-moe-a2.7b",
        routing="60 experts, 4 active, weights not normalised, and a gated shared expert",
        published={
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts": 60,
            "num_experts_per_tok": 4,
        },
        shipped={
            **SHARED,
            "intermediate_size": 96,
            "num_key_value_heads": 4,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 96,
            "norm_topk_prob": False,
        },
    ),
    "deepseek-v2": ModelFamily(
        model_class=DeepseekV2ForCausalLM,
        config_class=DeepseekV2Config,
        geometry="deepseek-v2-lite",
        routing="64 experts, 6 active, 2 shared, a dense first layer, latent attention",
        # Its YaRN is left out: rotary tables of the same size and cost.
        published={
            "vocab_size": 102400,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "num_hidden_layers": 27,
            "first_k_dense_replace": 1,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "topk_method": "greedy",
            "norm_topk_prob": False,
        },
        shipped={
            **SHARED,
            "intermediate_size": 192,
            "num_key_value_heads": 4,
            "n_routed_experts": 64,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 24,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": None,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 24,
            "qk_rope_head_dim": 16,
            "v_head_dim": 24,
            "topk_method": "greedy",
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
        },
    ),
    "qwen3-moe": ModelFamily(
        model_class=Qwen3MoeForCausalLM,
        config_class=Qwen3MoeConfig,
        geometry="qwen3-30b-a3b",
        routing="128 experts, 8 active, weights normalised, grouped-query attention",
        published={
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        },
        shipped={
            **SHARED,
            "intermediate_size": 96,
            "num_key_value_heads": 2,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 16,
            "norm_topk_prob": True,
        },
    ),
}
BY_GEOMETRY = {family.geometry: family for family in FAMILIES.values()}

"""A tiny random model of every family whose experts class Transformers decorates: 8 experts a layer, top 4, fp32.

`FAMILIES` are those of the installed version, `LISTED` those of the newest one that is supported.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Family:
    name: str  # the model's folder in transformers, plus the part for the two of Qwen3-Omni
    config: Callable[[], PreTrainedConfig]
    model: str  # the class in transformers which a user loads
    note: str = ""  # why it is no ordinary text generator, when it is none
    since: str = "5.17"  # the Transformers whose class is the first to be decorated


COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The same three facts under the three spellings that configs use.
NUM = {"num_experts": 8, "num_experts_per_tok": 4, "intermediate_size": 32, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 4, "intermediate_size": 16}
ROUTED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
}
GROUPS = {"n_group": 4, "topk_group": 3}  # 6 of the 8 experts are eligible
SCALED = {"norm_topk_prob": True, "routed_scaling_factor": 1.5}
DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
INDEXER = {"index_topk": 6, "index_head_dim": 16, "index_n_heads": 4}  # the prompts and windows exceed 6 tokens
SHARED_INDEX = {"indexer_types": ["full", "full", "shared"]}
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
ERNIE = {"intermediate_size": 32, "moe_num_experts": 8, "moe_k": 4, "moe_num_shared_experts": 1}
GEMMA = {
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "top_k_experts": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
MROPE = ROPE | {"head_dim": 8}
GRANITE = {"embedding_multiplier": 2.0, "logits_scaling": 0.5, "residual_multiplier": 0.5, "attention_multiplier": 0.3}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 16,
    "out_hidden_size": 32,
    "patch_size": 4,
    "image_size": 16,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "projection_intermediate_size": 16,
}
AUDIO = {
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "d_model": 16,
    "output_dim": 32,
    "num_mel_bins": 16,
    "downsample_hidden_size": 4,
}
SAM = {
    "hidden_size": 16,
    "output_channels": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 64,
    "mlp_dim": 16,
    "global_attn_indexes": [0],
    "downsample_channels": [16, 16],
}
SIGLIP = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 16,
    "patch_size": 4,
    "position_embedding_size": 16,
}
TOWER = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "out_hidden_size": 32,
    "patch_size": 4,
}
INKLING2 = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 16,
    "unpadded_vocab_size": 60,
    "head_dim": 8,
    "swa_head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "d_rel": 4,
    "rel_extent": 8,
    "sliding_window_size": 6,
    "n_layers_per_attn_res_block": 2,
    "route_scale": 1.5,
    "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
}
PREDICTOR = COMMON | {"head_dim": 8, "intermediate_size": 16, "num_code_groups": 4}
ENCODER = COMMON | {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}


def _build(config: str, settings: dict) -> PreTrainedConfig:
    return getattr(transformers, config)(**copy.deepcopy(settings))


def _family(
    name: str,
    model: str,
    *shared: dict,
    config: str = "Config",
    parts: dict | None = None,
    note: str = "",
    since: str = "5.17",
    **own: object,
) -> Family:
    """`shared` and `own` settings are the text model's: in `text_config` when the config has other `parts` too."""
    text: dict = {}
    for settings in (COMMON, *shared, own):
        text |= settings
    whole = text if parts is None else {"text_config": text, **parts}
    return Family(name, partial(_build, model.split("For")[0] + config, whole), model, note, since)


_ALL = [
    _family(
        "afmoe",
        "AfmoeForCausalLM",
        NUM,
        SLIDING,
        head_dim=8,
        num_shared_experts=1,
        route_scale=1.5,
        mup_enabled=True,
    ),
    _family(
        "aria",
        "AriaTextForCausalLM",
        since="5.18",
        intermediate_size=16,
        moe_num_experts=8,
        moe_topk=4,
        moe_num_shared_experts=1,
    ),
    _family("axk1", "AXK1ForCausalLM", ROUTED, MLA, GROUPS, SCALED),
    _family("axk2", "AXK2ForCausalLM", ROUTED, MLA, GROUPS, SCALED, INDEXER, DENSE_FIRST, gated_norm_rank=4),
    _family(
        "bailing_hybrid",
        "BailingHybridForCausalLM",
        MLA,
        GROUPS,
        SCALED,
        DENSE_FIRST,
        since="5.20",
        num_local_experts=8,
        q_lora_rank=None,
        num_experts_per_tok=4,
        n_shared_experts=1,
        intermediate_size=32,
        moe_intermediate_size=16,
        head_dim=8,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    _family("beam", "BeamForCausalLM", NUM, SLIDING, GROUPS, SCALED, DENSE_FIRST, since="5.20", head_dim=8),
    _family(
        "cohere2_moe",
        "Cohere2MoeForCausalLM",
        NUM,
        SLIDING,
        DENSE_FIRST,
        head_dim=8,
        num_shared_experts=1,
        prefix_dense_intermediate_size=32,
        logit_scale=1.0,
    ),
    _family(
        "deepseek_ocr2",
        "DeepseekOcr2ForConditionalGeneration",
        ROUTED,
        GROUPS,
        DENSE_FIRST,
        topk_method="group_limited_greedy",
        parts={"vision_config": {"sam_config": SAM, "encoder_config": ENCODER}},
    ),
    _family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        ROUTED,
        MLA,
        GROUPS,
        q_lora_rank=None,
        first_k_dense_replace=1,
        topk_method="group_limited_greedy",
        routed_scaling_factor=1.5,
    ),
    _family("deepseek_v3", "DeepseekV3ForCausalLM", ROUTED, MLA, GROUPS, SCALED, first_k_dense_replace=1),
    _family("deepseek_v32", "DeepseekV32ForCausalLM", ROUTED, MLA, GROUPS, SCALED, INDEXER, DENSE_FIRST),
    _family(
        "deepseek_v4",
        "DeepseekV4ForCausalLM",
        ROUTED,
        INDEXER,
        intermediate_size=16,
        num_hidden_layers=4,
        num_key_value_heads=1,
        head_dim=16,
        partial_rotary_factor=0.5,
        q_lora_rank=16,
        o_lora_rank=8,
        o_groups=2,
        hc_mult=2,
        sliding_window=6,
        index_topk=3,
        mlp_layer_types=["hash_moe", "hash_moe", "moe", "moe"],
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        layer_types=[
            "sliding_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "sliding_attention",
        ],
    ),
    _family(
        "diffusion_gemma",
        "DiffusionGemmaForBlockDiffusion",
        NUM,
        SLIDING,
        GEMMA,
        parts={"canvas_length": 8, "vision_config": SIGLIP},
        note="An encoder-decoder that denoises blocks of tokens: no next-token logits, no step of one token.",
    ),
    _family("dots1", "Dots1ForCausalLM", ROUTED, SLIDING, GROUPS, SCALED, first_k_dense_replace=1),
    _family(
        "dots3_note",
        "Dots3NoteForCausalLM",
        ROUTED,
        MLA,
        GROUPS,
        SCALED,
        INDEXER,
        DENSE_FIRST,
        config="TextConfig",
        since="5.23",
        head_dim=16,
        shared_experts_intermediate_size=16,
        sliding_window=6,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=4,
        swa_q_lora_rank=16,
        swa_kv_lora_rank=16,
        swa_head_dim=16,
        swa_qk_nope_head_dim=8,
        swa_v_head_dim=8,
        layer_types=["indexed_attention", "sliding_attention", "indexed_attention"],
    ),
    _family("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", ERNIE, moe_intermediate_size=16),
    _family(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeForConditionalGeneration",
        ERNIE,
        ROPE,
        moe_intermediate_size=[16, 8],
        parts={"vision_config": VISION},
    ),
    _family("exaone_moe", "ExaoneMoeForCausalLM", NUM, SLIDING, GROUPS, SCALED, DENSE_FIRST),
    _family("flex_olmo", "FlexOlmoForCausalLM", NUM, intermediate_size=16),
    _family(
        "flint",
        "FlintForCausalLM",
        NUM,
        SLIDING,
        since="5.21",
        head_dim=8,
        shared_expert_intermediate_size=16,
        mlp_only_layers=[0],
    ),
    _family("gemma4", "Gemma4ForConditionalGeneration", NUM, SLIDING, GEMMA, parts={}),
    _family("glm4_moe", "Glm4MoeForCausalLM", ROUTED, GROUPS, SCALED, head_dim=8, first_k_dense_replace=1),
    _family("glm4_moe_lite", "Glm4MoeLiteForCausalLM", ROUTED, MLA, GROUPS, SCALED, DENSE_FIRST),
    _family(
        "glm4v_moe",
        "Glm4vMoeForConditionalGeneration",
        ROUTED,
        GROUPS,
        SCALED,
        MROPE,
        first_k_dense_replace=1,
        partial_rotary_factor=1.0,
        parts={"vision_config": VISION},
    ),
    _family(
        "glm5_next",
        "Glm5NextForConditionalGeneration",
        ROUTED,
        MLA,
        GROUPS,
        SCALED,
        INDEXER,
        SHARED_INDEX,
        DENSE_FIRST,
        qk_rope_head_dim=0,
        linear_head_dim=8,
        linear_num_heads=4,
        hc_mult=2,
        index_kpool=2,
        layer_types=["linear_attention", "deepseek_sparse_attention", "deepseek_sparse_attention"],
        parts={"vision_config": VISION},
    ),
    _family("glm_moe_dsa", "GlmMoeDsaForCausalLM", ROUTED, MLA, GROUPS, SCALED, INDEXER, SHARED_INDEX, DENSE_FIRST),
    _family("gpt_oss", "GptOssForCausalLM", LOCAL, SLIDING, head_dim=8),
    _family("granitemoe", "GraniteMoeForCausalLM", LOCAL, GRANITE),
    _family("granitemoe_swa", "GraniteMoeSWAForCausalLM", LOCAL, GRANITE, SLIDING, shared_intermediate_size=16),
    _family(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        LOCAL,
        GRANITE,
        shared_intermediate_size=16,
        mamba_n_heads=4,
        mamba_d_state=8,
        mamba_chunk_size=4,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    _family("granitemoeshared", "GraniteMoeSharedForCausalLM", LOCAL, GRANITE, shared_intermediate_size=16),
    _family("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", head_dim=8, intermediate_size=16, num_experts=8, moe_topk=4),
    _family("hy_v3", "HYV3ForCausalLM", NUM, DENSE_FIRST, head_dim=8, router_scaling_factor=1.5),
    _family("hy_v4", "HYV4ForCausalLM", ROUTED, MLA, GROUPS, SCALED, INDEXER, SHARED_INDEX, DENSE_FIRST, hc_mult=2),
    _family(
        "hy_v4_vl",
        "HYV4VLForConditionalGeneration",
        ROUTED,
        MLA,
        GROUPS,
        SCALED,
        INDEXER,
        SHARED_INDEX,
        DENSE_FIRST,
        ROPE,
        since="5.24",
        hc_mult=2,
        parts={"vision_config": TOWER | {"max_image_size": 16}},
    ),
    _family(
        "inkling",
        "InklingForCausalLM",
        ROUTED,
        DENSE_FIRST,
        config="TextConfig",
        head_dim=8,
        swa_head_dim=8,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        sliding_window_size=6,
        d_rel=4,
        rel_extent=8,
        layer_types=["hybrid_sliding", "hybrid", "hybrid_sliding"],
        logits_mup_width_multiplier=2.0,
        route_scale=1.5,
    ),
    _family("inkling2", "Inkling2ForCausalLM", INKLING2, config="TextConfig", since="5.23"),
    _family(
        "inkling2_loop",
        "Inkling2LoopForCausalLM",
        INKLING2,
        config="TextConfig",
        since="5.24",
        n_layers_per_attn_res_block=1,
        loop_layer_index_start=1,
        loop_layer_index_end=2,
        loop_num_passes=2,
        loop_gate_rank=4,
    ),
    _family(
        "jamba",
        "JambaForCausalLM",
        num_hidden_layers=4,
        intermediate_size=16,
        num_experts=8,
        num_experts_per_tok=4,
        attn_layer_period=4,
        attn_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    _family(
        "kimi_linear",
        "KimiLinearForCausalLM",
        MLA,
        GROUPS,
        SCALED,
        DENSE_FIRST,
        num_local_experts=8,
        q_lora_rank=None,
        num_experts_per_tok=4,
        n_shared_experts=1,
        intermediate_size=32,
        moe_intermediate_size=16,
        linear_head_dim=8,
        linear_num_heads=4,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    _family(
        "kolibri1",
        "Kolibri1ForCausalLM",
        NUM,
        SLIDING,
        since="5.20",
        head_dim=8,
        shared_expert_intermediate_size=16,
    ),
    _family(
        "laguna",
        "LagunaForCausalLM",
        NUM,
        SLIDING,
        DENSE_FIRST,
        head_dim=8,
        shared_expert_intermediate_size=16,
        num_attention_heads_per_layer=[4, 2, 4],
    ),
    _family(
        "lara_mini",
        "LaraMiniForCausalLM",
        NUM,
        LINEAR,
        since="5.24",
        head_dim=8,
        sliding_window=6,
        shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "sliding_attention", "full_attention"],
    ),
    _family("lfm2_moe", "Lfm2MoeForCausalLM", NUM, num_dense_layers=1, layer_types=["conv", "full_attention", "conv"]),
    _family("mellum", "MellumForCausalLM", NUM, SLIDING, DENSE_FIRST, head_dim=8),
    _family(
        "mimo_v2_flash",
        "MiMoV2FlashForCausalLM",
        ROUTED,
        SLIDING,
        GROUPS,
        SCALED,
        DENSE_FIRST,
        head_dim=12,
        v_head_dim=8,
    ),
    _family(
        "minimax",
        "MiniMaxForCausalLM",
        LOCAL,
        head_dim=8,
        block_size=4,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    _family("minimax_m2", "MiniMaxM2ForCausalLM", LOCAL, head_dim=8),
    _family(
        "minimax_m3_vl",
        "MiniMaxM3VLForCausalLM",
        LOCAL,
        DENSE_FIRST,
        config="TextConfig",
        head_dim=8,
        rotary_dim=4,
        dense_intermediate_size=32,
        shared_intermediate_size=16,
        index_n_heads=2,
        index_head_dim=8,
        index_block_size=2,
        index_topk_blocks=2,
        layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
    ),
    _family("mistral4", "Mistral4ForCausalLM", ROUTED, MLA, GROUPS, SCALED, first_k_dense_replace=1),
    _family(
        "mistral_large4",
        "MistralLarge4ForConditionalGeneration",
        ROUTED,
        MLA,
        GROUPS,
        SCALED,
        INDEXER,
        SHARED_INDEX,
        DENSE_FIRST,
        since="5.22",
        no_rope_layers=[1, 0, 0],
        kv_source_layers=[0, 1, 1],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        parts={"vision_config": SIGLIP},
    ),
    _family("mixtral", "MixtralForCausalLM", LOCAL, num_experts_per_tok=2),
    _family(
        "muse_spark",
        "MuseSparkForConditionalGeneration",
        LOCAL,
        SLIDING,
        DENSE_FIRST,
        since="5.20",
        head_dim=8,
        moe_intermediate_size=16,
        moe_hidden_size=24,
        routed_scaling_factor=1.5,
        output_multiplier=1.0,
        parts={
            "vision_config": TOWER | {"pos_emb_height": 4, "pos_emb_width": 4, "max_position_embeddings": 16},
            "audio_config": {
                "patch_sizes": [4, 2],
                "hidden_sizes": [8, 16],
                "depths": [1, 1],
                "num_hidden_layers": 2,
                "out_hidden_size": 32,
            },
            "out_hidden_size": 32,
            "projector_hidden_size": 16,
        },
    ),
    _family(
        "nemotron_h",
        "NemotronHForCausalLM",
        ROUTED,
        GROUPS,
        SCALED,
        head_dim=8,
        moe_latent_size=24,
        moe_shared_expert_intermediate_size=16,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=2,
        ssm_state_size=8,
        chunk_size=4,
        use_mamba_kernels=False,
        layers_block_type=["linear_attention", "moe", "full_attention", "moe", "mlp"],
    ),
    _family("olmoe", "OlmoeForCausalLM", NUM, intermediate_size=16),
    _family(
        "openai_privacy_filter",
        "OpenAIPrivacyFilterForTokenClassification",
        LOCAL,
        head_dim=8,
        sliding_window=6,
        note="A bidirectional token classifier: it has no generate() and no cache.",
    ),
    _family("phimoe", "PhimoeForCausalLM", LOCAL, sliding_window=6, num_experts_per_tok=2),
    _family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        NUM,
        SLIDING,
        shared_expert_intermediate_size=16,
        use_sliding_window=True,
    ),
    _family(
        "qwen3_5_moe",
        "Qwen3_5MoeForCausalLM",
        NUM,
        LINEAR,
        config="TextConfig",
        head_dim=8,
        shared_expert_intermediate_size=16,
    ),
    _family("qwen3_moe", "Qwen3MoeForCausalLM", NUM, head_dim=8, norm_topk_prob=True, mlp_only_layers=[0]),
    _family("qwen3_next", "Qwen3NextForCausalLM", NUM, LINEAR, head_dim=8, shared_expert_intermediate_size=16),
    _family(
        "qwen3_omni_moe_talker",
        "Qwen3OmniMoeTalkerForConditionalGeneration",
        NUM,
        MROPE,
        shared_expert_intermediate_size=16,
        note="Speaks what the thinker wrote: it takes embeddings and the thinker's states, no input_ids alone.",
        parts={
            "code_predictor_config": PREDICTOR,
            "num_code_groups": 4,
            "thinker_hidden_size": 32,
            "spatial_merge_size": 2,
        },
    ),
    _family(
        "qwen3_omni_moe_thinker",
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        NUM,
        MROPE,
        parts={"vision_config": VISION, "audio_config": AUDIO, "vision_start_token_id": 63},
    ),
    _family("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", NUM, MROPE, parts={"vision_config": VISION}),
    _family(
        "qwen4_exp",
        "Qwen4ExpForCausalLM",
        NUM,
        LINEAR,
        config="TextConfig",
        head_dim=8,
        hc_count=2,
        hc_lowrank=8,
        shared_expert_intermediate_size=16,
        ple_layer_ids=[1],
        heads_per_ngram=2,
        ngram_vocab_size_base=50,
        make_ngram_vocab_size_divisible_by=8,
        split_ngram_parts=2,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=4,
        indexer_compress_ratio=2,
    ),
    _family("solar_open", "SolarOpenForCausalLM", ROUTED, GROUPS, SCALED, head_dim=8),
    _family(
        "unlimited_ocr",
        "UnlimitedOcrForConditionalGeneration",
        ROUTED,
        GROUPS,
        DENSE_FIRST,
        since="5.20",
        topk_method="group_limited_greedy",
        sliding_window=6,
        parts={"vision_config": {"sam_config": SAM, "encoder_config": TOWER | {"image_size": 16}}},
    ),
    _family(
        "zaya",
        "ZayaForCausalLM",
        NUM,
        head_dim=8,
        router_hidden_size=32,
        sliding_window=6,
        num_experts_per_tok=1,
        layer_types=["hybrid", "hybrid_sliding", "hybrid"],
    ),
]
LISTED = {family.name: family for family in _ALL}
INSTALLED = Version(Version(transformers.__version__).base_version)
FAMILIES = {name: family for name, family in LISTED.items() if Version(family.since) <= INSTALLED}


@torch.no_grad()
def tiny(family: str, seed: int = 0, **changed: object) -> PreTrainedModel:
    """A random model of the family with weights wide enough that routing, and each choice of an expert, matters.

    `changed` settings of the text model are other than the family's here.
    """
    torch.manual_seed(seed)
    recipe = FAMILIES[family]
    config = recipe.config()
    for name, value in changed.items():
        setattr(config.get_text_config(), name, value)
    model = getattr(transformers, recipe.model)._from_config(config).eval()
    for name, weight in model.named_parameters():
        if weight.ndim >= 2 or not (name.endswith("bias") or weight.any()):  # sinks, temperatures
            weight.normal_(0, 0.3)
    for name, values in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("correction_bias", "expert_bias", "balancing_biases")):
            values[:8].normal_(0, 0.1)  # Zaya's ninth entry is no expert, and loading resets it to -1
        elif name.endswith("per_expert_scale"):
            values.uniform_(0.5, 1.5)
        elif name.endswith("tid2eid"):  # DeepSeek-V4's first layers look their experts up by token id
            values.copy_(torch.rand(len(values), 8).argsort(dim=-1)[:, : values.shape[1]])
    model.set_experts_implementation("eager")
    return model

"""Small random checkpoints packed as published ones are: FP8 in blocks, one scale a matrix, MXFP4."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, GptOssConfig, Mxfp4Config, Qwen3MoeConfig

EXPERTS, TOP_K, LAYERS = 8, 2, 3
HIDDEN, WIDTH = 128, 64
WEIGHTS = "model.safetensors"
GROUP = 32  # weights that share a scale in MXFP4


def fp8(folder: Path, *, block: int = 32, scales: torch.dtype = torch.float32) -> Path:
    """Make Qwen3-MoE in FP8 as published, and DeepSeek-V3: an expert's matrices apart, a scale for each block."""

    def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = weight.shape
        blocks = weight.view(rows // block, block, columns // block, block)
        scale = (blocks.abs().amax((1, 3), keepdim=True) / 448).to(scales)
        codes = (blocks / scale.float()).to(torch.float8_e4m3fn).view(rows, columns)
        return codes, scale.view(rows // block, columns // block)

    return _fp8(folder, [block, block], pack)


def fp8_one_scale(folder: Path) -> Path:
    """Make the same with one scale a matrix, written as a number and not a grid."""

    def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = (weight.abs().max() / 448).to(torch.bfloat16)
        return (weight / scale.float()).to(torch.float8_e4m3fn), scale

    return _fp8(folder, None, pack)


def _fp8(folder: Path, block: list[int] | None, pack: Callable) -> Path:
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=HIDDEN,
        moe_intermediate_size=WIDTH,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    weights = load_file(folder / WEIGHTS)
    for key in [key for key in weights if key.endswith("_proj.weight")]:
        # Weights of a size that a token's path depends on, so that a wrong scale is seen.
        weights[key], weights[f"{key}_scale_inv"] = pack(weights[key].float() * 4)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    quantised = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
    configure(folder, quantization_config=quantised | {"modules_to_not_convert": ["lm_head"]})
    return folder


def mxfp4(folder: Path) -> Path:
    """Make gpt-oss as published: 4-bit blocks and their scales, with the biases and everything else in bf16."""
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        pad_token_id=0,
        eos_token_id=2,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    weights = load_file(folder / WEIGHTS)
    for layer in range(LAYERS):
        for name, outputs, inputs in (("gate_up_proj", 2 * WIDTH, HIDDEN), ("down_proj", HIDDEN, WIDTH)):
            key, groups = f"model.layers.{layer}.mlp.experts.{name}", inputs // GROUP
            del weights[key]
            blocks = torch.randint(0, 256, (EXPERTS, outputs, groups, GROUP // 2), dtype=torch.uint8)
            weights[f"{key}_blocks"] = blocks
            weights[f"{key}_scales"] = torch.randint(120, 126, (EXPERTS, outputs, groups), dtype=torch.uint8)
            weights[f"{key}_bias"] = torch.randn_like(weights[f"{key}_bias"]) / 8
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    configure(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return folder


PACKED: dict[str, Callable[[Path], Path]] = {
    "fp8": fp8,
    "fp8, scales of bf16": lambda folder: fp8(folder, scales=torch.bfloat16),
    "fp8, one scale": fp8_one_scale,
    "mxfp4": mxfp4,
}


def configure(folder: Path, **settings: Any) -> None:
    """Change settings in a checkpoint's config.json."""
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | settings))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change a checkpoint's tensors."""
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def stock(folder: Path, dtype: torch.dtype) -> Any:
    """Return the model as Transformers itself dequantises it.

    Transformers 5.17 gives MXFP4 experts in bf16 whatever is asked for, which is then cast.
    """
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    chosen = (Mxfp4Config if method == "mxfp4" else FineGrainedFP8Config)(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation="eager", quantization_config=chosen
    )
    return model.float() if dtype == torch.float32 else model

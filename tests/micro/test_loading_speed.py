"""Gigabytes per second from files in the page cache to a model that can write. `nox -s bench`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig

import mobile
from mobile.checkpoints import loading


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """0.8 GB in bf16, an expert a tensor, in shards of 200 MB."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = OlmoeConfig(
        hidden_size=1024,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=64,
        num_experts_per_tok=8,
        vocab_size=1024,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="200MB")
    return folder


def read_files(folder: Path) -> None:
    """The limit: every byte copied once out of the page cache."""
    for file in folder.glob("*.safetensors"):
        file.read_bytes()


def stock(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder)


def direct(folder: Path) -> None:
    mobile.load(folder, "lru", slots=16, device="cpu", progress=False)


def converted(folder: Path) -> None:
    plan, loading.plan_readings = loading.plan_readings, lambda *_: None
    try:
        direct(folder)
    finally:
        loading.plan_readings = plan


@pytest.mark.parametrize("how", [read_files, stock, direct, converted], ids=lambda how: how.__name__)
def test_load_throughput(benchmark, checkpoint, how):
    nbytes = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    benchmark.pedantic(how, args=(checkpoint,), rounds=5, iterations=1, warmup_rounds=1)
    benchmark.extra_info["gb_per_s"] = round(nbytes / benchmark.stats.stats.median / 1e9, 2)

"""Tiny random models of each family, in fp32, with the stock eager experts as the reference."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_machine import (  # noqa: F401
    pytest_benchmark_compare_machine_info,
    pytest_benchmark_update_machine_info,
)
from tiny_run import answered, tiny_preset, undisturbed  # noqa: F401
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it, and what it starts would, too

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "olmoe": lambda: OlmoeConfig(**COMMON, intermediate_size=16, num_experts=8, num_experts_per_tok=4),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **COMMON,
        intermediate_size=32,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=8,
        num_experts_per_tok=4,
    ),
    "deepseek_v2": lambda: DeepseekV2Config(
        **COMMON,
        intermediate_size=32,
        moe_intermediate_size=16,
        n_routed_experts=8,
        num_experts_per_tok=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=None,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **COMMON,
        head_dim=8,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_experts=8,
        num_experts_per_tok=4,
        norm_topk_prob=True,
    ),
    "mixtral": lambda: MixtralConfig(**COMMON, intermediate_size=16, num_local_experts=8, num_experts_per_tok=2),
}
FAMILIES = sorted(CONFIGS)


@pytest.fixture(autouse=True)
def gradient_mode():
    """Hold each test to the mode it found: one that ends in another would fail tests after it instead of itself."""
    before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    yield
    after = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    torch.set_grad_enabled(before[0])
    assert after == before, "gradients or inference mode were left switched"


def tiny(family: str, seed: int = 0) -> PreTrainedModel:
    """A random model of the family: 8 experts a layer, top 4 (Mixtral: 2), wide enough weights to matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    for weight in model.parameters():
        if weight.ndim >= 2:
            weight.data.normal_(0, 0.3)
    model.set_experts_implementation("eager")
    return model


def prompt(rows: int = 1, length: int = 9, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: torch.Tensor, tokens: int = 10, **extra: object) -> tuple:
    """Generated ids and the stacked logits behind them, through stock generate()."""
    out = model.generate(
        ids,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **extra,
    )
    return out.sequences, torch.stack(out.logits)


def live_and_replayed(model: PreTrainedModel, strategy: Any, slots: int, file: Path, **options: Any) -> tuple[Any, Any]:
    """The ledger of two live requests, and of the trace they left in `file`, replayed."""
    import mobile
    from mobile.replay import trace

    mobile.attach(model, strategy, slots=slots, **options)
    with model.mobile.recording() as requests:
        for seed in (1, 2):
            greedy(model, prompt(seed=seed))
    engine = model.mobile
    engine.residency.end_token()
    mobile.detach(model)
    trace.save(file, requests, len(engine.layers), {})
    return engine.ledger, replayed(engine, trace.load(file)[0])


def replayed(engine: Any, requests: list) -> Any:
    """The ledger of these requests replayed as the engine ran them."""
    from mobile.replay import trace
    from mobile.replay.replay import ReplaySetup

    bench = ReplaySetup(engine.strategy, engine.geometry, engine.layer_map, engine.hardware, engine.slots)
    residency = bench.residency(events=200_000)
    trace.replay(requests, residency, engine.layer_map)
    return residency.ledger


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-readme", action="store_true", help="write the support table that the tests find")


def pytest_configure(config: pytest.Config) -> None:
    """Benchmarks run only when asked for; their plugin may be missing on a bare GPU machine."""
    if hasattr(config.option, "benchmark_skip") and not config.option.benchmark_only:
        config.option.benchmark_skip = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests in `gpu` skip themselves without a GPU, and no other test needs one."""
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param

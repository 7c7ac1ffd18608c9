"""Experts in the host store are never lost in silence: what saves, copies or loads a model says so or does it right."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import greedy, prompt, tiny
from safetensors.torch import save_model
from torch import nn
from transformers import PreTrainedModel

import mobile


def saved_by_accelerate(model: PreTrainedModel, folder: Path) -> None:
    pytest.importorskip("accelerate").Accelerator(cpu=True).save_model(model, folder)


SAVERS: dict[str, Callable[[PreTrainedModel, Path], object]] = {
    "state_dict": lambda model, folder: model.state_dict(),
    "state_dict of a part": lambda model, folder: model.model.layers.state_dict(),
    "state_dict of what wraps it": lambda model, folder: nn.Sequential(model).state_dict(),
    "torch.save": lambda model, folder: torch.save(model.state_dict(), folder / "weights.pt"),
    "safetensors": lambda model, folder: save_model(model, folder / "weights.safetensors"),
    "accelerate": saved_by_accelerate,
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
    "save_pretrained of the base model": lambda model, folder: model.model.save_pretrained(folder),
    "push_to_hub": lambda model, folder: model.push_to_hub("somebody/something"),
}


@pytest.mark.parametrize("door", SAVERS)
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2"])
def test_saving_is_refused_before_a_file_is_touched(family, door, tmp_path):
    model = mobile.attach(tiny(family), "lru", slots=8)
    with pytest.raises(mobile.Refused, match=r"saving would lose them; call mobile\.detach"):
        SAVERS[door](model, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    stock = tiny(family).state_dict()
    after = mobile.detach(model).state_dict()
    assert after.keys() == stock.keys()
    assert all(torch.equal(weight, stock[name]) for name, weight in after.items())


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, pickle.dumps, lambda thing: torch.save(thing, io.BytesIO())],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
def test_an_attached_model_is_neither_copied_nor_pickled_nor_any_part_with_experts(copied):
    model = mobile.attach(tiny("olmoe"), "lru", slots=8)
    for part in (model, model.model, model.model.layers[0].mlp, model.model.layers[0].mlp.experts, model.mobile):
        with pytest.raises(mobile.Refused, match=r"cannot be copied or pickled.*mobile\.detach"):
            copied(part)
    with pytest.raises(mobile.Refused, match="cannot be copied or pickled"):
        pickle.dumps(nn.Sequential(model))
    copied(model.lm_head)
    mobile.detach(model)
    copied(model)


def test_loading_weights_of_experts_is_refused_and_loads_none_of_the_others():
    model, other = mobile.attach(tiny("olmoe"), "lru", slots=8), tiny("olmoe", seed=1)
    expected = greedy(tiny("olmoe"), prompt())[1]
    for part in ("", "model", "model.layers.2.mlp.experts"):
        with pytest.raises(mobile.Refused, match=r"load_state_dict does not reach.*mobile\.detach"):
            model.get_submodule(part).load_state_dict(other.get_submodule(part).state_dict())
    assert torch.equal(greedy(model, prompt())[1], expected)


def test_other_weights_are_loaded_as_ever():
    model, other = mobile.attach(tiny("olmoe"), "lru", slots=8), tiny("olmoe", seed=1)
    model.lm_head.load_state_dict(other.lm_head.state_dict())
    others = {name: weight for name, weight in other.state_dict().items() if ".experts." not in name}
    model.load_state_dict(others, strict=False)
    stock = tiny("olmoe")
    stock.load_state_dict(others, strict=False)
    assert torch.equal(greedy(model, prompt())[1], greedy(stock, prompt())[1])


# --- adapters ---------------------------------------------------------------------------------------


def lora(model: PreTrainedModel, **settings: object) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    settings = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | settings
    return peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings)).eval()


@pytest.mark.parametrize(("strategy", "gamma"), [("lru", None), ("mobile", 1.1)])
def test_an_adapter_on_attention_is_put_on_saved_loaded_and_merged_around_an_engine(strategy, gamma, tmp_path):
    stock = lora(tiny("olmoe"))
    stock.save_pretrained(tmp_path)
    expected = greedy(stock, prompt())[1]
    peft = pytest.importorskip("peft")

    def attached(model: nn.Module) -> nn.Module:
        return mobile.attach(model, strategy, slots=8, gamma=gamma, poison=True)

    around = attached(lora(tiny("olmoe")))
    loaded = peft.PeftModel.from_pretrained(attached(tiny("olmoe")), tmp_path).eval()
    for model in (lora(attached(tiny("olmoe"))), loaded, around):
        assert torch.equal(greedy(model, prompt())[1], expected)
        assert model.mobile.stats()["tokens"] == 9
    added, stock_added = attached(tiny("olmoe")), tiny("olmoe")
    for model in (added, stock_added):
        model.load_adapter(tmp_path)
    assert torch.equal(greedy(added, prompt())[1], greedy(stock_added, prompt())[1])
    around.save_pretrained(tmp_path / "again")
    name = "adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    with around.disable_adapter():
        assert torch.equal(greedy(around, prompt())[1], greedy(tiny("olmoe"), prompt())[1])
    merged = around.merge_and_unload()
    assert torch.equal(greedy(merged, prompt())[1], greedy(stock.merge_and_unload(), prompt())[1])


def test_an_adapter_on_the_experts_is_refused_by_name_before_and_after():
    on_experts = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    model = lora(tiny("olmoe"), **on_experts)
    for outer in (model, model.get_base_model()):
        with pytest.raises(mobile.Refused, match=r"adapter \(LoRA\).* lies on the experts .*merge_and_unload"):
            mobile.attach(outer, "lru", slots=8)
    attached = mobile.attach(tiny("olmoe"), "lru", slots=8)
    with pytest.raises(mobile.Refused, match=r"nothing can be put around their weights; call mobile\.detach"):
        lora(attached, **on_experts)
    expected = greedy(tiny("olmoe"), prompt())[1]
    assert torch.equal(greedy(attached, prompt())[1], expected)
    merged = model.merge_and_unload()
    expected = greedy(merged, prompt())[1]
    assert torch.equal(greedy(mobile.attach(merged, "lru", slots=8), prompt())[1], expected)

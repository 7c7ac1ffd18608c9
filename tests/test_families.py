"""Every family whose experts Transformers decorates works, exactly, or is refused with the reason.

`pytest tests/test_families.py --update-readme` writes what is found here into the README's table of support.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import transformers
from conftest import greedy, prompt
from families import FAMILIES, tiny
from transformers import PreTrainedModel

import mobile
from mobile.compat import moe_layers

README = Path(__file__).parent.parent / "README.md"
TOKENS = 8
K_NAMES = ("top_k_experts", "num_experts_per_tok", "moe_k", "moe_topk")


@dataclass(frozen=True)
class Found:
    """What was seen of a family; each claim is checked against the stock model where it is made."""

    offloads: bool = False  # bit-identical at every pool size, and read exactly from its own on-disk format
    halves: bool = False  # half-K steps equal a model configured with half the K, and a fallback leaves no trace
    reason: str = ""  # why not, in the refusal's words


def stock(name: str, folder: str) -> PreTrainedModel:
    """The stock model as a user would load it from disk, its weights out of the file's mapping.

    Mapped weights may lie unaligned, which alone moves logits in the last bit.
    """
    kind = getattr(transformers, FAMILIES[name].model)
    model = kind.from_pretrained(folder, experts_implementation="eager")
    for weight in model.parameters():
        weight.data = weight.data.clone()
    return model


@cache
def examined(name: str) -> Found:
    with TemporaryDirectory() as folder:
        tiny(name).save_pretrained(folder, max_shard_size="20KB")
        model = stock(name, folder)
        ids = prompt()
        try:
            mobile.attach(model, "lru", slots=8)
        except mobile.Refused as refused:
            return Found(reason=str(refused))
        mobile.detach(model)
        expected = greedy(model, ids, TOKENS)
        _offloads(model, ids, expected)
        _loads(model, folder)
        try:
            mobile.attach(model, "mobile", slots=8, gamma=1.1, poison=True)
        except mobile.Refused as refused:
            return Found(offloads=True, reason=str(refused))
        _falls_back(model, ids, expected)
        _halves(model, ids)
    return Found(offloads=True, halves=True)


def _offloads(model: PreTrainedModel, ids: torch.Tensor, expected: tuple) -> None:
    layers = moe_layers(model)
    for slots in (layers[0].top_k, 2 * layers[0].top_k + 1, 8 * len(layers)):
        for strategy in ("lru", "on-demand"):
            mobile.attach(model, strategy, slots=slots, poison=True)
            tokens, logits = greedy(model, ids, TOKENS)
            loads = model.mobile.stats()["loads"]
            mobile.detach(model)
            assert torch.equal(logits, expected[1]), (strategy, slots)
            assert torch.equal(tokens, expected[0]), (strategy, slots)
            assert loads > 0


def _loads(model: PreTrainedModel, folder: str) -> None:
    """From many shards of the family's own format: every weight is the stock model's, bit for bit."""
    loaded = mobile.detach(mobile.load(folder, "lru", slots=8, device="cpu"))
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert type(loaded) is type(model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(weight, theirs[key]) for key, weight in ours.items())


def _falls_back(model: PreTrainedModel, ids: torch.Tensor, expected: tuple) -> None:
    tokens, logits = greedy(model, ids, TOKENS)
    stats = model.mobile.stats()
    mobile.detach(model)
    assert torch.equal(logits, expected[1])
    assert torch.equal(tokens, expected[0])
    assert stats["fallbacks"] == stats["tokens"] == TOKENS - 1


@torch.no_grad()
def _halves(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Against a second model whose configuration says half as many experts, on the first one's prompt cache."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    knob = next(name for name in K_NAMES if isinstance(getattr(text, name, None), int))
    setattr(text, knob, getattr(text, knob) // 2)
    half = type(model)._from_config(config).eval()
    half.load_state_dict(model.state_dict())
    half.set_experts_implementation("eager")
    out = model(ids, use_cache=True)
    written, rows = [], []
    for _ in range(TOKENS):
        rows.append(out.logits[:, -1])
        written.append(int(rows[-1].index_fill(1, torch.tensor(2), -torch.inf).argmax()))  # no early end
        place = torch.tensor([[ids.shape[1] + len(written) - 1]])  # MiniMax cannot tell it from its cache
        out = half(
            torch.tensor([[written[-1]]]), position_ids=place, past_key_values=out.past_key_values, use_cache=True
        )
    for strategy, gamma in (("static-half", None), ("mobile", 0.0)):
        mobile.attach(model, strategy, slots=8, gamma=gamma, poison=True)
        tokens, logits = greedy(model, ids, TOKENS)
        mobile.detach(model)
        assert tokens[0, ids.shape[1] :].tolist() == written
        assert torch.allclose(logits, torch.stack(rows), atol=1e-4)


RUNNABLE = sorted(name for name, family in FAMILIES.items() if not family.note)


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_family_works_exactly_or_says_why_not(name):
    found = examined(name)
    assert found.halves or found.reason.endswith(".")


def test_every_decorated_class_of_this_transformers_is_in_the_list():
    models = Path(transformers.__file__).parent / "models"
    decorated = {
        path.parent.name
        for path in models.glob("*/modeling_*.py")
        if re.search(r"^@use_experts_implementation", path.read_text(), re.MULTILINE)
    }
    listed = {re.sub("_(talker|thinker)$", "", name) for name in FAMILIES}
    assert listed - decorated == set()
    if transformers.__version__.startswith("5.17."):
        assert decorated == listed
        assert len(FAMILIES) == 55


def table() -> str:
    """The README's table, from what the tests above find."""
    found = {name: examined(name) for name in RUNNABLE}
    full = [name for name in RUNNABLE if found[name].halves]
    lossless = [name for name in RUNNABLE if found[name].offloads and not found[name].halves]
    reasons = {name: found[name].reason for name in RUNNABLE if not found[name].offloads}
    reasons |= {name: family.note for name, family in FAMILIES.items() if family.note}
    lines = ["| | families of Transformers 5.17 |", "| --- | --- |"]
    lines.append(f"| every strategy ({len(full)}) | {', '.join(full)} |")
    lines += [f"| lossless strategies only | {name}: {found[name].reason} |" for name in lossless]
    lines += [f"| refused | {name}: {reason} |" for name, reason in sorted(reasons.items())]
    return "\n".join(lines) + "\n"


def test_the_readme_says_what_these_tests_found(request):
    text = README.read_text()
    written = re.search(r"(?<=<!-- support -->\n).*?(?=<!-- /support -->)", text, re.DOTALL)
    if request.config.getoption("--update-readme"):
        README.write_text(text[: written.start()] + table() + text[written.end() :])
    else:
        assert written[0] == table()

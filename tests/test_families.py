"""Every family whose experts Transformers decorates works, exactly, or is refused with the reason.

`pytest tests/test_families.py --update-readme`, under the newest Transformers that is supported, writes what is found
here into the table of support in mobile/README.md. Under an older one the table is compared without the families it
lacks.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import transformers
from conftest import greedy, prompt
from families import FAMILIES, INSTALLED, LISTED, VISION, tiny
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

import mobile
from mobile.live_model import compat
from mobile.live_model.compat import moe_layers
from mobile.store import DiskStore

README = Path(__file__).parent.parent / "mobile" / "README.md"
OLDEST, NEWEST_BELOW = Version(compat.OLDEST), Version(compat.NEWEST_BELOW)
IS_NEWEST = INSTALLED.minor + 1 == NEWEST_BELOW.minor
HEAD = "| | families, and the Transformers that brought them if that is newer than 5.17 |"
TOKENS = 8
K_NAMES = ("top_k_experts", "num_experts_per_tok", "moe_k", "moe_topk")


@dataclass(frozen=True)
class Found:
    """The findings about a family; each claim is checked against the stock model where it is made."""

    offloads: bool = False  # bit-identical at every pool size, and read exactly from its own on-disk format
    halves: bool = False  # half-K steps equal a model configured with half the K, and a fallback leaves no trace
    reason: str = ""  # why not, in the refusal's words
    blind: str = ""  # why no layer is foreseen from the one before, where that is refused


def stock(name: str, folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The stock model as a user would load it from disk, its weights out of the file's mapping.

    Mapped weights may lie unaligned, which alone moves logits in the last bit.
    """
    kind = getattr(transformers, FAMILIES[name].model)
    model = kind.from_pretrained(folder, experts_implementation="eager", dtype=dtype)
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
        _reads_from_disk(model, folder, ids, expected)
        blind = _foresees(model, ids, expected)
        try:
            mobile.attach(model, "mobile", slots=8, gamma=1.1, poison=True)
        except mobile.Refused as refused:
            return Found(offloads=True, reason=str(refused), blind=blind)
        _falls_back(model, ids, expected)
        _halves(model, ids)
    return Found(offloads=True, halves=True, blind=blind)


def _offloads(model: PreTrainedModel, ids: torch.Tensor, expected: tuple) -> None:
    layers = moe_layers(model)
    for slots in (layers[0].top_k, 2 * layers[0].top_k + 1, 8 * len(layers)):
        for strategy in ("lru", "on-demand"):
            mobile.attach(model, strategy, slots=slots, poison=True)
            _is_exact(model, ids, expected)


def _is_exact(model: PreTrainedModel, ids: torch.Tensor, expected: tuple) -> None:
    """An attached model writes what the stock one wrote; detached then."""
    where = (model.mobile.strategy.name, model.mobile.slots)
    tokens, logits = greedy(model, ids, TOKENS)
    loads = model.mobile.stats()["loads"]
    mobile.detach(model)
    assert torch.equal(logits, expected[1]), where
    assert torch.equal(tokens, expected[0]), where
    assert loads > 0, where


def _foresees(model: PreTrainedModel, ids: torch.Tensor, expected: tuple) -> str:
    """Strategies that ask the next layer's router are exact, too; returns why they are refused, where they are."""
    mobile.attach(model, "next-gate", slots=12, poison=True)
    _is_exact(model, ids, expected)
    try:
        mobile.attach(model, "speculating-experts-verify", slots=12, poison=True)
    except mobile.Refused as refused:
        return str(refused)
    _is_exact(model, ids, expected)
    return ""


def _loads(model: PreTrainedModel, folder: str) -> None:
    """From many shards of the family's own format: every weight is the stock model's, bit for bit."""
    loaded = mobile.detach(mobile.load(folder, "lru", slots=8, device="cpu"))
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert type(loaded) is type(model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(weight, theirs[key]) for key, weight in ours.items())


def _reads_from_disk(model: PreTrainedModel, folder: str, ids: torch.Tensor, expected: tuple) -> None:
    """With its experts in a file a family is exact, and whole once detached; loaded into a file as well."""
    rows = Path(folder) / "rows"
    mobile.attach(model, "lru", slots=8, store=rows, poison=True)
    _is_exact(model, ids, expected)
    loaded = mobile.load(folder, "lru", slots=8, device="cpu", store=rows)
    assert isinstance(loaded.mobile.store, DiskStore)
    ours, theirs = mobile.detach(loaded).state_dict(), model.state_dict()
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
    top_k_attribute = next(name for name in K_NAMES if isinstance(getattr(text, name, None), int))
    setattr(text, top_k_attribute, getattr(text, top_k_attribute) // 2)
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
    if INSTALLED.release[:2] == OLDEST.release:
        assert decorated == listed
        assert len(FAMILIES) == 55
    if IS_NEWEST:
        assert decorated == listed
        assert len(FAMILIES) == len(LISTED) == 68


def table() -> str:
    """The README's table, from what the tests above find."""
    found = {name: examined(name) for name in RUNNABLE}
    full = [name for name in RUNNABLE if found[name].halves and not found[name].blind]
    blind = [name for name in RUNNABLE if found[name].halves and found[name].blind]
    lossless = [name for name in RUNNABLE if found[name].offloads and not found[name].halves]
    reasons = {name: found[name].reason for name in RUNNABLE if not found[name].offloads}
    reasons |= {name: family.note for name, family in FAMILIES.items() if family.note}
    lines = [HEAD, "| --- | --- |", row_of(full)]
    lines += [f"| all but `speculating-experts` | {named(name)}: {found[name].blind} |" for name in blind]
    lines += [f"| lossless strategies only | {named(name)}: {found[name].reason} |" for name in lossless]
    lines += [f"| refused | {named(name)}: {reason} |" for name, reason in sorted(reasons.items())]
    return "\n".join(lines) + "\n"


def row_of(names: list[str]) -> str:
    return f"| every strategy ({len(names)}) | {', '.join(map(named, names))} |"


def named(name: str) -> str:
    """The family as the table has it, with the version that it came in if that is not the oldest supported."""
    since = LISTED[name].since
    return name if Version(since) == OLDEST else f"{name} ({since})"


def known_here(written: str, families: Collection[str]) -> str:
    """The table that was written under the newest Transformers, without all but these families."""
    head, rule, full, *others = written.splitlines()
    kept = [name for name in re.findall(r"[a-z]\w+", full.split("|")[2]) if name in families]
    others = [line for line in others if re.match(r"\| [^|]* \| (\w+)", line)[1] in families]
    return "\n".join([head, rule, row_of(kept), *others]) + "\n"


def test_the_readme_says_what_these_tests_found(request):
    text = README.read_text()
    written = re.search(r"(?<=<!-- support -->\n).*?(?=<!-- /support -->)", text, re.DOTALL)
    if request.config.getoption("--update-readme"):
        assert IS_NEWEST, "write the table under the newest Transformers that is supported"
        README.write_text(text[: written.start()] + table() + text[written.end() :])
    else:
        assert known_here(written[0], FAMILIES) == table()


def test_the_table_has_every_family_and_is_compared_without_those_that_are_not_there_yet():
    written = re.search(r"(?<=<!-- support -->\n).*?(?=<!-- /support -->)", README.read_text(), re.DOTALL)[0]
    assert all(re.search(rf"\b{re.escape(named(name))}(?!\w)", written) for name in LISTED)
    oldest = [name for name, family in LISTED.items() if Version(family.since) == OLDEST]
    compared = known_here(written, oldest)
    assert [name for name in LISTED if re.search(rf"\b{name}\b", compared)] == oldest


# --- what single families taught, on its own ---------------------------------------------------------

HALF = [name for name in ("inkling2", "mixtral", "muse_spark", "nemotron_h") if name in FAMILIES]
normed = pytest.mark.skipif("muse_spark" not in FAMILIES, reason="no class here has a norm behind its experts")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HALF)
def test_half_precision_is_exact_whatever_a_class_sums_its_experts_in(name, dtype, tmp_path):
    tiny(name).save_pretrained(tmp_path)
    model, ids = stock(name, tmp_path, dtype), prompt(2)
    expected = greedy(model, ids, TOKENS)
    mobile.attach(model, "lru", slots=8, poison=True)
    _is_exact(model, ids, expected)


@pytest.mark.parametrize(
    "name", ["deepseek_v32", "jamba", "gpt_oss"]
)  # which keep more beside keys and values, or less
def test_a_fallback_leaves_no_trace_in_a_static_cache(name):
    model, ids = tiny(name), prompt(2)
    expected = greedy(model, ids, TOKENS, cache_implementation="static")
    mobile.attach(model, "mobile", slots=16, gamma=1.1, poison=True)
    tokens, logits = greedy(model, ids, TOKENS, cache_implementation="static")
    assert torch.equal(logits, expected[1])
    assert torch.equal(tokens, expected[0])
    assert model.mobile.stats()["fallbacks"] == 2 * (TOKENS - 1)


def test_a_model_that_keeps_the_positions_of_its_last_batch_can_be_attached():
    model, ids = tiny("glm4v_moe"), prompt()
    expected = greedy(model, ids, TOKENS)
    greedy(model, prompt(rows=3), 2)
    mobile.attach(model, "mobile", slots=8, gamma=1.1, poison=True)
    _is_exact(model, ids, expected)


@pytest.mark.parametrize("name", ["deepseek_v4", "zaya"])
def test_a_router_that_is_given_more_than_hidden_states_can_be_asked_ahead(name):
    """DeepSeek-V4's is given token ids, Zaya's what the router before it made; pre-gated runs what they say."""
    model = tiny(name)
    mobile.attach(model, "pre-gated", slots=12, poison=True)
    tokens, logits = greedy(model, prompt(2), TOKENS)
    assert logits.isfinite().all()
    assert tokens.shape == (2, 9 + TOKENS)


def test_a_router_of_another_class_is_asked_ahead_once_it_has_been_given_as_many_tokens():
    """One that looks experts up by token id, behind one that does not: of the first step nothing is foreseen."""
    model, ids = tiny("deepseek_v4", mlp_layer_types=["moe", "hash_moe", "moe", "moe"]), prompt()
    expected = greedy(model, ids, TOKENS)
    mobile.attach(model, "next-gate", slots=12, poison=True)
    with model.mobile.recording(ahead=True) as requests:
        _is_exact(model, ids, expected)
    prompted, first, *others = requests[0]
    assert prompted.ahead is first.ahead is None
    assert len(others) == TOKENS - 2
    assert all(step.ahead.shape == (3, 8) for step in others)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.note])
def test_a_model_that_writes_no_text_is_refused_a_little_pass(name):
    model = tiny(name)
    with pytest.raises(mobile.Refused, match=r"\.$"):
        mobile.attach(model, "mobile", slots=8)
    assert not hasattr(model, "mobile")


class Backwards(nn.ModuleList):
    def __iter__(self):
        return reversed(list(super().__iter__()))


def test_a_model_that_does_not_run_each_layer_once_is_refused():
    model = tiny("olmoe")
    model.config.use_cache = False
    whole = model.model.layers
    for layers, count, words in (
        (nn.ModuleList([*whole, whole[1]]), 4, r"runs model\.layers\.1\.mlp\.experts 2 times for a token"),
        (whole, 2, r"does not run model\.layers\.2\.mlp\.experts for text"),
        (Backwards(whole), 3, "in another order"),
    ):
        model.model.layers, model.config.num_hidden_layers = layers, count
        with pytest.raises(mobile.Refused, match=words):
            mobile.attach(model, "lru", slots=8)
        assert not hasattr(model, "mobile")
    model.model.layers, model.config.num_hidden_layers = whole, 3
    mobile.attach(model, "lru", slots=8)


def test_of_a_checkpoint_that_sees_too_the_text_model_is_loaded_where_stock_loads_that(tmp_path):
    text = FAMILIES["qwen3_5_moe"].config().to_dict()
    config = transformers.Qwen3_5MoeConfig(text_config=text, vision_config=VISION)
    transformers.Qwen3_5MoeForConditionalGeneration._from_config(config).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = mobile.detach(mobile.load(tmp_path, "lru", slots=8, device="cpu"))
    assert type(loaded) is type(theirs) is transformers.Qwen3_5MoeForCausalLM
    ours = loaded.state_dict()
    assert ours.keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours[key], weight) for key, weight in theirs.state_dict().items())


@normed
def test_a_checkpoint_without_the_norm_behind_its_experts_is_refused(tmp_path):
    tiny("muse_spark").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {key: weight for key, weight in weights.items() if "post_expert_norm" not in key}
    assert len(kept) == len(weights) - 2
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(mobile.Refused, match="lacks 2 weights"):
        mobile.load(tmp_path, "lru", slots=8, device="cpu")


@normed
def test_the_norm_behind_experts_counts_among_what_stays_on_the_device():
    model = tiny("muse_spark")
    layers = moe_layers(model)
    apart = ("embed_tokens.weight", "lm_head.weight", "experts.gate_up_proj", "experts.down_proj")
    dense = sum(weight.nbytes for name, weight in model.named_parameters() if not name.endswith(apart))
    assert compat.geometry_of(model, layers, compat.common_layout(layers)).dense_nbytes == dense // len(layers)

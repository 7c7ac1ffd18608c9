"""`mobile plan` and `suites plan` say first whether it runs here, and refuse what a load refuses."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_refusals import command

import mobile
from mobile.checkpoints.source import cached_whole
from mobile.cli import main
from mobile.costs.geometry import GEOMETRIES
from mobile.costs.hardware import parse_gb_per_s, profile, write_profile
from mobile.machine.disk import Disk
from mobile.machine.gpu import UNKNOWN_LINK, Gpu
from suites.plan import preflight
from suites.plan.preset import read_preset

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "suites/models/olmoe-tiny"
EXPERTS = 12 * 2**30  # of olmoe-1b-7b: 16 layers of 64 experts of 3 x 2,048 x 1,024 weights in bf16


@pytest.fixture
def plan(capsys):
    """Run `mobile plan` here: its code, its lines on stdout, and stderr."""

    def run(*argv: object) -> tuple[int, list[str], str]:
        capsys.readouterr()
        code = main(["plan", *map(str, argv)])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return run


@pytest.fixture
def folder(tmp_path) -> Path:
    shutil.copytree(MODEL, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(("given", "runs"), [(EXPERTS, True), (EXPERTS - 1, False), ("13GB", True), ("1MiB", False)])
def test_the_first_line_says_whether_the_host_can_hold_the_experts(plan, given, runs):
    code, out, err = plan("olmoe-1b-7b", "--host-memory", given)
    assert (code, err) == (0 if runs else 1, "")
    if runs:
        given_gib = {EXPERTS: "12.00", "13GB": "12.11"}[given]
        assert out[0] == (
            f"runs: olmoe-1b-7b on rtx4080-pcie4 with 16.00 GiB, host memory 12.00 GiB of {given_gib} GiB"
        )
    else:
        assert out[0].startswith(
            "does not run here: olmoe-1b-7b on rtx4080-pcie4 with 16.00 GiB, because the experts take 12.0 GiB of host "
            "memory and "
        )
    assert any(line.startswith("Host memory: ") for line in plan("olmoe-1b-7b", "--host-memory", given, "--verbose")[1])
    code, out, _ = plan("olmoe-1b-7b", "--host-memory", given, "--json")
    made = json.loads("\n".join(out))
    assert code == (0 if runs else 1)
    assert (made["runs"], made["fits"], made["host_fits"], made["because"] is None) == (runs, True, runs, runs)


def test_brackets_in_the_sources_of_a_profile_are_printed_as_they_are(plan, tmp_path):
    card = replace(profile("auto"), name="card [red]", sources=("datasheet [1], table [/2]",))
    write_profile(card, tmp_path / "card.json")
    _, out, _ = plan("olmoe-1b-7b", "--hardware", tmp_path / "card.json", "--verbose")
    assert "card [red]: datasheet [1], table [/2]" in out
    assert " on card [red] with " in out[0]


def test_without_a_word_the_host_is_this_one(plan, monkeypatch):
    class Small:
        usable_nbytes = EXPERTS - 1

    monkeypatch.setattr("mobile.cli.plan.host", Small)
    assert plan("olmoe-1b-7b")[0] == 1
    monkeypatch.setattr(Small, "usable_nbytes", None)  # not Linux
    assert plan("olmoe-1b-7b")[0] == 0


def test_a_budget_that_is_too_small_is_the_first_line_and_refused(plan):
    code, out, err = plan("olmoe-1b-7b", "--memory", "1GiB")
    assert code == 2
    assert len(out) == 1
    assert out[0].startswith("does not run here: olmoe-1b-7b, because: A budget of 1,024 MiB cannot hold olmoe-1b-7b")
    assert err.startswith("error: A budget of 1,024 MiB cannot hold")
    code, out, _ = plan("olmoe-1b-7b", "--memory", "1GiB", "--json")
    said = json.loads("\n".join(out))
    assert (code, said["runs"], said["fits"]) == (2, False, False)
    assert said["because"] == said["reason"]


def test_a_size_that_is_none_is_refused(plan):
    code, out, err = plan("olmoe-1b-7b", "--host-memory", "plenty")
    assert (code, out) == (2, [])
    assert "write it like 8GiB" in err


CHANGES: dict[str, Callable[[Path], object]] = {
    "no weights but others": lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
    "a damaged file": lambda f: (f / "model.safetensors").write_bytes(b"short"),
    "an index of nothing": lambda f: [
        (f / "model.safetensors").unlink(),
        (f / "model.safetensors.index.json").write_text("{}"),
    ],
    "an adapter": lambda f: (f / "adapter_config.json").write_text("{}"),
    "a broken configuration": lambda f: (f / "config.json").write_text("{"),
    "no experts": lambda f: (f / "config.json").write_text(
        json.dumps({"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2})
    ),
    "another quantisation": lambda f: (f / "config.json").write_text(
        json.dumps({**json.loads((f / "config.json").read_text()), "quantization_config": {"quant_method": "gptq"}})
    ),
    "weights that are named and absent": lambda f: (f / "config.json").write_text(
        json.dumps({**json.loads((f / "config.json").read_text()), "transformers_weights": "x.safetensors"})
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_load_refuses_a_plan_refuses_in_the_same_words(plan, folder, change):
    change(folder)
    with pytest.raises(mobile.Refused) as refused:
        mobile.load(folder, "lru", slots=8, device="cpu", progress=False)
    code, out, err = plan(folder)
    assert code == 2
    assert err == f"error: {refused.value}\n"
    assert not out or out == [f"does not run here: {folder}, because: {refused.value}"]


LOADS: dict[str, dict[str, object]] = {
    "few slots": {"strategy": "lru", "slots": 8},
    "too few slots": {"strategy": "lru", "slots": 7},
    "fewer slots than a little pass needs": {"strategy": "mobile", "slots": 8},
    "memory": {"strategy": "mobile", "memory": "1100MiB"},
    "too little memory": {"strategy": "mobile", "memory": "1GiB"},
    "memory and slots": {"strategy": "lru", "memory": "8GiB", "slots": 8},
    "a size of nonsense": {"strategy": "lru", "memory": "plenty"},
    "all experts": {"strategy": "resident"},
    "all experts in few slots": {"strategy": "resident", "slots": 64},
    "all experts in little memory": {"strategy": "resident", "memory": "1026MiB"},
    "the future": {"strategy": "belady", "slots": 8},
    "an unknown strategy": {"strategy": "lruu", "slots": 8},
    "two of a part": {"strategy": "lfu+least-stale", "slots": 8},
    "composed": {"strategy": "mobile+lfu+cpu-hybrid", "slots": 80},
    "rows of int4": {"strategy": "lru", "slots": 8, "rows": "int4"},
    "rows of nonsense": {"strategy": "lru", "slots": 8, "rows": "int44"},
    "half precision": {"strategy": "lru", "slots": 8, "dtype": "float16"},
    "unknown hardware": {"strategy": "lru", "slots": 8, "hardware": "abacus"},
    "a processor beside a disk": {"strategy": "cpu-hybrid", "slots": 80, "link": "disk"},
    "a disk": {"strategy": "mobile", "slots": 80, "link": "disk"},
    "a disk and little memory": {"strategy": "mobile", "memory": "1024MiB", "link": "disk"},
    "room for a context": {"strategy": "lru", "memory": "1200MiB", "context_tokens": 64},
    "too long a context": {"strategy": "lru", "memory": "1200MiB", "context_tokens": 400_000},
    "no context": {"strategy": "lru", "memory": "1200MiB", "context_tokens": 0},
    "slots and a context": {"strategy": "lru", "slots": 80, "context_tokens": 64},
    "a disk and a context": {"strategy": "lru", "memory": "600MiB", "context_tokens": 64, "link": "disk"},
}


def refusal_of_a_load(source: Path, **options: object) -> str | None:
    try:
        mobile.load(source, **options, device="cpu", progress=False)
    except mobile.Refused as refused:
        return str(refused)
    return None


def words(options: dict[str, object], store: Path) -> list[str]:
    """The options of a load as those of a plan."""
    on_disk = options.get("link") == "disk"
    named = {name: str(value) for name, value in options.items() if name != "link"} | {"device": "cpu"}
    named |= {"disk": "1GB/s", "store": str(store)} if on_disk else {}
    return [word for name, value in named.items() for word in (f"--{name.replace('_', '-')}", value)]


@pytest.mark.parametrize("options", LOADS.values(), ids=LOADS)
def test_a_plan_refuses_exactly_what_a_load_with_those_options_refuses(plan, options, tmp_path):
    code, out, err = plan(MODEL, *words(options, tmp_path))
    store = {"store": tmp_path} if options.get("link") == "disk" else {}
    refusal = refusal_of_a_load(MODEL, **options, **store)
    assert (code, err) == ((0, "") if refusal is None else (2, f"error: {refusal}\n"))
    assert refusal or out[0].startswith("runs: ")


@pytest.mark.parametrize("tokens", [None, 1, 3000])
@pytest.mark.parametrize("link", ["virtual", "disk"])
def test_a_plan_has_the_slots_of_a_load_for_a_number_of_tokens(plan, tmp_path, tokens, link):
    reserve = 2**30 if tokens is None else reserve_for_tiny(tokens, link)
    options = {"strategy": "lru", "memory": reserve + 3_000_000, "context_tokens": tokens}
    options = {name: value for name, value in options.items() if value is not None}
    made = said(plan(MODEL, *words(options | ({"link": "disk"} if link == "disk" else {}), tmp_path), "--json")[1])
    model = mobile.load(
        MODEL, **options, link=link, device="cpu", progress=False, **({"store": tmp_path} if link == "disk" else {})
    )
    assert 8 < made["slots"] == model.mobile.slots < 256
    assert made["reserve"]["context_tokens"] == tokens
    assert made["reserve_nbytes"] == reserve


def reserve_for_tiny(tokens: int, link: str) -> int:
    from mobile.checkpoints import examine
    from mobile.costs.memory import CONTEXT_NBYTES, reserve_for
    from mobile.live_model import compat
    from mobile.runtime.kv_cache import kv_cache

    known = examine.examine(examine.find(MODEL))
    layout = known.layout.page_aligned() if link == "disk" else known.layout
    geometry = compat.geometry_of(known.empty, known.layers, layout)
    context = 0 if link == "disk" else CONTEXT_NBYTES
    return reserve_for(geometry, kv_cache(known.empty, known.layers), tokens, context).nbytes


EDITS: dict[str, dict[str, object]] = {
    "one expert a token": {"num_experts_per_tok": 1},
    "an odd top-k": {"num_experts_per_tok": 5},
    "more experts a token than there are": {"num_experts_per_tok": 65},
    "an unknown architecture": {"model_type": "abacus", "architectures": ["AbacusForCausalLM"]},
    "a dtype of nonsense": {"dtype": "int8"},
    "more layers than weights": {"num_hidden_layers": 4000},
    "awq": {"quantization_config": {"quant_method": "awq"}},
    "another method": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
}


@pytest.mark.parametrize("strategy", ["mobile", "static-half", "lru"])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_plan_refuses_exactly_the_folders_that_a_load_under_a_strategy_refuses(plan, folder, edit, strategy):
    (folder / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **edit}))
    code, _, err = plan(folder, "--strategy", strategy, "--slots", 80, "--device", "cpu")
    refusal = refusal_of_a_load(folder, strategy=strategy, slots=80)
    assert (code, err) == ((0, "") if refusal is None else (2, f"error: {refusal}\n"))


def test_a_preset_is_refused_in_the_same_words_as_a_checkpoint(plan, monkeypatch):
    """A preset's plan imports no torch, so it does not ask the plan of an attach; the rules are the same."""
    for options in (["--strategy", "belady"], ["--strategy", "resident", "--slots", 80], ["--slots", 7]):
        (preset, _, said_of_preset), (own, _, said_of_own) = (
            plan(model, "--slots", 80, *options) for model in ("olmoe-1b-7b", MODEL)
        )
        assert preset == own == 2
        assert said_of_preset.replace("1024", "256") == said_of_own
    assert plan("olmoe-1b-7b", "--strategy", "belady", "--strategy", "lru", "--slots", 80)[0] == 0


def test_a_card_that_does_not_hold_all_experts_does_not_run_what_keeps_them(plan):
    code, _, err = plan("qwen3-30b-a3b", "--strategy", "resident", "--host-memory", "64GiB")
    assert (code, err) == (
        2,
        "error: Strategy resident keeps all 6144 experts on the device; 1378 slots are too few.\n",
    )
    assert plan("olmoe-1b-7b", "--strategy", "resident", "--host-memory", "64GiB")[0] == 0


def test_of_several_strategies_those_that_a_load_refuses_are_said_and_the_others_planned(plan):
    asked = ("olmoe-1b-7b", "--memory", "8GiB", "--strategy", "resident", "--strategy", "lru")
    code, out, _ = plan(*asked)
    assert code == 0
    assert any(line.startswith("resident does not run: Strategy resident keeps all 1024 experts") for line in out)
    made = said(plan(*asked, "--json")[1])
    assert [row["strategy"] for row in made["strategies"]] == [row["strategy"] for row in made["expected"]] == ["lru"]
    assert list(made["refused"]) == ["resident"]


def test_host_memory_that_a_load_on_a_processor_lacks_a_plan_for_it_misses(plan, monkeypatch):
    from mobile.checkpoints import loading

    needed = said(plan(MODEL, "--slots", 80, "--device", "cpu", "--json")[1])["host_needed_nbytes"]
    for given, runs in ((needed, True), (needed - 1, False)):
        code, out, _ = plan(MODEL, "--slots", 80, "--device", "cpu", "--host-memory", f"{given}B")
        monkeypatch.setattr(loading, "host", type("Host", (), {"usable_nbytes": given}))
        if runs:
            assert code == 0
            mobile.load(MODEL, slots=80, device="cpu", progress=False)
            continue
        with pytest.raises(mobile.Refused) as refused:
            mobile.load(MODEL, slots=80, device="cpu", progress=False)
        because = said(plan(MODEL, "--slots", 80, "--device", "cpu", "--host-memory", f"{given}B", "--json")[1])[
            "because"
        ]
        assert code == 1
        assert str(refused.value).lower().startswith(because.lower())
        assert because in out[0]


def test_where_host_memory_is_short_it_says_what_would_do(plan):
    _, out, _ = plan("olmoe-1b-7b", "--host-memory", "8GiB")
    assert out[0].endswith("; --rows int8 takes 6.01 GiB, and --disk measure keeps them in a file")
    assert plan("olmoe-1b-7b", "--host-memory", "8GiB", "--rows", "int8")[0] == 0
    _, out, _ = plan("olmoe-1b-7b", "--host-memory", "4GiB")
    assert "; --rows int4 takes 3." in out[0]
    _, out, _ = plan("olmoe-1b-7b", "--host-memory", "1GiB")
    assert out[0].endswith("free; --disk measure keeps them in a file")


# --- speeds to expect, and what to run ------------------------------------------------------------------


@pytest.mark.parametrize("model", [*GEOMETRIES, MODEL])
@pytest.mark.parametrize("budget", [("--memory", "7GiB"), (), ("--host-memory", "64GiB", "--disk", "3.5GB/s")])
def test_the_short_plan_fits_a_small_screen(plan, model, budget):
    code, out, _ = plan(model, *budget)
    assert code in (0, 1)
    assert len(out) <= 25
    assert all(len(line) <= 100 for line in out if str(model) not in line)
    assert len(plan(model, *budget, "--verbose")[1]) > 40


def test_it_recommends_the_fastest_by_the_low_end_of_its_band_and_the_fastest_lossless_one(plan):
    made = said(plan("olmoe-1b-7b", "--memory", "8GiB", "--host-memory", "64GiB", "--json")[1])
    lows = {each["strategy"]: each["low"] for each in made["expected"]}
    exact = {each["strategy"] for each in made["expected"] if each["lossless"]}
    assert set(lows) > {"on-demand-overlap", "lru", "lfu", "mobile"}
    assert exact == {"on-demand-overlap", "lru", "lfu", "cpu-hybrid"}
    fastest, lossless = (made["recommendation"][part] for part in ("fastest", "lossless"))
    assert lows[fastest["strategy"]] == max(lows.values())
    assert lows[lossless["strategy"]] == max(lows[name] for name in exact)
    assert fastest["command"] == f"mobile generate MODEL PROMPT --strategy {fastest['strategy']} --memory 8GiB"
    for each in made["expected"]:
        assert 0 < each["low"] <= each["tokens_per_s"] <= each["high"]
        assert (each["fallback_rate"] is None) is not each["strategy"].startswith("mobile")
    _, out, _ = plan("olmoe-1b-7b", "--memory", "8GiB", "--host-memory", "64GiB")
    assert any(fastest["command"] == line.strip() for line in out)
    assert any(line.startswith("Projected from the routing of small models trained for this project") for line in out)


def test_the_recommended_command_is_one_that_runs(plan, capsys):
    """Its options are read from the JSON, and given to the command itself."""
    made = said(plan(MODEL, "--slots", 80, "--device", "cpu", "--rows", "int8", "--dtype", "float32", "--json")[1])
    for advised in made["recommendation"].values():
        program, *arguments = shlex.split(advised["command"])
        arguments[arguments.index("PROMPT")] = "Q: not True is"
        assert program == "mobile"
        assert main([*arguments, "--max-new-tokens", "2", "--json"]) == 0
        assert said(capsys.readouterr().out.splitlines())["strategy"] == advised["strategy"]


def test_a_model_that_fits_whole_is_recommended_to_stay_whole(plan):
    made = said(plan("olmoe-1b-7b", "--host-memory", "64GiB", "--json")[1])
    assert made["slots"] == 1024
    assert made["recommendation"]["lossless"]["strategy"] == "resident"


def test_a_slower_link_lowers_speeds_and_a_higher_fallback_rate_lowers_mobiles(plan, tmp_path):
    asked = ("qwen3-30b-a3b", "--memory", "12GiB", "--host-memory", "64GiB", "--json")
    slow = replace(profile("auto"), name="slow", link_gb_per_s=profile("auto").link_gb_per_s / 2)
    write_profile(slow, tmp_path / "slow.json")
    whole, halved, doubtful = (
        {each["strategy"]: each for each in said(plan(*asked, *more)[1])["expected"]}
        for more in ((), ("--hardware", tmp_path / "slow.json"), ("--fallback-rate", "0.5"))
    )
    for name, each in whole.items():
        assert halved[name]["tokens_per_s"] < each["tokens_per_s"]
        changes = name.startswith("mobile")
        assert (doubtful[name]["tokens_per_s"] < each["tokens_per_s"]) is changes
        assert doubtful[name]["fallback_rate"] == (0.5 if changes else None)
    assert halved["on-demand-overlap"]["tokens_per_s"] < 0.55 * whole["on-demand-overlap"]["tokens_per_s"]


def test_where_it_does_not_run_nothing_is_recommended(plan):
    made = said(plan("olmoe-1b-7b", "--host-memory", "8GiB", "--json")[1])
    assert made["recommendation"] is None
    assert made["expected"]


def test_on_a_disk_no_strategy_of_the_processor_is_named(plan):
    made = said(plan("qwen3-30b-a3b", "--host-memory", "16GiB", "--disk", "3.5GB/s", "--json")[1])
    assert not any("cpu-hybrid" in each["strategy"] for each in made["expected"])
    assert made["recommendation"]["fastest"]["command"].endswith("--link disk")


def test_a_router_that_was_not_measured_is_said_to_be_none(plan, folder):
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_experts": 16, "num_experts_per_tok": 2}))
    told = " ".join(plan(folder)[1])
    assert "of all of them, for none has 16 experts, top 2" in told
    assert "one of 64 experts, top 8" in " ".join(plan(MODEL)[1])


# --- the card -------------------------------------------------------------------------------------------


def test_the_card_of_this_machine_is_named_and_its_link_is_said_to_be_assumed(plan, monkeypatch):
    gib = 2**30
    gpu = Gpu("NVIDIA GeForce RTX 4090", None, None, 25 * gib, 24 * gib, None, UNKNOWN_LINK, UNKNOWN_LINK, None)
    monkeypatch.setattr("mobile.cli.planning.card.gpus_of_driver", lambda: [gpu])
    monkeypatch.delitem(sys.modules, "torch")  # as in a process of its own, in which no preset imports it
    _, out, _ = plan("olmoe-1b-7b", "--host-memory", "64GiB")
    assert out[0].startswith("runs: olmoe-1b-7b on NVIDIA GeForce RTX 4090 with 24.00 GiB")
    assert "are those of rtx4080-pcie4, not measured here" in " ".join(out)
    _, out, _ = plan("olmoe-1b-7b", "--host-memory", "64GiB", "--hardware", "rtx4080-pcie4")
    assert out[0].startswith("runs: olmoe-1b-7b on rtx4080-pcie4 with 16.00 GiB")
    assert not any(line.startswith("Card: ") for line in out)


def test_on_a_card_a_checkpoint_is_divided_as_a_load_divides_it(plan, monkeypatch):
    """The runtime's answers are made up; the rules are those of `plan_attach`, which a load asks too."""
    gib = 2**30
    for name, answer in {
        "is_available": True,
        "device_count": 1,
        "get_device_name": "NVIDIA GeForce RTX 4080",
        "mem_get_info": (15 * gib, 16 * gib),
        "memory_reserved": 0,
        "memory_allocated": 0,
    }.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_, answer=answer: answer)
    made = said(plan(MODEL, "--json")[1])
    assert made["hardware"] == "NVIDIA GeForce RTX 4080"
    assert made["reserve"]["context_tokens"] == min(
        4096, json.loads((MODEL / "config.json").read_text())["max_position_embeddings"]
    )
    assert 15 * gib <= made["memory_nbytes"] <= 16 * gib
    assert "not measured here" in made["assumed"]
    code, _, err = plan(MODEL, "--memory", "20GiB")
    assert code == 2
    assert "is more than the" in err
    assert "hardware" not in made["recommendation"]["fastest"]["command"]


def test_a_preset_is_planned_for_without_torch():
    script = "import sys; from mobile.cli import main; main(['plan', 'olmoe-1b-7b']); sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode == 0
    )


def test_a_configuration_alone_can_be_planned_for(plan, tmp_path):
    shutil.copy(MODEL / "config.json", tmp_path)
    assert plan(tmp_path)[0] == 0


def test_on_a_cpu_the_model_and_its_slots_need_host_memory_as_well(monkeypatch):
    """A card has its own; here the store, the dense weights and the slots lie side by side."""
    from mobile.checkpoints import examine, loading
    from mobile.live_model import compat

    known = examine.examine(examine.find(MODEL))
    own = compat.geometry_of(known.empty, known.layers, known.layout)
    needed = known.experts_nbytes + own.resident_nbytes + (8 + loading.PREFILL_BUFFERS) * known.layout.nbytes

    class Small:
        usable_nbytes = needed - 1

    monkeypatch.setattr(loading, "host", Small)
    with pytest.raises(mobile.Refused, match="GiB of host memory"):
        mobile.load(MODEL, "lru", slots=8, device="cpu", progress=False)
    monkeypatch.setattr(Small, "usable_nbytes", needed)
    mobile.load(MODEL, "lru", slots=8, device="cpu", progress=False)


# --- experts on a disk ----------------------------------------------------------------------------------


def said(out: list[str]) -> dict:
    return json.loads("\n".join(out))


def test_with_a_disk_host_memory_is_divided_and_the_processor_computes(plan):
    code, out, err = plan("olmoe-1b-7b", "--host-memory", "8GiB", "--disk", "3.5GB/s")
    assert (code, err) == (0, "")
    assert out[0] == "runs: olmoe-1b-7b from a disk of 3.5 GB/s with 8.00 GiB of host memory, rows 12.88 GB"
    made = said(plan("olmoe-1b-7b", "--host-memory", "8GiB", "--disk", "3.5GB/s", "--json")[1])
    parts = (made[f"{part}_nbytes"] for part in ("resident", "reserve", "staging", "slots"))
    assert 8 * 2**30 - made["geometry"]["expert_nbytes"] < sum(parts) <= 8 * 2**30
    rows = {row["strategy"]: row["bounds"][0] for row in made["strategies"]}
    layer = 16 * 8 * 12_582_912
    assert rows["on-demand"]["link_tokens_per_s"] == pytest.approx(3.5e9 / layer)
    card, geometry = profile("auto"), made["geometry"]
    read = layer + 16 * geometry["dense_nbytes"] + geometry["head_nbytes"]
    assert rows["on-demand"]["compute_tokens_per_s"] == pytest.approx(card.cpu_gb_per_s * 1e9 / read, rel=0.1)
    assert "cpu-hybrid" not in rows
    # A projection: 519 of 1,024 experts are in slots.
    kept = made["slots"] / 1024
    assert rows["lru"]["uniform_link_tokens_per_s"] == pytest.approx(3.5e9 / layer / (1 - kept))
    assert rows["on-demand"]["uniform_link_tokens_per_s"] is None


def test_without_a_disk_a_plan_has_none_and_no_projection_of_routing(plan):
    made = said(plan("olmoe-1b-7b", "--json")[1])
    assert made["disk"] is None
    assert all(each["uniform_link_tokens_per_s"] is None for row in made["strategies"] for each in row["bounds"])
    assert "cpu-hybrid" in {row["strategy"] for row in made["strategies"]}


def test_a_rate_alone_is_of_another_machine_and_a_folder_is_looked_at(plan, tmp_path, monkeypatch):
    code, out, _ = plan("olmoe-1b-7b", "--host-memory", "8GiB", "--disk", "3.5", "--verbose")
    assert code == 0
    assert any(line.startswith("Disk: the file of all experts takes 12.88 GB; give --store FOLDER") for line in out)
    here = ("olmoe-1b-7b", "--host-memory", "8GiB", "--disk", "3.5", "--store", tmp_path / "absent")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": EXPERTS - 1}))
    code, out, _ = plan(*here)
    assert code == 1
    assert "because the experts take 12.9 GB of disk and 12.9 GB are free in" in out[0]
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": EXPERTS}))
    assert plan(*here)[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_a_disk_is_measured_as_the_doctor_measures_it(plan, tmp_path, monkeypatch):
    asked = []

    def measured(folder, row_nbytes):
        asked.append((folder, row_nbytes))
        return Disk(str(folder), row_nbytes, {1: 1.0, 2: 2.0, 4: 2.0, 8: 2.0}, 2, direct=True, problem=None)

    monkeypatch.setattr("mobile.machine.disk.disk", measured)
    store = ("--disk", "measure", "--store", tmp_path)
    code, out, _ = plan("olmoe-1b-7b", "--host-memory", "8GiB", *store, "--verbose")
    assert (code, asked) == (0, [(tmp_path, 12_582_912)])
    assert out[0].startswith("runs: olmoe-1b-7b from a disk of 2 GB/s")
    assert "disk: measured just now, GB/s by reads at once: 1.00 with 1, 2.00 with 2, 2.00 with 4, 2.00 with 8." in out
    none = Disk(str(tmp_path), 1, {}, None, None, "There is no room.")
    monkeypatch.setattr("mobile.machine.disk.disk", lambda *_: none)
    code, out, err = plan("olmoe-1b-7b", "--host-memory", "8GiB", *store)
    assert (code, err) == (2, "error: The disk cannot be measured: There is no room.\n")
    assert out == ["does not run here: olmoe-1b-7b, because: The disk cannot be measured: There is no room."]


def test_more_memory_than_is_free_does_not_run(plan):
    code, out, _ = plan("olmoe-1b-7b", "--memory", "9GiB", "--host-memory", "7GiB", "--disk", "3.5GB/s")
    assert code == 1
    assert "because the dense weights and the slots take 8.0 GiB of host memory and 7.0 GiB are free" in out[0]


def test_a_plan_of_a_disk_has_the_slots_of_a_load(plan, tmp_path, monkeypatch):
    """For the memory given, and for none: both then take the same share of what is free."""
    reserve = 2**30
    for memory in (reserve + 1_200_000, reserve + 2_000_000, reserve + 5_000_000):
        told = said(plan(MODEL, "--memory", memory, "--disk", "1GB/s", "--store", tmp_path, "--json")[1])
        model = mobile.load(MODEL, "lru", link="disk", memory=memory, store=tmp_path, device="cpu", progress=False)
        assert told["slots"] == model.mobile.slots
        assert told["disk"]["is_there"] == (memory > reserve + 1_200_000)  # which the first load made
        mobile.detach(model)
    assert 8 < told["slots"] < told["geometry"]["experts"] * 4 + 1

    class Small:
        usable_nbytes = round((reserve + 2_000_000) / 0.8)

    monkeypatch.setattr("mobile.cli.plan.host", Small)
    monkeypatch.setattr("mobile.checkpoints.loading.host", Small)
    told = said(plan(MODEL, "--disk", "1GB/s", "--json")[1])
    model = mobile.load(MODEL, "lru", link="disk", store=tmp_path, device="cpu", progress=False)
    assert told["slots"] == model.mobile.slots < 256
    mobile.detach(model)


def test_what_a_load_from_a_disk_refuses_a_plan_refuses(plan, tmp_path):
    memory = 2**30 + 700_000
    with pytest.raises(mobile.Refused) as refused:
        mobile.load(MODEL, "lru", link="disk", memory=memory, store=tmp_path, device="cpu", progress=False)
    code, _, err = plan(MODEL, "--memory", memory, "--disk", "1GB/s")
    assert (code, err) == (2, f"error: {refused.value}\n")


@pytest.mark.parametrize(
    ("rate", "gb_per_s"),
    [("3.5GB/s", 3.5), ("3.5", 3.5), ("900MB/s", 0.9), (" 2 GB/s ", 2.0), ("1GiB/s", 2**30 / 1e9), (".5TB/s", 500.0)],
)
def test_a_rate_is_read(rate, gb_per_s):
    assert parse_gb_per_s(rate) == pytest.approx(gb_per_s, rel=1e-12)


@pytest.mark.parametrize("rate", ["fast", "3.5Gb/s", "3.5GB", "-1GB/s", "0", "nan", "3,5GB/s", "", "900"])
def test_another_rate_is_refused_in_one_sentence(plan, rate):
    code, _, err = plan("olmoe-1b-7b", f"--disk={rate}")
    assert code == 2
    assert err.count("\n") == 1
    assert ("lacks its unit; write it like 900MB/s" if rate == "900" else "write it like 3.5GB/s") in err


def test_a_folder_for_rows_needs_a_disk(plan, tmp_path):
    assert "--store is a place for experts on a disk; add --disk measure" in plan("olmoe-1b-7b", "--store", tmp_path)[2]


# --- suites plan ----------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("preset", ["paper", "shapes"])
def test_a_plan_of_a_preset_that_needs_a_gpu_says_so_first_and_exits_with_0(preset, tmp_path):
    done = command("suites", "plan", "--preset", preset, "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    first, second, *_ = done.stdout.splitlines()
    assert first.startswith(f"does not run here: {preset}, because: Preset {preset} is timed on an NVIDIA GPU")
    assert second.startswith(f"{preset}: ")


def test_a_plan_of_a_preset_says_that_it_runs_and_what_it_has_to_be_allowed(monkeypatch):
    assert preflight.answer(read_preset("smoke")) == "runs: smoke"
    paper = read_preset("paper")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (16_700_000_000, 16_700_000_000))
    monkeypatch.setattr(preflight, "host", type("Host", (), {"usable_nbytes": 128 << 30}))
    monkeypatch.setattr(preflight, "cached_whole", lambda *_: True)
    monkeypatch.setattr(preflight.HfApi, "dataset_info", lambda *_, **__: None)
    assert preflight.answer(paper) == "runs: paper, with --run-generated-code"


def test_weights_are_in_the_cache_when_all_their_files_are(tmp_path, monkeypatch):
    """A configuration alone, which comes first, is not the model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    stored = tmp_path / "models--a--b"
    snapshot = stored / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (stored / "refs").mkdir()
    (stored / "refs/main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    assert not cached_whole("a/b", None)
    places = {"x": "model-1.safetensors", "y": "model-2.safetensors"}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (snapshot / "model-1.safetensors").touch()
    assert not cached_whole("a/b", None)
    (snapshot / "model-2.safetensors").touch()
    assert cached_whole("a/b", None)
    assert not cached_whole("a/b", "v2")
    (snapshot / "model.safetensors.index.json").write_text("{}")
    assert not cached_whole("a/b", None)
    (snapshot / "model.safetensors").touch()
    assert cached_whole("a/b", None)

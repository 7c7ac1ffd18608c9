"""The command `mobile`: what it prints, where, and how it refuses."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import mobile
from mobile.cli import chat, doctor, main
from mobile.cli.chat import Conversation
from mobile.costs.geometry import GEOMETRIES, Geometry
from mobile.costs.hardware import PROFILES, profile, write_profile
from mobile.machine.disk import ROWS, Disk
from mobile.machine.gpu import Gpu, LinkRates, LinkState, gpus
from mobile.machine.host import Host, Software, container_memory, host
from mobile.policies.strategy import strategies
from mobile.replay import trace
from mobile.replay.replay import ReplaySetup, time_requests

ROOT = Path(__file__).parent.parent
MODEL = str(ROOT / "suites/models/olmoe-tiny")
QUESTION = "Q: True and not ( False or True ) is\nA:"
ANSWER = " True and not True = True and False = False. So the answer is False."
FP32 = ("--dtype", "float32", "--device", "cpu")
BUDGET = ("--slots", "72", *FP32)


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)


@pytest.fixture
def cli(capsys, monkeypatch):
    """Run the command in this process."""

    def run(*argv: str, stdin: str | bytes = "") -> Ran:
        text = io.StringIO(stdin) if isinstance(stdin, str) else io.TextIOWrapper(io.BytesIO(stdin), "utf-8")
        monkeypatch.setattr("sys.stdin", text)
        capsys.readouterr()
        code = main(argv)
        return Ran(code, *capsys.readouterr())

    return run


def as_process(*argv: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mobile", *argv], cwd=ROOT, capture_output=True, text=True, timeout=60, **options
    )


# --- the command line -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("plan",), "The following arguments are required: MODEL; see mobile plan --help."),
        (("fly",), "see mobile --help"),
        (("fly",), "Unknown command 'fly'; choose one of: plan, doctor, generate"),
        (("generat", MODEL), "Unknown command 'generat'; did you mean generate? Choose one of: plan, "),
        (("generate", MODEL, "hello", "--stratgy", "lru"), "Unknown option --stratgy; did you mean --strategy"),
        (("generate", "--frobnicate", MODEL, "hello"), "Unknown option --frobnicate; a text that begins with - goes"),
        (("generate", MODEL, "-x"), "Unknown option -x; a text that begins with - goes after --"),
        (("generate", MODEL, "Once", "upon"), "'upon' is one word too many; put a text of several words in quotes"),
        (
            ("generate", MODEL, "hello", "--dtype", "bfloat"),
            "'bfloat' is unknown; did you mean bfloat16? Choose",
        ),
        (("generate", MODEL, "hello", "--slots", "x"), "invalid int value: 'x'"),
        (("generate", MODEL, "hello", "--device", "gpu"), "'gpu' is no device of the engine; choose cpu, cuda (a GPU)"),
        (("generate", MODEL, "hello", "--device", "mps"), "'mps' is no device of the engine"),
        (("generate", MODEL, "hello", "--device", "0"), "'0' is no device of the engine"),
        (("generate", MODEL, "hello", "--device", ""), "'' is no device of the engine"),
        (("generate", MODEL, "hello", "--seed", "-1"), "a seed is a whole number from 0 to 18,446,744,073,709,551,615"),
        (("generate", MODEL, "hello", "--seed", str(2**64)), "a seed is a whole number from 0 to"),
        (("generate", MODEL, "hello", "--seed", "1.5"), "a seed is a whole number from 0 to"),
        (("generate", MODEL, "hello", "--temperature", "1e-9"), "--temperature is 0 (greedy) or more, 0.0001 at least"),
        (("generate", MODEL, "hello", "--temperature", "nan"), "--temperature is 0 (greedy) or more"),
        (("generate", MODEL, "hello", "--memory", "nan"), "write it like 8GiB or"),
        (("generate", MODEL, "hello", "--memory", "0"), "write it like 8GiB or"),
        (("generate", MODEL, "hello", "--memory", "8000"), "lacks its unit; write it like 8000MiB or 8000GiB"),
        (("generate", MODEL, "hello", "--strategy", "mobil"), "Unknown strategy 'mobil'; did you mean mobile? Choose"),
        (("generate", MODEL, "hello", "--kernel", "tritn"), "Unknown kernel 'tritn'; did you mean triton? Choose"),
        (("generate", MODEL, "hello", "--link", "virtul"), "mean virtual? Choose auto, cuda, disk, virtual or paced"),
        (("generate", MODEL, "hello", "--geometry", "olmoe"), "did you mean olmoe-1b-7b? Choose one of:"),
        (("generate", MODEL, "hello \udcff"), "The prompt is no text: its character 7 is a byte that is not UTF-8"),
        (("generate", MODEL, "word " * 600), "The prompt is 1201 tokens long and"),
        (("plan", "olmoe-1b-7b", "--memory", "plenty"), "write it like 8GiB or"),
        (("plan", "olmoe-1b-7b", "--hardware", "abacus"), "Unknown hardware 'abacus'"),
        (("plan", "olmoe-1b-7b", "--dtype", "float32"), "leave --dtype out"),
        (("plan", "olmoe-1b-7b", "--fallback-rate", "2"), "between 0 and 1"),
        (("plan", "./absent"), "There is no folder ./absent"),
        (("generate", "./absent", "hello"), "There is no folder ./absent"),
        (("generate", MODEL, "hello", "--strategy", "magic"), "Unknown strategy 'magic'"),
        (("generate", MODEL, "hello", "--slots", "72", "--memory", "1GiB"), "not both"),
        (("generate", MODEL, "hello", "--slots", "7"), "give at least 8"),
        (("generate", MODEL, "hello", "--strategy", "lru", "--gamma", "0.5"), "has no gamma"),
        (("generate", MODEL, "hello", "--link", "string"), "'string' is not available"),
        (("generate", MODEL, "hello", "--top-p", "2"), "--top-p is a probability above 0"),
        (("generate", MODEL, "hello", "--temperature", "-1"), "--temperature is 0 (greedy) or more"),
        (("generate", MODEL, "hello", "--max-new-tokens", "0"), "must be at least 1"),
        (("generate", MODEL, "hello", "--chat"), "has no chat template"),
        (("generate", MODEL, "hello", "--chat", "--raw"), "not allowed with"),
        (("generate", MODEL, "", *BUDGET), "The prompt is empty"),
        (("chat", MODEL, "--chat"), "has no chat template"),
        (("trace", MODEL, "--prompts", "absent.txt", "--out", "t.npz"), "Cannot read the prompts in absent.txt"),
        (("trace", MODEL, "--prompts", "-", "--out", "t.npz"), "standard input has no prompts"),
        (("trace", MODEL, "--prompts", "-", "--out", "absent/t.npz"), "a folder that exists"),
        (("trace", "./absent", "--prompts", "-", "--out", "/proc/t.npz"), "a folder that exists"),
        (("trace", "./absent", "--prompts", "-", "--out", "x" * 256), "File name too long"),
        (("trace", "./absent", "--prompts", "-", "--out", "/dev/null", "--force"), "it is no regular file"),
        (("doctor", "--calibrate", "--out", "/proc/here.json"), "a folder that exists"),
        (("doctor", "--calibrate", "--out", "absent/here.json"), "does not exist; make it first"),
        (("serve", "./absent", "--port", "99999999"), "Cannot serve at localhost:99999999: "),
        (("serve", "./absent", "--host", "a\udcff"), "Cannot serve at a\\udcff:8000: "),
        (("replay", "absent.npz"), "Cannot read absent.npz (No such file or directory)"),
        (("replay", "absent.npz", "--plot", "t.pdf"), "ends in .svg or .png"),
        (("replay", "absent.npz", "--plot", "absent/t.svg"), "a folder that exists"),
        (("replay", "absent.npz", "--plot", "/proc/t.svg"), "a folder that exists"),
        (("replay", "absent.npz", "--sweep", "--slots", "9"), "not allowed with"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_sentence(cli, argv, says):
    ran = cli(*argv)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert says in ran.err


def test_help_is_instant_because_it_imports_no_torch():
    code = (
        "import sys, mobile.cli\n"
        "try: mobile.cli.main(['generate', '--help'])\n"
        "except SystemExit as done: assert done.code == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "examples:" in done.stdout


def test_without_a_command_the_help_is_shown_and_the_code_says_that_nothing_ran(cli):
    ran = cli()
    assert ran.code == 2
    assert ran.out == ""
    assert "mobile COMMAND --help" in ran.err


def test_output_into_a_pipe_has_no_colours_and_a_closed_pipe_no_traceback():
    done = as_process("plan", "olmoe-1b-7b", env={**os.environ, "TERM": "xterm-256color"})
    assert done.returncode == 0
    assert "expert slots" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "mobile", "plan", "olmoe-1b-7b", "--json"],
            cwd=ROOT,
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert done.stderr == ""


ORDERS = {
    "after": (MODEL, "Tara", "--raw", "--max-new-tokens", "3"),
    "before": ("--max-new-tokens", "3", "--raw", MODEL, "Tara"),
    "between": (MODEL, "--max-new-tokens", "3", "--raw", "Tara"),
    "around": ("--raw", MODEL, "--max-new-tokens", "3", "Tara"),
}


def test_options_stand_before_between_and_after_model_and_prompt(cli):
    written = {order: cli("generate", *words, *BUDGET, "--json") for order, words in ORDERS.items()}
    assert {ran.code for ran in written.values()} == {0}
    assert {(ran.json["prompt"], ran.json["new_tokens"]) for ran in written.values()} == {("Tara", 3)}
    assert len({ran.json["text"] for ran in written.values()}) == 1


@pytest.mark.parametrize("prompt", ["-5", "-5 + 3 is", "- one\n- two", "-x", "--raw", "--slots=3"])
def test_a_prompt_that_begins_with_a_hyphen_is_a_prompt(cli, prompt):
    ran = cli("generate", MODEL, *BUDGET, "--max-new-tokens", "2", "--json", "--", prompt)
    assert ran.json["prompt"] == prompt
    if prompt in ("-5", "-5 + 3 is", "- one\n- two"):
        assert cli("generate", MODEL, prompt, *BUDGET, "--max-new-tokens", "2", "--json").json["prompt"] == prompt


def test_the_version_is_said_by_the_command_and_by_the_package(cli):
    assert cli("--version").out == f"mobile {mobile.__version__}\n"


# --- output that cannot be written ------------------------------------------------------------------


def in_a_shell(command: str, **variables: str) -> subprocess.CompletedProcess:
    words = f"{shlex.quote(sys.executable)} -m mobile {command}"
    return subprocess.run(
        ["bash", "-c", words], cwd=ROOT, capture_output=True, text=True, timeout=60, env={**os.environ, **variables}
    )


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize("command", ["hardware", "hardware --json", "--help", "plan --help", "--version"])
def test_a_full_disk_under_stdout_is_one_sentence(command, buffered):
    done = in_a_shell(f"{command} > /dev/full", PYTHONUNBUFFERED=buffered)
    assert done.returncode == 2
    assert done.stderr == "error: The output cannot be written (No space left on device); send it elsewhere.\n"


def test_a_closed_stdout_is_refused_before_anything_is_done():
    done = in_a_shell("generate ./absent hello >&-")
    assert done.returncode == 2
    assert done.stderr == "error: Standard output is closed; send it to a file, or to /dev/null.\n"


def test_what_nobody_can_read_on_stderr_changes_nothing():
    for end in ("2>&-", "2>/dev/full"):
        done = in_a_shell(f"plan olmoe-1b-7b --hardware absent {end}")
        assert (done.returncode, done.stdout) == (2, "")


def test_a_reader_that_leaves_ends_the_command_without_a_word():
    done = in_a_shell("hardware | true; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stderr) == (1, "")


def test_characters_that_stdout_cannot_show_are_escaped(tmp_path):
    write_profile(replace(profile("auto"), name="Kärtchen"), tmp_path / "card.json")
    done = in_a_shell(f"plan olmoe-1b-7b --hardware {tmp_path}/card.json", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "K\\xe4rtchen" in done.stdout


def test_before_pytorch_is_imported_a_terminal_shows_what_is_going_on():
    terminal, end = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "mobile", "plan", "./absent"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=end
    )
    os.close(end)
    with os.fdopen(terminal) as screen:
        assert screen.readline() == "reading ./absent ...\n"
        process.kill()
        process.wait()


# --- what there is to choose from -------------------------------------------------------------------


def test_strategies_are_listed_with_what_they_do_and_whose_they_are(cli):
    listed = cli("strategies", "--json").json["strategies"]
    assert [one["name"] for one in listed] == list(strategies())
    assert all(set(one) == {"name", "lossless", "summary", "source", "parts"} for one in listed)
    shown = cli("strategies").out
    for one in listed:
        kind = "lossless" if one["lossless"] else "lossy"
        assert re.search(rf"^{one['name']} +{kind} +{re.escape(one['summary'])}$", shown, re.MULTILINE)
        assert one["source"] in shown


def test_hardware_is_listed_with_its_numbers_and_their_sources(cli):
    listed = cli("hardware", "--json").json
    assert [card["name"] for card in listed["hardware"]] == list(PROFILES)
    assert profile("auto").name == listed["auto"]
    shown = cli("hardware").out
    for card in PROFILES.values():
        assert f"{card.link_gb_per_s:.2f} GB/s" in shown
        assert all(source in shown for source in card.sources)


# --- plan -------------------------------------------------------------------------------------------


def bounds(plan: dict, strategy: str) -> list[dict]:
    return next(row["bounds"] for row in plan["strategies"] if row["strategy"] == strategy)


def test_a_plan_divides_the_whole_budget_and_names_every_strategy(cli):
    plan = cli("plan", "olmoe-1b-7b", "--memory", "8GiB", "--json").json
    expert = plan["geometry"]["expert_nbytes"]
    used = sum(plan[part] for part in ("resident_nbytes", "reserve_nbytes", "staging_nbytes", "slots_nbytes"))
    assert plan["fits"] is True
    assert plan["memory_nbytes"] - expert < used <= plan["memory_nbytes"]
    assert plan["slots_nbytes"] == plan["slots"] * expert
    assert plan["host_needed_nbytes"] == 1024 * expert
    assert plan["host_fits"] is (plan["host_available_nbytes"] >= plan["host_needed_nbytes"])
    assert [row["strategy"] for row in plan["strategies"]] == list(strategies())
    for row in plan["strategies"]:
        assert row["budget_meets_needs"] is (plan["slots"] >= row["needs_slots"])
    assert {row["budget_meets_needs"] for row in plan["strategies"]} == {True, False}


def test_link_bounds_are_the_arithmetic_everyone_can_redo(cli):
    plan = cli("plan", "olmoe-1b-7b", "--json").json
    (plain,) = bounds(plan, "on-demand")
    assert plain["link_tokens_per_s"] == pytest.approx(GEOMETRIES["olmoe-1b-7b"].on_demand_ceiling(25.0), rel=1e-9)
    (half,) = bounds(plan, "static-half")
    never, always = bounds(plan, "mobile")
    assert (never["fallback_rate"], always["fallback_rate"]) == (0.0, 1.0)
    assert never["link_tokens_per_s"] == half["link_tokens_per_s"] == pytest.approx(2 * plain["link_tokens_per_s"])
    assert always["link_tokens_per_s"] == pytest.approx(plain["link_tokens_per_s"])
    assert bounds(plan, "resident")[0]["link_tokens_per_s"] is None
    (some,) = bounds(cli("plan", "olmoe-1b-7b", "--fallback-rate", "0.25", "--json").json, "mobile")
    assert some["link_tokens_per_s"] == pytest.approx(2 / 1.25 * plain["link_tokens_per_s"])


def test_what_a_plan_computes_is_what_a_run_counts(cli):
    plan = cli("plan", MODEL, "--dtype", "float32", "--json").json
    for strategy in ("resident", "on-demand"):
        stats = cli("generate", MODEL, QUESTION, "--strategy", strategy, *FP32, "--json").json["stats"]
        (bound,) = bounds(plan, strategy)
        assert stats["decode_bytes"] == stats["tokens"] * bound["nbytes"]
        compute_seconds = stats["decode_seconds"] - stats["decode_stall_seconds"]
        if strategy == "resident":
            assert stats["tokens"] / compute_seconds == pytest.approx(bound["compute_tokens_per_s"], rel=1e-6)
        else:  # the host launches beside copies
            assert stats["tokens"] / compute_seconds > bound["compute_tokens_per_s"]


def test_a_plan_needs_a_configuration_and_no_weights(cli, tmp_path):
    shutil.copy(f"{MODEL}/config.json", tmp_path)
    bare, whole = (cli("plan", str(folder), "--memory", "2GiB", "--json").json for folder in (tmp_path, MODEL))
    for made, folder in ((bare, str(tmp_path)), (whole, MODEL)):
        commands = [made["recommendation"][part].pop("command") for part in ("fastest", "lossless")]
        assert all(folder in command for command in commands)
    assert {**bare, "model": "", "host_available_nbytes": 0} == {**whole, "model": "", "host_available_nbytes": 0}
    assert bare["geometry"]["experts"] == 64
    wide = cli("plan", str(tmp_path), "--memory", "2GiB", "--dtype", "float32", "--json").json
    assert wide["resident_nbytes"] == 2 * bare["resident_nbytes"]


def test_a_budget_that_is_too_small_says_so_to_people_and_to_programs(cli):
    ran = cli("plan", "olmoe-1b-7b", "--memory", "2GiB", "--json")
    assert ran.code == 2
    assert ran.json["fits"] is False
    assert "cannot hold olmoe-1b-7b" in ran.json["reason"]
    assert ran.err == f"error: {ran.json['reason']}\n"


def test_a_model_without_experts_and_an_unreachable_one_are_refused(cli, tmp_path, monkeypatch):
    LlamaConfig(num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2).save_pretrained(
        tmp_path
    )
    assert "nothing to offload" in cli("plan", str(tmp_path)).err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ran = cli("plan", "nobody/nothing")
    assert ran.code == 2
    assert "nobody/nothing" in ran.err
    assert ran.err.count("\n") == 1


def test_the_plan_for_people_states_its_assumptions(cli):
    ran = cli("plan", "olmoe-1b-7b", "--memory", "8GiB", "--verbose")
    assert ran.code == 0
    for words in (
        "Computed from sizes; nothing was run",
        "projected",
        "without any cache",
        "2 / (1 + r)",
        "assumed",
    ):
        assert words in ran.out
    never, always = (line for line in ran.out.splitlines() if line.startswith("mobile, r = "))
    assert "31.0" in never
    assert "15.5" in always


@pytest.mark.parametrize("model", [*GEOMETRIES, MODEL])
def test_the_tables_of_a_plan_fit_80_columns(cli, model):
    lines = cli("plan", model, "--verbose").out.splitlines()
    tables = lines[
        lines.index("Device memory") : next(number for number, line in enumerate(lines) if line.startswith("link:"))
    ]
    assert sum(line.startswith("mobile, r = ") for line in tables) == 2
    assert max(map(len, (line for line in tables if not line.startswith("Host memory")))) <= 80


# --- doctor -----------------------------------------------------------------------------------------


def test_the_doctor_reports_this_machine_and_leaves_unknowns_empty(cli):
    report = cli("doctor", "--json").json
    assert report["software"]["torch"] == torch.__version__
    assert report["software"]["problem"] is None
    assert report["host"]["cpus_allowed"] == len(os.sched_getaffinity(0))
    assert 0 < report["usable_nbytes"] <= report["host"]["memory_total_nbytes"]
    assert report["memcpy_gb_per_s"] > 0
    if not torch.cuda.is_available():
        assert report["rates"] is None
        assert report["rates_of"] is None
        assert any("virtual" in line or "torch" in line for line in report["advice"])


def test_the_doctor_for_people_fits_one_screen_and_ends_with_what_to_change(cli):
    ran = cli("doctor")
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert len(lines) < 45
    assert lines.index("What to change") < len(lines) - 1
    assert "measured" in ran.out


def test_the_doctor_measures_the_disk_where_rows_would_lie_and_leaves_nothing(cli, tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(
        mobile.links.disk, "rate_at", lambda ends, depth: measured.append(len(ends.slots)) or 1.0 * depth
    )
    report = cli("doctor", "--store", str(tmp_path), "--json").json
    assert report["disk"] == {
        "folder": str(tmp_path),
        "row_nbytes": 12_582_912,
        "gb_per_s": {"1": 1.0, "2": 2.0, "4": 4.0, "8": 8.0},
        "depth": 8,
        "direct": report["disk"]["direct"],
        "problem": None,
    }
    assert isinstance(report["disk"]["direct"], bool)
    assert measured == [ROWS] * 4 * mobile.links.disk.ROUNDS
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_be_measured_is_null_and_a_sentence(cli, tmp_path):
    (tmp_path / "file").write_text("")
    report = cli("doctor", "--store", str(tmp_path / "file"), "--json").json
    assert report["disk"]["depth"] is None
    assert report["disk"]["direct"] is None
    assert report["disk"]["gb_per_s"] == {}
    [line] = [line for line in report["advice"] if line.startswith("The disk was not measured: ")]
    assert "name a folder with room" in line


def test_a_doctor_is_not_sent_to_memory(cli):
    assert "Link disk reads experts from a disk" in cli("doctor", "--store", "memory").err


CARD = Gpu("Card", "GPU-1", "600.1", 16 * 2**30, 15 * 2**30, "8.9", LinkState(1, 16), LinkState(4, 16), 2505)
SOUND = doctor.Report(
    software=Software("3.11", "2.13", "13.0", "5.17.0", "3.9", "13", None),
    host=Host("cpu", 8, 128 * 2**30, 100 * 2**30, "unlimited", None, 0, 0, "unlimited"),
    memcpy_gb_per_s=10.0,
    memcpy_threads=1,
    gpus=(CARD,),
    cuda=True,
    rates=LinkRates(25.0, 6.0, LinkState(4, 16), True),
    rates_of="GPU-1",
    disk=Disk("/rows", 12_582_912, {1: 1.0, 2: 1.9, 4: 2.0, 8: 2.0}, 2, direct=True, problem=None),
)


def test_nothing_is_advised_where_nothing_is_off_even_if_the_idle_link_is_slow():
    assert doctor.advice(SOUND) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rates": LinkRates(12.0, 6.0, LinkState(4, 8), True)}, "8 of 16 lanes under load"),
        ({"rates": LinkRates(12.0, 6.0, LinkState(3, 16), True)}, "generation 3 of 4 under load"),
        ({"rates": LinkRates(25.0, 6.0, LinkState(4, 16), False)}, "whatever RLIMIT_MEMLOCK says: run on Linux itself"),
        ({"host": replace(SOUND.host, memory_available_nbytes=20 * 2**30)}, "cannot hold the experts of qwen1.5-moe"),
        ({"host": replace(SOUND.host, container_limit_nbytes=20 * 2**30)}, "raise the container's limit"),
        ({"cuda": False, "rates": None}, "torch cannot use it"),
        (
            {"cuda": False, "rates": None, "software": replace(SOUND.software, torch_cuda=None)},
            "install a CUDA build of torch",
        ),
        ({"cuda": False, "rates": None, "gpus": ()}, "time is virtual"),
        ({"software": replace(SOUND.software, problem="Transformers 4 is not supported.")}, "Transformers 4"),
        ({"software": replace(SOUND.software, pynvml=None)}, "Install nvidia-ml-py"),
        ({"disk": replace(SOUND.disk, direct=False)}, "/rows takes no direct reads, so experts there would be read"),
        ({"disk": Disk("/rows", 1, {}, None, None, "No room.")}, "The disk was not measured: No room."),
    ],
)
def test_each_thing_that_is_off_gets_one_sentence(change, says):
    (line,) = doctor.advice(replace(SOUND, **change))
    assert says in line


def test_a_link_that_nobody_can_read_is_not_called_narrow():
    unread = LinkRates(25.0, 6.0, LinkState(None, None), True)
    assert doctor.advice(replace(SOUND, rates=unread)) == []
    assert doctor.advice(replace(SOUND, rates=unread, rates_of=None)) == []


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {  # version 2: the parent's limit is the tighter one
                "proc/self/cgroup": "0::/pod/me\n",
                "sys/fs/cgroup/pod/me/memory.max": "max\n",
                "sys/fs/cgroup/pod/memory.max": "1000\n",
                "sys/fs/cgroup/pod/memory.current": "700\n",
                "sys/fs/cgroup/pod/memory.stat": "anon 500\ninactive_file 120\nactive_file 80\n",
            },
            (1000, 500),
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,memory:/me\n0::/\n",
                "sys/fs/cgroup/memory/me/memory.limit_in_bytes": "2000\n",
                "sys/fs/cgroup/memory/me/memory.usage_in_bytes": "50\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            (2000, 50),
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, ("unlimited", None)),
        ({}, (None, None)),
    ],
)
def test_a_containers_memory_limit_is_found(tmp_path, files, expected):
    assert container_memory(tree(tmp_path, files)) == expected


def test_what_is_usable_is_what_the_container_leaves(tmp_path):
    tree(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 100 kB\nMemAvailable: 80 kB\n",
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{50 * 1024}",
            "sys/fs/cgroup/memory.current": f"{20 * 1024}",
        },
    )
    here = host(tmp_path)
    assert here.usable_nbytes == 30 * 1024
    assert here.swap_total_nbytes is None
    assert host(tmp_path / "nothing").usable_nbytes is None


def test_what_a_driver_does_not_tell_is_unknown(monkeypatch):
    def silent(*_):
        raise RuntimeError("not supported")

    fake = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda _: b"Old Card",
        nvmlDeviceGetMemoryInfo=silent,
        nvmlDeviceGetUUID=lambda _: "GPU-1",
        nvmlDeviceGetCudaComputeCapability=lambda _: (8, 9),
        nvmlSystemGetDriverVersion=lambda: "600.1",
        nvmlDeviceGetCurrPcieLinkGeneration=lambda _: 1,
        nvmlDeviceGetCurrPcieLinkWidth=silent,
        nvmlDeviceGetMaxPcieLinkWidth=lambda _: 16,
        nvmlDeviceGetClockInfo=lambda _, clock: {1: 210}[clock],
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert gpus() == [
        Gpu("Old Card", "GPU-1", "600.1", None, None, "8.9", LinkState(1, None), LinkState(None, 16), 210)
    ]


def test_a_model_that_the_container_cannot_hold_is_refused_before_it_is_read(cli, monkeypatch):
    from mobile.checkpoints import loading

    small = replace(SOUND.host, container_limit_nbytes=2**30, container_used_nbytes=2**30 - 1000)
    monkeypatch.setattr(loading, "host", lambda: small)
    ran = cli("generate", MODEL, "hello", *BUDGET)
    assert ran.code == 2
    assert "raise the container's limit" in ran.err


# --- generate ---------------------------------------------------------------------------------------


def test_the_answer_is_alone_on_stdout_and_the_statistics_on_stderr(cli):
    ran = cli("generate", MODEL, QUESTION, "--geometry", "olmoe-1b-7b", *BUDGET)
    assert ran.code == 0
    assert ran.out == ANSWER + "\n"
    last = ran.err.splitlines()[-1]
    assert last.startswith("[mobile] 14 prompt + 17 decoded tokens, ")
    for words in ("tokens per virtual second", "% hits", "% fallbacks", "GB moved", "% of decode stalled"):
        assert words in last


def test_a_lossless_strategy_writes_what_the_stock_model_writes(cli):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    stock = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    inputs = tokenizer("Tara has", return_tensors="pt")
    with torch.no_grad():
        ids = stock.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    ran = cli("generate", MODEL, "Tara has", "--strategy", "lru", "--slots", "9", "--max-new-tokens", "12", *FP32)
    assert ran.out == tokenizer.decode(ids, skip_special_tokens=True) + "\n"
    assert "fallbacks" not in ran.err


def test_json_is_one_object_with_prompt_text_and_statistics(cli):
    done = cli("generate", MODEL, "--json", *BUDGET, stdin=QUESTION + "\n").json
    assert (done["prompt"], done["text"], done["new_tokens"]) == (QUESTION, ANSWER, 18)
    assert (done["strategy"], done["slots"], done["time"]) == ("mobile", 72, "virtual")
    assert done["stats"]["tokens"] == 17
    assert done["stats"]["bytes_loaded"] > 0


def test_sampling_follows_the_seed_and_greedy_ignores_it(cli):
    def text(*options: str) -> str:
        return cli("generate", MODEL, "Tara", "--max-new-tokens", "12", *options, *BUDGET).out

    hot = ("--temperature", "3")
    assert text(*hot, "--seed", "1") == text(*hot, "--seed", "1") != text(*hot, "--seed", "2")
    greedy = text("--seed", "1")
    assert greedy == text("--temperature", "0", "--seed", "2")
    assert greedy == text(*hot, "--top-p", "0.000001")


def test_a_prompt_that_is_no_utf8_is_refused_and_a_byte_order_mark_left_out(cli):
    refused = cli("generate", MODEL, "-", *BUDGET, stdin=b"Q: \xff is\n")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == ("error: Line 1 of standard input is not UTF-8 (byte 0xff); convert it, or take it out.\n")
    marked = cli("generate", MODEL, "-", "--max-new-tokens", "2", "--json", *BUDGET, stdin=b"\xef\xbb\xbfTara\r\n")
    assert marked.json["prompt"] == "Tara"


def broken(folder: Path, file: str, data: bytes | None) -> str:
    """A copy of the shipped model with other data in a file of its tokenizer, or without its tokenizer."""
    shutil.copytree(MODEL, folder)
    for path in folder.glob("tokenizer*") if data is None else ():
        path.unlink()
    if data is not None:
        (folder / file).write_bytes(data)
    return str(folder)


@pytest.mark.parametrize("data", [None, b"", b"{]", b"[]", b"{}", b"\xff\xfe"])
def test_a_tokenizer_that_is_missing_or_broken_is_named(cli, tmp_path, data):
    ran = cli("generate", broken(tmp_path / "model", "tokenizer.json", data), "hello", *BUDGET)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.count("\n") == 1
    assert "tokenizer" in ran.err
    assert "copy" in ran.err


def test_the_tokenizer_of_another_model_is_named_instead_of_an_index_that_is_out_of_range(cli, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.add_tokens(["Wolpertinger"])
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) > 1024
    ran = cli("generate", str(folder), "Wolpertinger", *BUDGET)
    assert ran.code == 2
    assert "writes token 1024, and the model knows 1024 tokens" in ran.err
    assert cli("generate", str(folder), "Tara", "--max-new-tokens", "2", *BUDGET).code == 0


# --- chat -------------------------------------------------------------------------------------------

TURNS = ["Q: not True is\nA:", "Q: True and False is\nA:", "Q: not ( True or False ) is\nA:"]
PLAIN = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
FORGETFUL = "{% for m in messages %}{{ m.content if loop.last else m.content[:12] }}\n{% endfor %}"


@pytest.fixture
def templated(tmp_path):
    """A copy of the shipped model whose tokenizer has the given chat template."""

    def make(template: object) -> str:
        folder = tmp_path / "model"
        shutil.copytree(MODEL, folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
        return str(folder)

    return make


def prompt_tokens(ran: Ran) -> list[int]:
    return [int(line.split()[1]) for line in ran.err.splitlines() if line.startswith("[")]


def answers(ran: Ran) -> list[str]:
    return ran.out.splitlines()


def test_a_conversation_is_computed_once_and_reads_as_if_it_were_computed_anew(cli, monkeypatch):
    lines = "".join(turn.replace("\n", " ") + "\n" for turn in TURNS)
    kept = cli("chat", MODEL, "--strategy", "lru", "--max-new-tokens", "20", *BUDGET, stdin=lines)
    assert kept.code == 0
    assert "no chat template" in kept.err
    assert len(answers(kept)) == 3
    monkeypatch.setattr(Conversation, "_crop_cache", lambda self, ids: self._forget_cache())
    anew = cli("chat", MODEL, "--strategy", "lru", "--max-new-tokens", "20", *BUDGET, stdin=lines)
    assert kept.out == anew.out
    assert prompt_tokens(kept)[0] == prompt_tokens(anew)[0]
    assert all(less < all_ for less, all_ in zip(prompt_tokens(kept)[1:], prompt_tokens(anew)[1:], strict=True))


@pytest.mark.parametrize("template", [PLAIN, FORGETFUL])
def test_a_template_that_renders_old_turns_anew_cuts_the_cache_back(cli, templated, monkeypatch, template):
    folder = templated(template)
    lines = "".join(turn.replace("\n", " ") + "\n" for turn in TURNS)
    options = ("--strategy", "lru", "--max-new-tokens", "20", *BUDGET)
    kept = cli("chat", folder, *options, stdin=lines)
    assert "no chat template" not in kept.err
    monkeypatch.setattr(Conversation, "_crop_cache", lambda self, ids: self._forget_cache())
    anew = cli("chat", folder, *options, stdin=lines)
    assert kept.out == anew.out
    assert sum(prompt_tokens(kept)) < sum(prompt_tokens(anew))


def test_reset_forgets_exit_ends_and_other_commands_are_named(cli):
    once = cli("chat", MODEL, *BUDGET, stdin="Q: not True is A:\n")
    twice = cli(
        "chat", MODEL, *BUDGET, stdin="Q: not True is A:\n/reset\n\n/what\nQ: not True is A:\n/exit\nnever read\n"
    )
    assert twice.code == 0
    assert twice.out == once.out * 2
    assert "Unknown command /what; there are /reset and /exit." in twice.err


def test_help_lists_every_command_with_a_line_of_its_own(cli):
    ran = cli("chat", MODEL, *BUDGET, stdin="/help\n/rest\n")
    for command in chat.COMMANDS:
        assert re.search(rf"^{command} +\w+", ran.err, re.MULTILINE)
    assert "Unknown command /rest; did you mean /reset?" in ran.err
    assert set(chat.COMMANDS) == {"/help", "/reset", "/exit"}


def test_a_chat_goes_on_after_a_line_that_is_no_text(cli):
    fine = b"Q: not True is A:\n"
    ran = cli("chat", MODEL, *BUDGET, stdin=b"\xff\n" + fine + b"Q: \xff is\n/reset\n" + fine)
    assert ran.code == 0
    assert [line[:42] for line in ran.err.splitlines() if line.startswith("error")] == [
        "error: Line 1 of standard input is not UTF",
        "error: Line 3 of standard input is not UTF",
    ]
    first, second = answers(ran)
    assert first == second


RAISES = "{% if messages[0].content != 'fine' %}{{ raise_exception('Roles must alternate') }}{% endif %}fine"
TEMPLATES = {
    "raises": (RAISES, "does not take this (Roles must alternate)"),
    "does not parse": ("{% for m in messages %}{{ m['content' }}{% endfor %}", "does not take this (unexpected '}'"),
    "has a name that is undefined": ("{{ nothing.at.all }}", "does not take this ('nothing' is undefined)"),
    "divides by zero": ("{{ 1 / 0 }}", "does not take this (division by zero)"),
    "is empty": ("", "makes no text of the prompt"),
    "writes nothing": ("{% set x = 1 %}", "makes no text of the prompt"),
    "is no text": (5, "does not take this"),
    "is one of several, none of them the default": ([{"name": "a", "template": "x"}], "does not take this"),
}


@pytest.mark.parametrize(("template", "says"), TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_that_fails_is_one_sentence_everywhere(cli, templated, tmp_path, template, says):
    folder = templated(template)
    for ran in (
        cli("generate", folder, "hello", *BUDGET),
        cli("trace", folder, "--prompts", "-", "--out", str(tmp_path / "t.npz"), *BUDGET, stdin="hello\n"),
    ):
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.count("\n") == 1
        assert f"The chat template of {folder} {says}" in ran.err
    assert cli("generate", folder, "hello", "--raw", "--max-new-tokens", "2", *BUDGET).code == 0


def test_a_chat_goes_on_after_its_template_has_raised(cli, templated):
    ran = cli("chat", templated(RAISES), "--max-new-tokens", "3", *BUDGET, stdin="hello\nfine\n")
    assert ran.code == 0
    assert ran.err.count("Roles must alternate") == 1
    assert len(answers(ran)) == 1


def test_named_templates_with_a_default_are_used(cli, templated):
    named = [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": "x"}]
    assert cli("generate", templated(named), "Tara", "--chat", "--max-new-tokens", "2", *BUDGET).code == 0


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(cli, monkeypatch):
    printing, pieces = transformers.TextStreamer.on_finalized_text, []

    def interrupted(self, text, stream_end=False):
        printing(self, text, stream_end)
        pieces.append(text)
        if len(pieces) == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(transformers.TextStreamer, "on_finalized_text", interrupted)
    ran = cli("chat", MODEL, *BUDGET, stdin="Q: not ( True and False ) is A:\n/reset\nQ: not True is A:\n")
    assert ran.code == 0
    assert "(stopped)" in ran.err
    first, second = answers(ran)
    monkeypatch.undo()
    whole = answers(cli("chat", MODEL, *BUDGET, stdin="Q: not ( True and False ) is A:\n"))[0]
    assert whole.startswith(first.rstrip())
    assert len(first) < len(whole)
    assert second == answers(cli("chat", MODEL, *BUDGET, stdin="Q: not True is A:\n"))[0]


def test_after_ctrl_c_between_two_layers_the_next_turn_is_what_a_new_computation_gives(cli, monkeypatch):
    from mobile.runtime.engine import Engine

    running, answering, turns, calls = Engine.run_experts, Conversation.answer, [], []

    def counted(self, prompt):
        turns.append(prompt)
        answering(self, prompt)

    def interrupted(self, layer, *arguments):
        if len(turns) == 2:
            calls.append(layer)
            if len(calls) == 22:  # layers 0 and 1 of the sixth pass have written to the cache, 2 and 3 have not
                raise KeyboardInterrupt
        return running(self, layer, *arguments)

    monkeypatch.setattr(Conversation, "answer", counted)
    monkeypatch.setattr(Engine, "run_experts", interrupted)
    options = ("--strategy", "lru", "--max-new-tokens", "20", *BUDGET)
    lines = "Q: not True is A:\nQ: not ( True and False ) is A:\nQ: not False is A:\n"
    kept = cli("chat", MODEL, *options, stdin=lines)
    assert kept.code == 0
    assert "(stopped)" in kept.err
    assert len(turns) == 3
    turns.clear()
    calls.clear()
    monkeypatch.setattr(Conversation, "_crop_cache", lambda self, ids: self._forget_cache())
    assert kept.out == cli("chat", MODEL, *options, stdin=lines).out


def test_ctrl_c_ends_generate_with_its_own_code_and_no_traceback(cli, monkeypatch):
    def interrupted(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.TextStreamer, "on_finalized_text", interrupted)
    ran = cli("generate", MODEL, "Tara", *BUDGET)
    assert ran.code == 130
    assert ran.err.endswith("interrupted\n")


# --- trace ------------------------------------------------------------------------------------------


def test_a_trace_reads_back_and_replays_to_the_counters_of_the_run(cli, tmp_path):
    out, prompts = tmp_path / "trace.npz", tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": turn, "answer": "?"}) + "\n" for turn in TURNS))
    ran = cli("trace", MODEL, "--prompts", str(prompts), "--out", str(out), "--json", *BUDGET)
    requests, about = trace.load(out)
    assert ran.json["requests"] == len(requests) == len(about["prompt_sha256"]) == 3
    assert ran.json["steps"] == sum(map(len, requests))
    assert ran.json["nbytes"] == out.stat().st_size
    geometry = Geometry.from_record(about["geometry"])
    own = tuple((layer,) for layer in range(geometry.moe_layers))
    on = ReplaySetup(strategies()[about["strategy"]], geometry, own, profile("auto"), 72)
    _, replayed = time_requests(on, requests)
    assert replayed.stats() == ran.json["stats"]
    assert ran.json["stats"]["tokens"] > 20


def test_a_trace_is_not_overwritten_unless_forced(cli, tmp_path):
    out = tmp_path / "trace.npz"
    out.write_text("precious")
    arguments = (
        "trace",
        MODEL,
        "--prompts",
        "-",
        "--out",
        str(out),
        "--strategy",
        "lru",
        "--max-new-tokens",
        "3",
        *BUDGET,
    )
    ran = cli(*arguments, stdin="Tara has\n\nPia has\n")
    assert ran.code == 2
    assert "add --force" in ran.err
    assert out.read_text() == "precious"
    ran = cli(*arguments, "--force", stdin="Tara has\n\nPia has\n")
    assert ran.code == 0
    assert ran.out.startswith(f"{out}: 2 requests, 6 forward passes, ")
    assert len(trace.load(out)[0]) == 2
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("second", ["plain words", '{"question": "?"}', '{"prompt": 3}', "[]"])
def test_a_line_that_is_no_prompt_is_named(cli, tmp_path, second):
    lines = f'{{"prompt": "fine"}}\n{second}\n'
    ran = cli("trace", MODEL, "--prompts", "-", "--out", str(tmp_path / "t.npz"), stdin=lines)
    assert ran.code == 2
    assert "ine 2 of standard input" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_prompts_are_all_read_before_the_first_is_run(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("mobile.cli.terminal.session.load_model", lambda *_: pytest.fail("the model was loaded"))
    lines = '{"prompt": "fine"}\n{"prompt": ""}\n'
    ran = cli("trace", MODEL, "--prompts", "-", "--out", str(tmp_path / "t.npz"), stdin=lines)
    assert ran.err == "error: Prompt 2 of 2 cannot be traced: The prompt is empty; give it some text.\n"
    ran = cli("trace", MODEL, "--prompts", "-", "--out", str(tmp_path / "t.npz"), stdin='{"prompt": "\\ud800"}\n')
    assert 'The "prompt" in line 1 of standard input is no text' in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_trace_goes_through_a_link_and_never_takes_the_place_of_a_pipe(cli, tmp_path):
    (tmp_path / "link.npz").symlink_to("real.npz")
    os.mkfifo(tmp_path / "pipe")
    arguments = ("trace", MODEL, "--prompts", "-", "--max-new-tokens", "2", "--force", *BUDGET)
    assert cli(*arguments, "--out", str(tmp_path / "link.npz"), stdin="Tara has\n").code == 0
    assert (tmp_path / "link.npz").is_symlink()
    assert len(trace.load(tmp_path / "real.npz")[0]) == 1
    refused = cli(*arguments, "--out", str(tmp_path / "pipe"), stdin="Tara has\n")
    assert "it is no regular file" in refused.err
    assert (tmp_path / "pipe").is_fifo()


# --- replay -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A trace of two prompts under a strategy, recorded once."""
    folder, prompts = tmp_path_factory.mktemp("traces"), "Q: not True is\nQ: True and False is\n"

    def record(strategy: str) -> str:
        path = folder / f"{strategy}.npz"
        if not path.exists():
            (folder / "prompts.txt").write_text(prompts)
            arguments = ("--prompts", str(folder / "prompts.txt"), "--out", str(path), "--strategy", strategy)
            assert main(["trace", MODEL, *arguments, "--max-new-tokens", "24", *BUDGET]) == 0
        return str(path)

    return record


def by_strategy(ran: Ran) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for result in ran.json["results"]:
        found.setdefault(result["strategy"], []).append(result)
    return found


def test_a_replay_says_what_the_live_run_of_each_strategy_says(cli, recorded):
    """Same prompts, so the same tokens: what is projected of a strategy from another's trace is what it then does."""
    path = recorded("lru")
    ran = cli("replay", path, "--strategy", "lru", "--strategy", "next-gate", "--slots", "40", "--json")
    for name, (projected,) in by_strategy(ran).items():
        live = cli(
            "trace",
            MODEL,
            "--prompts",
            str(Path(path).parent / "prompts.txt"),
            "--out",
            f"{path}.{name}.npz",
            "--strategy",
            name,
            "--max-new-tokens",
            "24",
            "--slots",
            "40",
            "--json",
            *FP32,
        ).json["stats"]
        assert projected["hit_rate"] == live["hit_rate"]
        assert projected["tokens_per_s"] == pytest.approx(live["tokens"] / live["decode_seconds"], rel=1e-12)
        assert projected["stall_share"] == pytest.approx(live["decode_stall_seconds"] / live["decode_seconds"])
        assert projected["gb_per_token"] == pytest.approx(live["decode_bytes"] / live["tokens"] / 1e9)


def test_a_trace_of_choices_by_the_cache_is_replayed_as_it_was_lived_or_not_at_all(cli, recorded):
    trace_file = recorded("cache-prior")
    ran = cli("replay", trace_file, "--json")
    assert [(one["strategy"], one["slots"]) for one in ran.json["results"]] == [("cache-prior", 72)]
    assert set(ran.json["left_out"]) == set(strategies()) - {"cache-prior"}
    assert "cache-prior" in cli("replay", recorded("lru"), "--json").json["left_out"]
    for options, said in (
        (("--slots", "80"), "with those and its own geometry alone"),
        (("--memory", "1GiB"), "with those and its own geometry alone"),
        (("--geometry", "olmoe-1b-7b"), "with those and its own geometry alone"),
        (("--sweep",), "with those and its own geometry alone"),
        (("--hardware", "rtx4080-pcie4-shared-memory"), "other experts may be in them"),
        (("--strategy", "lru"), "right for that strategy alone"),
    ):
        refused = cli("replay", trace_file, *options)
        assert refused.code == 2
        assert said in refused.err
    assert cli("replay", trace_file, "--slots", "72", "--json").json["results"] == ran.json["results"]


def test_without_a_choice_all_strategies_run_that_route_as_the_trace_does(cli, recorded):
    ran = cli("replay", recorded("lru"), "--geometry", "olmoe-1b-7b", "--json")
    found = by_strategy(ran)
    assert set(found) == {name for name, one in strategies().items() if one.routes_as_full_k}
    assert set(found) | set(ran.json["left_out"]) == set(strategies())
    assert ran.json["projected"] is True
    assert (ran.json["recorded_by"], ran.json["geometry"]["name"]) == ("lru", "olmoe-1b-7b")
    smallest, largest = found["lru"]
    assert smallest["slots"] == 16 * 8 < largest["slots"]
    assert smallest["memory_nbytes"] < largest["memory_nbytes"] <= 16 * 2**30
    assert smallest["hit_rate"] < largest["hit_rate"] < 1
    (resident,) = found["resident"]
    assert (resident["hit_rate"], resident["gb_per_token"], resident["stall_share"]) == (1, 0, 0)
    assert found["on-demand"][0]["hit_rate"] == 0
    assert found["lru"][0]["prefetch_recall"] is None
    assert 0 < found["next-gate"][0]["prefetch_recall"] <= 1
    assert 0 < found["next-gate"][0]["prefetch_precision"] <= 1
    assert all(result["wasted_prefetch_gb"] >= 0 for results in found.values() for result in results)


def test_a_two_pass_trace_replays_under_mobile_alone(cli, recorded):
    path = recorded("mobile")
    ran = cli("replay", path, "--json")
    assert set(by_strategy(ran)) == {"mobile"}
    assert by_strategy(ran)["mobile"][0]["fallback_rate"] > 0
    assert cli("replay", path, "--gamma", "0.7", "--json").json["results"] == ran.json["results"]
    for options, says in (
        (("--strategy", "lru"), "other experts than mobile did, so its tokens would differ"),
        (("--gamma", "1.5"), "at gamma 1.5 it would decide"),
    ):
        refused = cli("replay", path, *options)
        assert refused.code == 2
        assert says in refused.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--strategy", "mobile"), "its tokens would differ; record one under it."),
        (("--strategy", "magic"), "Unknown strategy 'magic'"),
        (("--gamma", "0.5"), "leave --gamma out"),
        (("--slots", "7"), "give at least 8"),
        (("--memory", "1MiB"), "cannot hold"),
        (("--geometry", "qwen3-30b-a3b"), "cannot stand for it"),
        (("--hardware", "abacus"), "Unknown hardware"),
    ],
)
def test_what_a_trace_cannot_answer_is_refused(cli, recorded, options, says):
    ran = cli("replay", recorded("lru"), *options)
    assert (ran.code, ran.out) == (2, "")
    assert says in ran.err


def test_a_trace_that_does_not_say_what_it_is_of_is_refused(cli, recorded, tmp_path):
    requests, about = trace.load(Path(recorded("lru")))
    for changed, says in (
        ({}, "does not say which model and strategy"),
        ({**about, "gamma": "high"}, "does not say which model and strategy"),
        ({**about, "geometry": {**about["geometry"], "expert_nbytes": -1}}, "does not say which model and strategy"),
        ({**about, "strategy": "magic"}, "recorded under 'magic', which is not installed"),
    ):
        trace.save(tmp_path / "t.npz", requests, 4, changed)
        assert says in cli("replay", str(tmp_path / "t.npz")).err
    trace.save(tmp_path / "t.npz", [request[:1] for request in requests], 4, about)
    assert "holds no decoded token" in cli("replay", str(tmp_path / "t.npz")).err
    bare = [[replace(step, ahead=None) for step in request] for request in requests]
    trace.save(tmp_path / "t.npz", bare, 4, about)
    assert "lacks the router logits" in cli("replay", str(tmp_path / "t.npz"), "--strategy", "next-gate").err


def test_a_sweep_is_drawn_with_a_label_at_each_curve(cli, recorded, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = tmp_path / "hit.svg"
    ran = cli("replay", recorded("lru"), "--sweep", "--plot", str(drawn), "--json")
    rates = [result["hit_rate"] for result in by_strategy(ran)["lru"]]
    assert rates == sorted(rates)
    assert len(rates) == 9
    first = drawn.read_text()
    assert all(f">{name}<" in first for name in by_strategy(ran))
    cli("replay", recorded("lru"), "--sweep", "--plot", str(drawn))
    assert drawn.read_text() == first


def test_without_matplotlib_a_plot_is_refused_before_anything_is_replayed(cli, monkeypatch):
    monkeypatch.setattr("mobile.cli.curves.find_spec", lambda name: None)
    ran = cli("replay", "absent.npz", "--plot", "hit.svg")
    assert ran.code == 2
    assert "--plot needs matplotlib" in ran.err


def test_the_table_of_a_replay_names_what_is_left_out_on_stderr(cli, recorded):
    ran = cli("replay", recorded("lru"), "--slots", "32", "64", "--slots", "128")
    assert ran.code == 0
    assert ran.out.count("\nlru ") == 3
    assert "Without a cache 25 GB/s carry" in ran.out
    assert ran.err.startswith("Left out: ")
    assert " mobile, " in ran.err
    assert "speculating-experts-verify (the router logits that lru recorded are of another foresight)" in ran.err


# --- as a process -----------------------------------------------------------------------------------


def test_as_a_process_it_answers_through_pipes_and_survives_ctrl_c_at_the_prompt():
    process = subprocess.Popen(
        [sys.executable, "-m", "mobile", "chat", MODEL, *BUDGET],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert "no chat template" in process.stderr.readline()  # it is loaded, and about to read
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n"
    assert "/exit" in process.stderr.readline()
    out, err = process.communicate("Q: not True is A:\n", timeout=60)
    assert process.returncode == 0
    assert out.count("\n") == 1
    assert out.strip()
    assert err.startswith("[mobile] ")
    assert "\x1b" not in out + err

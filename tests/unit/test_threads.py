"""The command line runs narrow models on one thread, unless the number was chosen; the library leaves it alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import OlmoeConfig

from mobile.cli import main
from mobile.cli.terminal import session

ROOT = Path(__file__).parent.parent.parent
MODEL = "suites/models/olmoe-tiny"


@pytest.fixture
def two_threads(monkeypatch):
    for name in session.THREADS:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("width", "threads"), [(96, 1), (session.WIDE - 1, 1), (session.WIDE, 2), (2048, 2)])
def test_a_narrow_model_gets_one_thread_and_a_wide_one_all(two_threads, width, threads):
    session._choose_threads(OlmoeConfig(hidden_size=width))
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 1)])
def test_a_model_that_is_read_from_a_disk_leaves_a_core_to_the_reads(two_threads, before, after):
    torch.set_num_threads(before)
    session._choose_threads(OlmoeConfig(hidden_size=2048), reads=True)
    assert torch.get_num_threads() == after


def test_a_model_of_unknown_width_is_left_alone(two_threads):
    session._choose_threads(SimpleNamespace(get_text_config=lambda: SimpleNamespace()))
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("name", session.THREADS)
def test_a_number_that_the_user_chose_stays(two_threads, monkeypatch, name):
    monkeypatch.setenv(name, "2")
    session._choose_threads(OlmoeConfig(hidden_size=96))
    assert torch.get_num_threads() == 2


def test_a_program_that_has_torch_and_calls_the_command_keeps_its_threads(two_threads, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["generate", MODEL, "Tara", "--max-new-tokens", "2", "--slots", "72", "--device", "cpu"]) == 0
    assert torch.get_num_threads() == 2


def test_the_command_itself_runs_a_shipped_model_on_one_thread():
    code = (
        "import mobile.cli, sys\n"
        f"code = mobile.cli.main(['generate', '{MODEL}', 'Tara', '--max-new-tokens', '2', '--slots', '72'])\n"
        "import torch; print(code, torch.get_num_threads())"
    )
    chosen = {name: value for name, value in os.environ.items() if name not in session.THREADS}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=chosen, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 1"

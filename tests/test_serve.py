"""`mobile serve`: a real process, asked over HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mobile.cli import main
from mobile.cli.serve import NEEDS

ROOT = Path(__file__).parent.parent
MODEL = "suites/models/olmoe-tiny"
OPTIONS = ("--slots", "72", "--dtype", "float32", "--device", "cpu")
PROMPT = {"prompt": "Q: True and not ( False or True ) is\nA:", "temperature": 0, "max_tokens": 20}

served = pytest.mark.skipif(not all(map(find_spec, NEEDS)), reason="needs the extra `serve`")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Its address; the process has no Hugging Face cache."""
    environment = {**os.environ, "HF_HOME": str(tmp_path_factory.mktemp("empty") / "absent")}
    process = subprocess.Popen(
        [sys.executable, "-m", "mobile", "serve", MODEL, "--port", "0", *OPTIONS],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = next((line for line in process.stderr if "is served at" in line), "it ended")
    found = re.search(r"http://\S+:\d+", said)
    assert found is not None, said
    yield found[0]
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in rest


def ask(url: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@served
def test_a_completion_whole_or_streamed_is_what_generate_writes(server, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["generate", MODEL, PROMPT["prompt"], "--max-new-tokens", "20", *OPTIONS]) == 0
    text = capsys.readouterr().out.removesuffix("\n")
    code, whole = ask(f"{server}/v1/completions", {**PROMPT, "model": MODEL})
    assert code == 200
    assert json.loads(whole)["model"] == MODEL
    assert json.loads(whole)["choices"][0]["text"] == text
    code, stream = ask(f"{server}/v1/completions", {**PROMPT, "stream": True})
    *events, last = [line.removeprefix("data: ") for line in stream.splitlines() if line]
    chunks = [json.loads(event) for event in events]
    assert code == 200
    assert last == "[DONE]"
    assert len(chunks) > 2
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text


@served
def test_there_is_one_model_and_no_way_to_drop_it_or_load_another(server):
    _, listed = ask(f"{server}/v1/models")
    assert [entry["id"] for entry in json.loads(listed)["data"]] == [MODEL]
    code, refusal = ask(f"{server}/v1/completions", {**PROMPT, "model": "allenai/OLMoE-1B-7B-0924"})
    assert code == 400
    assert MODEL in refusal
    for route in ("reset", "load_model"):
        assert ask(f"{server}/{route}", {"model": "allenai/OLMoE-1B-7B-0924"})[0] == 404
    before = json.loads(ask(f"{server}/stats")[1])["tokens"]
    assert ask(f"{server}/v1/completions", PROMPT)[0] == 200
    assert json.loads(ask(f"{server}/stats")[1])["tokens"] > before


@served
def test_a_chat_without_a_template_is_the_clients_error(server):
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    code, refusal = ask(f"{server}/v1/chat/completions", chat)
    assert code == 400
    assert "use /v1/completions" in refusal
    assert ask(f"{server}/health") == (200, '{"status":"ok"}')


@served
def test_an_address_that_is_taken_is_refused_before_the_model_is_loaded(capsys):
    with socket.create_server(("localhost", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "./absent", "--port", str(port)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: Cannot serve at localhost:{port}: Address already in use")
    assert said.count("\n") == 1


def test_missing_packages_are_named(capsys, monkeypatch):
    monkeypatch.setattr("mobile.cli.serve.find_spec", lambda name: None)
    assert main(["serve", MODEL]) == 2
    assert f"pip install {' '.join(NEEDS)}" in capsys.readouterr().err

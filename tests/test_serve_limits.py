"""Limits of the server: which fields, hosts and pages it serves, how long and how many requests may be."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

import mobile
from mobile.cli import main
from mobile.cli.serve import NEEDS, SECONDS_TO_FINISH, application

pytestmark = pytest.mark.skipif(
    not all(map(find_spec, (*NEEDS, "httpx"))), reason="needs the extra `serve` and what its clients use"
)
MODEL = Path(__file__).parent.parent / "suites/models/olmoe-tiny"
POSITIONS = 64
COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
PROMPT: dict[str, Any] = {"prompt": "Q: not True is\nA:", "max_tokens": 4, "temperature": 0}
PART = {"type": "text", "text": "a"}
USER = [{"role": "user", "content": "Q: not True is\nA:"}]
TALK: dict[str, Any] = {"messages": USER, "max_tokens": 4, "temperature": 0}
TOLD: dict[str, Any] = {"input": USER, "max_output_tokens": 4, "temperature": 0, "stream": False}
LONG: dict[str, Any] = {
    "prompt": "Tara has",
    "temperature": 0,
    "max_tokens": 60,
    "generation_config": '{"min_new_tokens": 60}',
}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def model():
    loaded = mobile.load(MODEL, "mobile", slots=72, dtype=torch.float32, device="cpu", progress=False)
    loaded.config.max_position_embeddings = POSITIONS
    yield loaded
    mobile.detach(loaded)


@pytest.fixture(scope="module")
def served(model):
    """Return the model's server for the hosts given."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return lambda hosts: application("tiny", model, tokenizer, hosts)


@pytest.fixture(scope="module")
def app(served):
    return served(None)


@pytest.fixture
def guarded(served):
    """Return the model's server at localhost, with these hosts allowed."""
    from mobile.cli.serving.admission import hosts

    return lambda *allowed: served(hosts("localhost", allowed))


def run(app: Any, ask: Callable[[Any], Awaitable[Any]]) -> Any:
    """Return what `ask` returns, given a client of the application."""
    import httpx

    async def asked() -> Any:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            return await ask(client)

    return asyncio.run(asked())


def post(app: Any, path: str, body: Any, **headers: str) -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return run(app, lambda client: client.post(path, content=content, headers=JSON | headers))


def text(answer: Any) -> str:
    assert answer.status_code == 200, answer.text
    written = answer.json()
    if "output" in written:
        return str(written["output"][0]["content"][0]["text"])
    choice = written["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


# --- fields -----------------------------------------------------------------------------------------

WRONG = [
    (COMPLETIONS, {**PROMPT, "n": 2}, "n: this is not supported; give 1 or leave it out"),
    (COMPLETIONS, {**PROMPT, "best_of": 3}, "best_of: this is not supported"),
    (COMPLETIONS, {**PROMPT, "echo": True}, "echo: this is not supported"),
    (COMPLETIONS, {**PROMPT, "logprobs": 0}, "logprobs: this is not supported"),
    (COMPLETIONS, {**PROMPT, "logit_bias": {"5": 1}}, "logit_bias: this is not supported"),
    (COMPLETIONS, {**PROMPT, "num_beams": 2}, "num_beams: extra inputs are not permitted"),
    (COMPLETIONS, {**PROMPT, "a\nb" * 99: 2}, "extra inputs are not permitted"),
    (COMPLETIONS, {**PROMPT, "stop": ["x"] * 17}, "stop: must have at most 16 texts"),
    (COMPLETIONS, {**PROMPT, "stop": "x" * 257}, "stop: must have at most 16 texts, of 256 characters"),
    (COMPLETIONS, {**PROMPT, "temperature": 10**400}, "temperature: input should be a valid number"),
    (COMPLETIONS, {**PROMPT, "model": "other"}, "This server has one model, tiny;"),
    (COMPLETIONS, {**PROMPT, "prompt": "x " * 20_000}, "The prompt is 40000 characters long, and the 64 tokens"),
    (COMPLETIONS, b'{"prompt": "a", "prompt": "b"}', "it names a field twice"),
    (COMPLETIONS, b'{"user": ' + b"[" * 65 + b"]" * 65 + b"}", "it is nested deeper than 64 levels"),
    (COMPLETIONS, b'{"seed": ' + b"1" * 5000 + b"}", "error parsing the body"),
    (CHAT, {**TALK, "messages": USER * 4097}, "messages: list should have at most 4096 items"),
    (CHAT, {**TALK, "messages": USER * 2000}, "The prompt is 34000 characters long, and the 64 tokens"),
    (CHAT, {**TALK, "messages": [{**USER[0], "audio": {}}]}, "messages.0.audio: input should be None"),
    (CHAT, {**TALK, "messages": [{**USER[0], "weight": 1}]}, "messages.0.weight: extra inputs"),
    (
        CHAT,
        {**TALK, "messages": [{"role": "user", "content": [{"type": "text", "text": "a", "b": 1}]}]},
        "other fields",
    ),
    (CHAT, {**TALK, "messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 4097}]}, "4096 parts"),
    (CHAT, {**TALK, "tools": [{}] * 129}, "tools: list should have at most 128 items"),
    (CHAT, {**TALK, "tool_choice": "required"}, "tool_choice: this is not supported"),
    (CHAT, {**TALK, "response_format": {"type": "json_object"}}, "response_format: this is not supported"),
    (CHAT, {**TALK, "logit_bias": {"0" * 5000: 1}}, "logit_bias: must name tokens by their ids"),
    (CHAT, {**TALK, "logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias: must have at most 1024"),
    (CHAT, {**TALK, "chat_template_kwargs": {f"v{i}": 1 for i in range(65)}}, "at most 64 variables"),
    (CHAT, {**TALK, "max_completion_tokens": 5}, "max_completion_tokens is given twice"),
    (RESPONSES, {**TOLD, "previous_response_id": "resp_1"}, "previous_response_id: this is not supported"),
    (RESPONSES, {**TOLD, "text": {"format": {"type": "json_object"}}}, "text: this is not supported"),
    (RESPONSES, {**TOLD, "input": [{**USER[0], "type": "reasoning"}]}, "type: input should be 'message'"),
    (RESPONSES, {**TOLD, "input": [*USER, {"type": ["message"]}]}, "items of the types message, "),
    (RESPONSES, {**TOLD, "input": [*USER, {"type": "reasoning", "content": [{}]}]}, "content.0.text: field required"),
]


@pytest.mark.parametrize(("path", "body", "says"), WRONG)
def test_a_field_that_the_server_does_not_have_or_that_is_too_long_is_refused(app, path, body, says):
    answer = post(app, path, body)
    said = answer.json()["detail"]
    assert answer.status_code == 400
    assert says in said
    assert "\n" not in said
    assert len(said) < 400


CONFIG = [
    ("num_beams", 10**6, "extra inputs"),
    ("num_return_sequences", 10**6, "extra inputs"),
    ("cache_implementation", "static", "extra inputs"),
    ("use_cache", False, "extra inputs"),
    ("top_k", 1025, "top_k: must be at most 1024, the number of tokens"),
    ("no_repeat_ngram_size", POSITIONS + 1, "no_repeat_ngram_size: must be at most 64, the longest text"),
    ("min_new_tokens", POSITIONS + 1, "min_new_tokens: must be at most 64"),
    ("min_new_tokens", 5, "min_new_tokens is more than max_tokens"),
    ("max_new_tokens", 5, "max_tokens is given twice"),
    ("temperature", 0.5, "temperature is given twice"),
    ("repetition_penalty", 1e-45, "repetition_penalty: input should be greater than or equal to 0.01"),
    ("repetition_penalty", 1e30, "repetition_penalty: input should be less than or equal to 100"),
    ("repetition_penalty", 1.5, "frequency_penalty and repetition_penalty are one"),
]


@pytest.mark.parametrize(("field", "value", "says"), CONFIG)
def test_a_generation_config_has_bounds_and_contradicts_no_other_field(app, field, value, says):
    asked = {**PROMPT, "frequency_penalty": 0.5, "generation_config": json.dumps({field: value})}
    answer = post(app, COMPLETIONS, asked)
    assert answer.status_code == 400
    assert says in answer.json()["detail"]


@pytest.mark.parametrize(
    ("path", "body", "harmless"),
    [
        (COMPLETIONS, PROMPT, {"n": 1, "best_of": 1, "echo": False, "logprobs": None, "logit_bias": {}, "user": "x"}),
        (COMPLETIONS, PROMPT, {"generation_config": '{"max_new_tokens": 4, "temperature": 0}', "presence_penalty": 0}),
        (
            CHAT,
            TALK,
            {
                "max_completion_tokens": 4,
                "metadata": {"a": "b"},
                "store": True,
                "tool_choice": "auto",
                "response_format": {"type": "text"},
                "logprobs": False,
                "stream_options": {"include_usage": True},
                "service_tier": "auto",
                "messages": [{**USER[0], "name": "Tara", "refusal": None, "annotations": [], "audio": None}],
            },
        ),
        (
            RESPONSES,
            TOLD,
            {
                "parallel_tool_calls": None,
                "truncation": "disabled",
                "include": [],
                "store": False,
                "tools": [],
                "input": [{**USER[0], "type": "message", "id": "msg_1", "status": "completed"}],
            },
        ),
    ],
)
def test_fields_that_ask_for_nothing_change_no_answer(app, path, body, harmless):
    assert text(post(app, path, {**body, **harmless})) == text(post(app, path, body))


def test_openais_own_client_is_answered_with_what_it_sends_unasked(app):
    import httpx
    import openai

    async def ask() -> list[str]:
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app=app))
        async with openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="x", http_client=http) as client:
            written = await client.completions.create(model="tiny", **PROMPT)
            said = await client.chat.completions.create(model="tiny", **TALK)
            kept = [*USER, said.choices[0].message.model_dump(exclude={"tool_calls"}), *USER]
            again = await client.chat.completions.create(model="tiny", **{**TALK, "messages": kept})
            told = await client.responses.create(model="tiny", **{**TOLD, "stream": False})
            turns = [*USER, *(item.model_dump() for item in told.output), *USER]
            more = await client.responses.create(model="tiny", **{**TOLD, "input": turns})
            stream = await client.completions.create(model="tiny", **{**PROMPT, "stream": True})
            streamed = "".join([chunk.choices[0].text async for chunk in stream])
            with pytest.raises(openai.BadRequestError) as refused:
                await client.completions.create(model="tiny", **PROMPT, n=2)
        assert "n: this is not supported" in refused.value.body["detail"]
        assert again.choices[0].message.content == more.output_text
        return [written.choices[0].text, said.choices[0].message.content, told.output_text, streamed]

    assert asyncio.run(ask()) == [text(post(app, COMPLETIONS, PROMPT))] * 4


def test_the_newer_name_of_the_limit_is_a_limit(app):
    answer = post(app, CHAT, {"messages": USER, "max_completion_tokens": 2, "temperature": 0})
    assert answer.json()["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("limit", [{"max_tokens": 10**30}, {"max_tokens": 64}, {"max_new_tokens": 1000}])
def test_an_answer_ends_where_the_positions_of_the_model_do(app, limit):
    config = json.dumps({"min_new_tokens": 62} | {name: limit[name] for name in limit if name == "max_new_tokens"})
    asked = {"prompt": "Tara has", "temperature": 0, "generation_config": config}
    outer = {name: limit[name] for name in limit if name == "max_tokens"}
    usage = post(app, COMPLETIONS, {**asked, **outer}).json()["usage"]
    assert usage["total_tokens"] == POSITIONS + 1  # the last one is read by nobody


@pytest.mark.parametrize(
    "written", ["not json", '{"name": "f"}', "[1]", "5", "null", '{"name": 5, "arguments": {}}', '{"name": "f", "argu']
)
def test_a_tool_call_that_the_model_writes_wrong_is_its_text(written):
    from transformers.cli.serving.utils import parse_assistant_message

    from mobile.cli.serve import _CheckedTokenizer
    from mobile.cli.terminal.reader import Reader

    folder = MODEL.parent / "qwen3-moe-tiny"
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    ids = tokenizer(f"<tool_call>{written}</tool_call>", return_tensors="pt")["input_ids"]
    checked = _CheckedTokenizer(Reader("tiny", tokenizer, True, config))
    prompt = tokenizer("Q: ", return_tensors="pt")["input_ids"]
    model = SimpleNamespace(config=config)
    content, reasoning, calls = parse_assistant_message(checked, model, ids[0], prompt)
    assert (content, reasoning, calls) == (tokenizer.decode(ids[0], skip_special_tokens=True), None, None)
    right = tokenizer('<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', return_tensors="pt")["input_ids"]
    parsed = parse_assistant_message(checked, model, right[0], prompt)[2]
    assert [(call.name, call.arguments) for call in parsed] == [("f", '{"a": 1}')]


# --- hosts, pages, sizes, numbers -------------------------------------------------------------------

OWN = ["localhost", "LocalHost:8000", "127.0.0.1", "[::1]:8000"]
FOREIGN = ["", "evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "localhost:x", "a@localhost", "[::1", "*"]


@pytest.mark.parametrize(
    ("bound", "allowed", "served", "refused"),
    [
        ("localhost", [], OWN, [*FOREIGN, "10.0.0.1", "0.0.0.0"]),
        ("10.0.0.1", [], [*OWN, "10.0.0.1:80"], [*FOREIGN, "10.0.0.2"]),
        ("fd00::1", [], [*OWN, "[fd00::1]:80"], [*FOREIGN, "[fd00::2]"]),
        ("0.0.0.0", [], [*OWN, "10.0.0.1", "[fd00::1]"], FOREIGN),
        ("::", ["Model.example"], [*OWN, "10.0.0.1", "model.example:80"], FOREIGN),
        ("localhost", ["model.example"], [*OWN, "MODEL.example"], [*FOREIGN, "a.model.example"]),
    ],
)
def test_a_host_is_this_machines_the_bound_one_or_an_allowed_one(bound, allowed, served, refused):
    from mobile.cli.serving.admission import hosts

    known = hosts(bound, allowed)
    assert [host for host in served if not known.serves(host)] == []
    assert [host for host in refused if known.serves(host)] == []


def test_another_host_is_told_which_option_lets_it(guarded):
    answer = post(guarded(), COMPLETIONS, PROMPT, host="evil.example")
    assert answer.status_code == 421
    assert "start it with --allowed-host NAME" in answer.json()["detail"]
    assert post(guarded("good.example"), COMPLETIONS, PROMPT, host="good.example").status_code == 200


def test_a_page_of_another_site_is_refused_and_one_of_this_server_is_not(guarded):
    for origin in (
        "null",
        "",
        "http://evil.example",
        "http://localhost:3000",
        "http://127.0.0.1",
        "http://localhost.x",
    ):
        answer = post(guarded("good.example"), COMPLETIONS, PROMPT, origin=origin)
        assert (origin, answer.status_code) == (origin, 403)
    for origin in ("http://localhost", "https://good.example"):
        assert post(guarded("good.example"), COMPLETIONS, PROMPT, origin=origin).status_code == 200
    assert "access-control-allow-origin" not in post(guarded(), COMPLETIONS, PROMPT).headers


def test_a_form_which_any_page_can_send_is_no_request(app):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        answer = run(
            app, lambda client, kind=kind: client.post(COMPLETIONS, content=b"{}", headers={"Content-Type": kind})
        )
        assert answer.status_code == 400
        assert "sent as application/json" in answer.json()["detail"]


@pytest.mark.parametrize("name", ["", "a:80", "http://a", "a/b", "a b", "[::1"])
def test_an_allowed_host_that_is_no_name_is_refused_before_anything_is_loaded(capsys, name):
    assert main(["serve", "./absent", "--allowed-host", name]) == 2
    assert capsys.readouterr().err.startswith("error: --allowed-host is a host's name without a port")


def test_a_body_that_is_too_long_is_refused_by_its_length_or_while_it_comes(app):
    sent = 0

    async def long() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(16):
            sent += 2**20
            yield b" " * 2**20

    answers = [
        post(app, COMPLETIONS, b" " * (4 * 2**20) + b"{}"),
        run(app, lambda client: client.post(COMPLETIONS, content=long(), headers=JSON)),
        post(app, COMPLETIONS, PROMPT, **{"content-length": "9" * 30}),
    ]
    assert [answer.status_code for answer in answers] == [413] * 3
    assert sent <= 6 * 2**20
    assert post(app, COMPLETIONS, PROMPT, **{"content-encoding": "gzip"}).status_code == 415


def test_a_body_that_does_not_come_is_given_up_and_more_requests_than_can_wait_are_told_so(app, monkeypatch):
    from mobile.cli.serving import admission

    monkeypatch.setattr(admission, "MOST_AT_ONCE", 2)
    monkeypatch.setattr(admission, "SECONDS_FOR_A_BODY", 1)

    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(60)

    async def ask(client: Any) -> list[Any]:
        waiting = [asyncio.ensure_future(client.post(COMPLETIONS, content=slow(), headers=JSON)) for _ in range(2)]
        await asyncio.sleep(0.1)
        third = await client.post(COMPLETIONS, json=PROMPT)
        health = await client.get("/health")
        late = await asyncio.gather(*waiting)
        return [third, health, *late, await client.post(COMPLETIONS, json=PROMPT)]

    answers = run(app, ask)
    assert [answer.status_code for answer in answers] == [503, 200, 408, 408, 200]
    assert answers[0].headers["retry-after"] == "1"
    assert "2 requests wait for an answer already" in answers[0].json()["detail"]


# --- clients that leave -----------------------------------------------------------------------------


async def leave(app: Any, body: dict[str, Any], left: asyncio.Event, *, whole: bool = True) -> list[Any]:
    """Send a request, `whole` or not, whose client leaves when `left` is set; return what the server sent."""
    received = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": not whole}])
    sent: list[Any] = []

    async def receive() -> Any:
        for message in received:
            return message
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "query_string": b"", "headers": headers}
    await app({**scope, "http_version": "1.1", "scheme": "http", "root_path": ""}, receive, send)
    return sent


@pytest.mark.parametrize("stream", [False, True])
def test_what_generates_stops_when_the_client_leaves_and_does_not_start_if_it_left_before(app, model, stream):
    body = {**LONG, "stream": stream}

    async def left_early(client: Any) -> None:
        gone = asyncio.Event()
        gone.set()
        await asyncio.gather(*(leave(app, body, gone) for _ in range(8)))
        await client.post(COMPLETIONS, json=PROMPT)  # waits for what is in the queue before it

    async def left_within(client: Any) -> None:
        gone = asyncio.Event()
        began = model.mobile.stats()["tokens"]
        leaving = asyncio.ensure_future(leave(app, body, gone))
        while model.mobile.stats()["tokens"] == began:
            await asyncio.sleep(0.001)
        gone.set()
        await leaving
        await client.post(COMPLETIONS, json=PROMPT)

    before = model.mobile.stats()["tokens"]
    run(app, left_early)
    first = model.mobile.stats()["tokens"]
    assert first - before < 60  # one may have begun; eight would be 480
    run(app, left_within)
    assert model.mobile.stats()["tokens"] - first < 60


def test_a_client_that_leaves_within_its_body_raises_nothing(app):
    gone = asyncio.Event()
    gone.set()
    assert asyncio.run(leave(app, PROMPT, gone, whole=False))[0]["status"] == 400


def test_the_server_ends_after_what_generates(app, monkeypatch):
    from mobile.cli.serving.generations import Generations

    generations, done, others = Generations(None), threading.Event(), []

    async def ended(_: Any, seconds: float) -> None:
        others.append(seconds)

    async def end() -> None:
        generations.submit(lambda: (time.sleep(0.2), done.set()))
        await generations.ended(60)
        assert done.is_set()
        generations.submit(lambda: time.sleep(0.3))
        await generations.ended(0.01)  # and does not wait longer than it may

    asyncio.run(end())
    monkeypatch.setattr(Generations, "ended", ended)
    events = iter(["lifespan.startup", "lifespan.shutdown"])

    async def receive() -> Any:
        return {"type": next(events)}

    async def send(_: Any) -> None:
        pass

    asyncio.run(app({"type": "lifespan"}, receive, send))
    assert others == [SECONDS_TO_FINISH]


def test_a_request_that_is_cancelled_at_the_end_gets_a_sentence():
    from mobile.cli.serving.admission import Admission

    async def endless(*_: Any) -> None:
        await asyncio.sleep(60)

    async def cancelled() -> list[Any]:
        task = asyncio.ensure_future(leave(Admission(endless, None), PROMPT, asyncio.Event()))
        await asyncio.sleep(0)
        task.cancel()
        return await task

    sent = asyncio.run(cancelled())
    assert sent[0]["status"] == 503
    assert json.loads(sent[1]["body"])["detail"] == "The server has ended before the answer was there."

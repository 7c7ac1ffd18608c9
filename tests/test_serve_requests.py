"""Requests to the server, without a socket between: a client's mistake is a 4xx with a sentence, never a 500."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import mobile
from mobile.cli.serve import NEEDS, application

pytestmark = pytest.mark.skipif(
    not all(map(find_spec, (*NEEDS, "httpx"))), reason="needs the extra `serve` and what its clients use"
)
MODEL = Path(__file__).parent.parent / "suites/models/olmoe-tiny"
TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)
COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
ASKED: dict[str, Any] = {"prompt": "Q: not True is\nA:", "max_tokens": 4, "temperature": 0}
USER = [{"role": "user", "content": "Q: not True is"}]
TALK: dict[str, Any] = {"messages": USER, "max_tokens": 4}
TOLD: dict[str, Any] = {"input": "Q: not True is", "max_output_tokens": 4, "stream": False}
HALF = "a\ud800"  # half of a surrogate pair


@pytest.fixture(scope="module")
def app():
    """The server of a shipped model, whose tokenizer has a template that takes no system role."""
    model = mobile.load(MODEL, "mobile", slots=72, dtype=torch.float32, device="cpu", progress=False)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = TEMPLATE
    yield application("tiny", model, tokenizer)
    mobile.detach(model)


@pytest.fixture
def post(app):
    """Ask all of these at once, as (path, body); a body of bytes is sent as it is."""
    import httpx

    async def ask(requests: list[tuple[str, Any]]) -> list[Any]:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://tiny", timeout=60) as client:
            sent = (
                client.post(
                    path,
                    content=body if isinstance(body, bytes) else json.dumps(body).encode(),
                    headers={"Content-Type": "application/json"},
                )
                for path, body in requests
            )
            return list(await asyncio.gather(*sent))

    def one_or_many(*requests: tuple[str, Any]) -> Any:
        answers = asyncio.run(ask(list(requests)))
        return answers[0] if len(answers) == 1 else answers

    return one_or_many


WRONG = [
    (COMPLETIONS, {}, "prompt: field required"),
    (COMPLETIONS, {**ASKED, "prompt": ""}, "prompt: is empty; give it some text"),
    (COMPLETIONS, {**ASKED, "prompt": None}, "prompt: input should be a valid string"),
    (COMPLETIONS, {**ASKED, "prompt": ["a", "b"]}, "prompt: input should be a valid string"),
    (COMPLETIONS, {**ASKED, "prompt": HALF}, "prompt: must be a text"),
    (COMPLETIONS, {**ASKED, "prompt": "word " * 600}, "The prompt is 1201 tokens long and tiny takes 512"),
    (COMPLETIONS, {**ASKED, "max_tokens": 0}, "max_tokens: input should be greater than or equal to 1"),
    (COMPLETIONS, {**ASKED, "max_tokens": -1}, "max_tokens: input should be greater than or equal to 1"),
    (COMPLETIONS, {**ASKED, "max_tokens": "4"}, "max_tokens: input should be a valid integer"),
    (COMPLETIONS, {**ASKED, "max_tokens": True}, "max_tokens: input should be a valid integer"),
    (COMPLETIONS, {**ASKED, "stop": 5}, "stop: must be a text"),
    (COMPLETIONS, {**ASKED, "stop": ["a", 5]}, "stop: must be a text"),
    (COMPLETIONS, {**ASKED, "stop": ""}, "stop: must be a text that is not empty"),
    (COMPLETIONS, {**ASKED, "stop": [HALF]}, "stop: must be a text"),
    (COMPLETIONS, {**ASKED, "temperature": -1}, "temperature: input should be greater than or equal to 0"),
    (COMPLETIONS, {**ASKED, "temperature": 1e-9}, "temperature: must be 0 or at least 0.0001"),
    (COMPLETIONS, {**ASKED, "temperature": float("nan")}, "temperature: input should be a finite number"),
    (COMPLETIONS, {**ASKED, "top_p": 2}, "top_p: input should be less than or equal to 1"),
    (COMPLETIONS, {**ASKED, "frequency_penalty": -1}, "frequency_penalty: input should be greater than -1"),
    (COMPLETIONS, {**ASKED, "seed": 2**64}, "seed: input should be less than 18446744073709551616"),
    (COMPLETIONS, {**ASKED, "stream": "yes"}, "stream: input should be a valid boolean"),
    (COMPLETIONS, {**ASKED, "suffix": 5}, "suffix: input should be a valid string"),
    (COMPLETIONS, {**ASKED, "model": 5}, "model: input should be a valid string"),
    (COMPLETIONS, {**ASKED, "model": HALF}, "model: must be a text"),
    (COMPLETIONS, {**ASKED, HALF: 5}, "unable to parse raw data as a unicode string"),
    (COMPLETIONS, {**ASKED, "generation_config": "{"}, "generation_config: must be the JSON of an object"),
    (COMPLETIONS, {**ASKED, "generation_config": '{"top_k": "x"}'}, "top_k: input should be a valid integer"),
    (COMPLETIONS, {**ASKED, "generation_config": '{"assistant_early_exit": 2}'}, "assistant_early_exit: extra inputs"),
    (COMPLETIONS, b"", "The body of a request is a JSON object"),
    (COMPLETIONS, b"{", "The body of a request is a JSON object"),
    (COMPLETIONS, b"[]", "The body of a request is a JSON object"),
    (COMPLETIONS, b'"\\ud800"', "The body of a request is a JSON object"),
    (COMPLETIONS, b"\xff", "error parsing the body"),
    (COMPLETIONS, b"[" * 100_000, "error parsing the body"),
    (CHAT, {}, "messages: field required"),
    (CHAT, {"messages": []}, "messages: list should have at least 1 item"),
    (CHAT, {"messages": "hi"}, "messages: input should be a valid list"),
    (CHAT, {"messages": ["hi"]}, "messages.0: input should be a valid dictionary"),
    (CHAT, {"messages": [{"content": "hi"}]}, "messages.0.role: field required"),
    (
        CHAT,
        {"messages": [{"role": "alien", "content": "hi"}]},
        "messages.0.role: input should be 'system', ",
    ),
    (CHAT, {"messages": [{"role": "user"}]}, "messages.0: lacks its content"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content: must be a text"),
    (CHAT, {"messages": [{"role": "user", "content": HALF}]}, "messages.0.content: must be a text"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content: must be a text"),
    (CHAT, {"messages": [{"role": "user", "content": ""}]}, "makes no text of the prompt"),
    (CHAT, {"messages": [{"role": "system", "content": "be kind"}, *USER]}, "does not take this (No system role)"),
    (
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "messages.0.tool_calls.0.function.arguments: must be the JSON of an object",
    ),
    (CHAT, {**TALK, "tools": ["f"]}, "tools.0: input should be a valid dictionary"),
    (CHAT, {**TALK, "logit_bias": {"a": 1}}, "logit_bias: must name tokens by their ids"),
    (CHAT, {**TALK, "logit_bias": {"5": 1e300}}, "logit_bias: must name tokens by their ids"),
    (CHAT, {**TALK, "logit_bias": {"1024": 1}}, "logit_bias names none of 1024 tokens"),
    (CHAT, {**TALK, "chat_template_kwargs": {"tokenize": False}}, "must name variables of the template"),
    (RESPONSES, {}, "input: field required"),
    (RESPONSES, {**TOLD, "input": []}, "input: must be a text, or a list of messages"),
    (RESPONSES, {**TOLD, "input": 5}, "input: must be a text, or a list of messages"),
    (RESPONSES, {**TOLD, "input": [{"type": "input_image"}]}, "input: must be a text"),
    (RESPONSES, {**TOLD, "input": [*USER, {"type": "picture"}]}, "input: must be a list of messages and of items"),
    (RESPONSES, {**TOLD, "input": [*USER, {"type": "function_call"}]}, "item of type function_call that is wrong"),
    (RESPONSES, {**TOLD, "max_output_tokens": 0}, "max_output_tokens: input should be greater than or equal to 1"),
    (RESPONSES, {**TOLD, "instructions": "be kind"}, "does not take this (No system role)"),
]


@pytest.mark.parametrize(("path", "body", "says"), WRONG)
def test_a_clients_mistake_is_a_status_of_400_with_a_sentence(post, path, body, says):
    answer = post((path, body))
    assert answer.status_code == 400
    assert says in answer.json()["detail"]
    assert "\n" not in answer.json()["detail"]


def test_a_mistake_in_a_stream_is_told_before_it_begins(post):
    for path, body in ((COMPLETIONS, {**ASKED, "prompt": ""}), (CHAT, {"messages": []}), (RESPONSES, {"input": []})):
        assert post((path, {**body, "stream": True})).status_code == 400


RIGHT = [
    (COMPLETIONS, {**ASKED, "stop": []}),
    (COMPLETIONS, {**ASKED, "stop": ["So", "True"], "seed": 5, "top_p": 0.9, "frequency_penalty": 0.5}),
    (COMPLETIONS, {**ASKED, "generation_config": '{"top_k": 5, "do_sample": true}'}),
    (COMPLETIONS, {**ASKED, "max_tokens": 10**30, "suffix": "!", "stream": None}),
    (CHAT, {**TALK, "logit_bias": {"5": 3}}),
    (CHAT, {**TALK, "logit_bias": {}, "chat_template_kwargs": {}, "tools": [{"type": "function"}]}),
    (CHAT, {**TALK, "messages": [{"role": "user", "content": [{"type": "text", "text": "Tara has"}]}]}),
    (
        CHAT,
        {
            **TALK,
            "messages": [
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
                {"role": "tool", "tool_call_id": "1", "content": "Tara has"},
            ],
        },
    ),
    (RESPONSES, TOLD),
    (RESPONSES, {**TOLD, "input": [{"type": "input_text", "text": "Tara has"}]}),
    (
        RESPONSES,
        {
            **TOLD,
            "input": [
                *USER,
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "Tara has"},
            ],
        },
    ),
]


@pytest.mark.parametrize(("path", "body"), RIGHT)
def test_what_is_no_mistake_is_answered(post, path, body):
    assert post((path, body)).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"), [(COMPLETIONS, ASKED), (COMPLETIONS, {**ASKED, "stop": "So"}), (CHAT, TALK), (RESPONSES, TOLD)]
)
def test_a_stream_ends_with_done(post, path, body):
    events = [event for event in post((path, {**body, "stream": True})).text.split("\n\n") if event]
    assert len(events) > 2
    assert events[-1] == "data: [DONE]"
    assert all(json.loads(event.removeprefix("data: ")) for event in events[:-1])
    assert not any("error" in json.loads(event.removeprefix("data: ")) for event in events[:-1])


def test_requests_at_the_same_time_get_each_its_own_answer_and_mistakes_between_them_disturb_none(post):
    prompts = ["Q: not True is\nA:", "Tara has", "Q: not ( True and False ) is\nA:"]

    def text(answer: Any) -> str:
        return answer.json()["choices"][0]["text"]

    alone = [text(post((COMPLETIONS, {**ASKED, "prompt": prompt, "max_tokens": 8}))) for prompt in prompts]
    assert len(set(alone)) == 3
    mixed = [(COMPLETIONS, {**ASKED, "prompt": prompt, "max_tokens": 8}) for prompt in (*prompts, "", *prompts)]
    answers = post(*mixed, (CHAT, {"messages": [{"role": "system", "content": "x"}]}), (COMPLETIONS, b"{"))
    assert [answer.status_code for answer in answers] == [200, 200, 200, 400, 200, 200, 200, 400, 400]
    assert [text(answer) for answer in answers if answer.status_code == 200] == alone * 2


def test_a_client_that_leaves_in_the_middle_of_a_stream_ends_it_at_once():
    """By the time its connection is closed: what generates hears of it there."""
    from mobile.cli.serve import _ended

    told: list[str] = []

    async def events() -> AsyncIterator[str]:
        try:
            yield "first"
            yield "second"
        finally:
            told.append("the client has left")

    async def leave() -> None:
        stream = _ended(events())
        assert await anext(stream) == "first"
        await stream.aclose()
        assert told == ["the client has left"]

    asyncio.run(leave())

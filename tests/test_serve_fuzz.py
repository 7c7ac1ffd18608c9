"""A thousand random requests to the server: each is answered, or refused in one sentence, and none leaves a trace."""

from __future__ import annotations

import asyncio
import json
import random
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
    "{% for m in messages %}{{ m.content }}{{ m.tool_calls or '' }}{% endfor %}{{ tools or '' }}{{ extra or '' }}"
)
POSITIONS = 24  # so that no answer is long
REQUESTS = 1000
PLAIN = ("/v1/completions", {"prompt": "Q: not True is\nA:", "max_tokens": 4, "temperature": 0})
USER = {"role": "user", "content": "Q: not"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
SEEDS: list[tuple[str, dict[str, Any]]] = [
    PLAIN,
    ("/v1/completions", {**PLAIN[1], "stop": ["So", "."], "seed": 5, "top_p": 0.9, "frequency_penalty": 0.5}),
    ("/v1/completions", {"prompt": "Tara", "generation_config": '{"top_k": 5, "do_sample": true}', "stream": True}),
    ("/v1/chat/completions", {"messages": [USER], "max_tokens": 3, "logit_bias": {"5": 3}, "tools": []}),
    ("/v1/chat/completions", {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}], "stream": True}),
    ("/v1/chat/completions", {"messages": [USER], "chat_template_kwargs": {"extra": [1]}, "max_completion_tokens": 3}),
    ("/v1/responses", {"input": "Q: not True is", "max_output_tokens": 3, "stream": False}),
    ("/v1/responses", {"input": [{"type": "input_text", "text": "Tara"}], "max_output_tokens": 3}),
    (
        "/v1/responses",
        {
            "input": [
                USER,
                {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "so"}]},
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "Tara"},
            ],
            "instructions": "So",
            "stream": False,
        },
    ),
]
NAMES = (
    "n best_of echo logprobs top_logprobs logit_bias presence_penalty frequency_penalty user metadata store stop seed "
    "model stream stream_options suffix prompt messages input instructions tools tool_choice response_format text "
    "temperature top_p max_tokens max_completion_tokens max_output_tokens generation_config chat_template_kwargs "
    "parallel_tool_calls previous_response_id reasoning include background truncation modalities audio functions "
    "num_beams num_return_sequences cache_implementation top_k min_p repetition_penalty no_repeat_ngram_size "
    "max_new_tokens min_new_tokens do_sample role content type name arguments tool_calls call_id output __class__ "
    "\ud800"
).split(" ")

HARMLESS = {
    "user": "x",
    "store": True,
    "metadata": {"a": "b"},
    "temperature": 0.7,
    "top_p": 0.5,
    "seed": 1,
    "model": "tiny",
    "stream": True,
    "service_tier": None,
    "generation_config": '{"top_k": 1024, "min_p": 0.1, "no_repeat_ngram_size": 2, "do_sample": true}',
}


def nested(levels: int) -> Any:
    value: Any = 1
    for level in range(levels):
        value = {"a": value} if level % 2 else [value]
    return value


def odd_value(rng: random.Random) -> Any:
    """Return a value that a careless reader would stumble over."""
    return rng.choice(
        [
            lambda: None,
            lambda: rng.choice([True, False]),
            lambda: rng.choice([0, -1, 1, 2, 2**31, 2**63, 2**64, -(2**64), 10**400]),
            lambda: rng.choice([0.0, -0.5, 0.5, 1e-9, 1e300, 5e-324, float("nan"), float("inf")]),
            lambda: rng.choice(["", "x", "1", "true", "\x00", "\ud800", "a\nb", "é", "<|endoftext|>", "{{ 1 }}"]),
            lambda: "word " * rng.choice([3, 100, 20_000]),
            lambda: rng.choice(["[" * 5000, "{", "{}", '{"a": 1, "a": 2}', "9" * 5000, "NaN"]),
            lambda: [odd_value(rng) for _ in range(rng.randrange(3))],
            lambda: [rng.choice(["x", USER, CALL, {}])] * rng.choice([1, 3, 5000]),
            lambda: {rng.choice(NAMES): odd_value(rng) for _ in range(rng.randrange(3))},
            lambda: {str(token): 1 for token in range(rng.choice([1, 2000]))},
            lambda: nested(rng.choice([3, 60, 70, 400])),
            lambda: json.dumps({rng.choice(NAMES): rng.choice([1, 10**6, -1, 0.5, True, "x"])}),
        ]
    )()


def inner(body: Any, rng: random.Random) -> Any:
    """Return the body, or a list or an object somewhere in it."""
    children = list(body.values()) if isinstance(body, dict) else body
    deeper = [child for child in children if isinstance(child, dict | list) and child]
    return inner(rng.choice(deeper), rng) if deeper and rng.random() < 0.5 else body


def mutated(body: Any, rng: random.Random) -> Any:
    """Return the body with one to three fields changed, added or dropped."""
    body = json.loads(json.dumps(body))
    if rng.random() < 0.25:
        return body | dict(rng.sample(sorted(HARMLESS.items()), 2))
    for _ in range(rng.randint(1, 3)):
        place = inner(body, rng)
        if isinstance(place, list):
            place[rng.randrange(len(place))] = odd_value(rng)
        elif place and rng.random() < 0.2:
            del place[rng.choice(sorted(place))]
        else:
            place[rng.choice([*NAMES, *place])] = odd_value(rng)
    return body


def broken(content: bytes, rng: random.Random) -> bytes:
    """Return the bytes cut, doubled, changed somewhere, or none of them."""
    at = rng.randrange(len(content))
    changed = content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    return rng.choice([content[:at], content * 2, changed, changed, b"\xff\xfe" + content, b'[{"a":' * at, b""])


def a_request(rng: random.Random) -> tuple[str, str, bytes, dict[str, str]]:
    """Return method, path, content and headers."""
    path, body = rng.choice(SEEDS)
    content = json.dumps(mutated(body, rng)).encode()
    method, headers = "POST", {"Content-Type": "application/json"}
    if rng.random() < 0.25:
        content = broken(content, rng)
    if rng.random() < 0.05:
        kind = rng.choice(["text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", ""])
        headers = {"Content-Type": kind} if kind else {}
    if rng.random() < 0.05:
        name, value = rng.choice(
            [("Origin", "null"), ("Content-Encoding", "gzip"), ("Content-Length", "9" * 30), ("Host", "evil.example")]
        )
        headers[name] = value
    if rng.random() < 0.05:
        method = rng.choice(["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH"])
    if rng.random() < 0.05:
        path = rng.choice(["/", "/stats", "/../etc/passwd", "/%2e%2e/%00", "/docs", path + "/x", "/" + "a" * 9000])
    return method, path, content, headers


def fault(answer: Any) -> str | None:
    """Return why this is neither an answer nor a refusal in one sentence; None if it is one of them."""
    if not 200 <= answer.status_code < 500:
        return "its status"
    if answer.request.method == "HEAD":
        return "a body" if answer.content else None
    if answer.status_code >= 400:
        said = answer.json()["detail"]
        return None if said.endswith(".") and "\n" not in said and len(said) < 400 else "its sentence"
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return None if isinstance(answer.json(), dict) else "its body"
    *events, last = [event.removeprefix("data: ") for event in answer.text.split("\n\n") if event]
    failed = [event for event in map(json.loads, events) if "error" in event or event.get("type") == "error"]
    return "its events" if failed or last != "[DONE]" else None


def test_each_of_a_thousand_requests_is_answered_or_refused_and_the_next_one_is_answered_as_ever():
    import httpx

    from mobile.cli.serving.admission import hosts

    model = mobile.load(MODEL, "mobile", slots=72, dtype=torch.float32, device="cpu", progress=False)
    model.config.max_position_embeddings = POSITIONS
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = TEMPLATE
    transport = httpx.ASGITransport(
        application("tiny", model, tokenizer, hosts("tiny", [])), raise_app_exceptions=False
    )
    rng = random.Random(17)
    seen: dict[int, int] = {}

    async def ask_all() -> None:
        async with httpx.AsyncClient(transport=transport, base_url="http://tiny", timeout=60) as client:

            async def plain() -> str:
                text: str = (await client.post(PLAIN[0], json=PLAIN[1])).json()["choices"][0]["text"]
                return text

            before = await plain()
            for number in range(REQUESTS):
                method, path, content, headers = a_request(rng)
                answer = await client.request(method, path, content=content, headers=headers)
                why = fault(answer)
                assert why is None, (why, number, method, path, content[:2000], headers, answer.text[:500])
                seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
                if number % 100 == 0:
                    assert await plain() == before
            assert await plain() == before

    asyncio.run(ask_all())
    mobile.detach(model)
    assert seen[200] > 100
    assert seen[400] > 300
    assert {403, 404, 405, 413, 415, 421} <= set(seen)

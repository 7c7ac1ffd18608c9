"""`mobile serve`: an attached model behind the OpenAI protocol, by Transformers' own request handlers.

Transformers' application is not used: it has routes that unload the model and load another one, unattached.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from importlib.util import find_spec
from typing import Any
from uuid import uuid4

from mobile.cli.terminal import options, session, show
from mobile.cli.terminal.reader import Reader, open_reader
from mobile.errors import Refused, one_line

EXAMPLES = """
examples:
  mobile serve FOLDER --memory 8GiB
  curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "Once upon a time"}'
  curl localhost:8000/stats

Routes: /v1/completions, /v1/chat/completions, /v1/responses, /v1/models, /health, /stats. Requests are answered one
after another, and 128 can wait. Temperature 0 is greedy; else the model's generation_config says whether it samples.

A request that is wrong, too long, or asks for what the server does not support gets a sentence and a status of 4xx.
max_tokens is lowered to the positions that the prompt leaves.

Hosts (the header Host): localhost, 127.0.0.1, [::1], the one given as --host, and each --allowed-host. With --host
0.0.0.0 or ::, every IP address as well, but no other name. Pages of other sites are refused. There is no key and no
encryption: past this machine, put a proxy in front.
"""
ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/models", "/health", "/stats")
NEEDS = ("fastapi", "uvicorn", "openai", "pydantic")
LEFT = 499  # status of an answer that nobody reads, in the logs of web servers
SECONDS_TO_FINISH = 5  # how long a request may still take after Ctrl-C


class _CheckedTokenizer:
    """A model's tokenizer for Transformers' handlers. Its errors are refusals, as `Reader.checked` raises them."""

    def __init__(self, reader: Reader) -> None:
        longest = max(map(len, reader.tokenizer.get_vocab()), default=1)
        self._reader = reader
        self._most_characters = reader.positions and reader.positions * longest

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader.tokenizer, name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if options.get("return_tensors") is None:  # generate() looks for stop strings in the vocabulary
            return self._reader.tokenizer(*arguments, **options)
        self._short_enough(arguments[0])
        return self._reader.checked(lambda: self._reader.tokenizer(*arguments, **options), by="tokenizer")

    def parse_response(self, ids: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Return an answer's parts; all of it as its content where the model wrote a tool call that is none."""
        whole = {"content": self._reader.tokenizer.decode(ids, skip_special_tokens=True)}
        try:
            parts: dict[str, Any] = self._reader.tokenizer.parse_response(ids, *arguments, **options)
            called = [call["function"] for call in parts.get("tool_calls") or ()]
            right = all(isinstance(call["name"], str) and "arguments" in call for call in called)
        except (ValueError, KeyError, TypeError):
            return whole
        return parts if right else whole

    def apply_chat_template(self, *arguments: Any, **options: Any) -> Any:
        rendered = self._reader.tokenizer.apply_chat_template

        def read() -> Any:
            self._short_enough(rendered(*arguments, **{**options, "tokenize": False, "return_tensors": None}))
            return rendered(*arguments, **options)

        try:
            return self._reader.checked(read, by="chat template")
        except Refused as refused:
            raise refused.__cause__ if isinstance(refused.__cause__, Refused) else refused from None

    def _short_enough(self, text: str) -> None:
        """Refuse a text before it is tokenized, for which others wait, if no tokens could be few enough for it."""
        if self._most_characters is not None and len(text) > self._most_characters:
            raise Refused(
                f"The prompt is {len(text)} characters long, and the {self._reader.positions} tokens that "
                f"{self._reader.name} takes hold {self._most_characters} at most; shorten it."
            )


def application(name: str, model: Any, tokenizer: Any, hosts: Any = None) -> Any:
    """Return an ASGI application that serves one model under `hosts`, which `admission.hosts` returns; None is any.

    A client's mistake, such as a request for another model, gets a status from 400 to 499 and a sentence; more requests
    than can wait get 503.
    """
    from fastapi import FastAPI, HTTPException
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.utils import Modality

    from mobile.cli.serving import admission, bodies
    from mobile.cli.serving.generations import Generations, OneModel

    reader = Reader(name, tokenizer, tokenizer.chat_template is not None, model.config)
    checked_tokenizer = _CheckedTokenizer(reader)

    class OneModelManager(ModelManager):
        """The manager of the one model, which is loaded already."""

        @staticmethod
        def process_model_name(model_id: str) -> str:
            return model_id

        @staticmethod
        def get_model_modality(*_: Any, **__: Any) -> Modality:
            return Modality.LLM  # a tokenizer reads only text, whatever else the model can see

        def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
            return model, checked_tokenizer

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        await generations.ended(SECONDS_TO_FINISH)

    app, manager = FastAPI(title="mobile", openapi_url=None, lifespan=lifespan), OneModelManager()
    generations = Generations(reader.positions)
    state = OneModel(generations)
    manager.force_model = name  # given to the constructor, Transformers would load it

    def answer(path: str, kind: Any, handler: Any) -> None:
        async def route(request: Any) -> Any:
            body = await admission.body_of(request)
            if kind is not bodies.Completion and not reader.template:
                raise HTTPException(400, f"The tokenizer of {name} has no chat template; use /v1/completions.")
            if body.get("stream", kind is bodies.Response) and not hasattr(tokenizer, "_tokenizer"):
                raise HTTPException(400, f"The tokenizer of {name} cannot write text as it comes; leave stream out.")
            try:
                checked = bodies.checked(kind, body, reader.vocabulary, reader.positions)
                if checked.get("model", name) != name:
                    raise Refused(f"This server has one model, {name}; name this one, or leave model out.")
                answered = await _while_connected(request, handler.handle_request(checked, str(uuid4())))
            except Refused as refused:
                raise HTTPException(400, str(refused)) from refused
            except ValueError as error:
                given = [field for field in ("generation_config", "stop") if body.get(field)]
                if not given:
                    raise
                raise HTTPException(400, f"This {given[0]} cannot be used: {one_line(error)}.") from error
            if answered is None:
                return Response(status_code=LEFT)
            if isinstance(answered, StreamingResponse):
                answered.body_iterator = _ended(answered.body_iterator)
            return answered

        app.add_route(path, route, methods=["POST"])

    answer("/v1/completions", bodies.Completion, CompletionHandler(manager, state))
    answer("/v1/chat/completions", bodies.Chat, ChatCompletionHandler(manager, state))
    answer("/v1/responses", bodies.Response, ResponseHandler(manager, state))
    listed = {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "mobile"}]}
    app.get("/v1/models")(lambda: listed)
    app.get("/health")(lambda: {"status": "ok"})
    app.get("/stats")(lambda: model.mobile.stats())

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def no_route(request: Any, error: Any) -> Any:
        methods = (error.headers or {}).get("Allow")
        paths = f"There is no such path; there are {', '.join(ROUTES)}."
        sentence = f"This path takes {methods}." if methods else paths
        return JSONResponse({"detail": sentence}, error.status_code, error.headers)

    return admission.Admission(app, hosts)


async def _while_connected(request: Any, answering: Any) -> Any:
    """Return the result of a coroutine, or None, and cancel it, if the client of the request leaves before it ends."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, leaving = asyncio.ensure_future(answering), asyncio.ensure_future(left())
    try:
        await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await answer if answer.done() else None
    finally:
        answer.cancel()
        leaving.cancel()


async def _ended(events: Any) -> AsyncIterator[Any]:
    """Yield the events of a stream, then the one that ends it for OpenAI's clients. A client that leaves closes it."""
    async with aclosing(events):
        async for event in events:
            yield event
    yield "data: [DONE]\n\n"


# --- the command ------------------------------------------------------------------------------------


def declare(commands: Any) -> None:
    """Add the command and its options."""
    parser = options.command(
        commands,
        "serve",
        run,
        help="an OpenAI-compatible server",
        description="Serve a model whose experts wait in host memory over the OpenAI protocol.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--host", default="localhost", help="(default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0 for any free one (default: %(default)s)")
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="answer under this name, too, and to its pages; may be given again",
    )
    options.loading(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C; return 0. Raise Refused."""
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise Refused(f"mobile serve needs packages that are not installed; run: pip install {' '.join(missing)}")
    import uvicorn

    from mobile.cli.serving.admission import hosts

    name: str = arguments.model
    served = hosts(arguments.host, arguments.allowed_host)
    with _listen(arguments.host, arguments.port) as listener:
        show.waiting(f"opening {name} ...")
        reader = open_reader(arguments)
        app = application(name, session.load_model(arguments, reader), reader.tokenizer, served)
        config = uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=SECONDS_TO_FINISH)
        server = uvicorn.Server(config)
        show.note(f"{name} is served at http://{arguments.host}:{listener.getsockname()[1]}/v1; Ctrl-C ends it.")
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens, before the model is loaded; clients that connect meanwhile wait. Raise Refused."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError, ValueError, TypeError) as error:
        raise Refused(f"Cannot serve at {host}:{port}: {one_line(error)}.") from error

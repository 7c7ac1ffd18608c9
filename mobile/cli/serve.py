"""`mobile serve`: an attached model behind the OpenAI protocol, by Transformers' own request handlers.

Transformers' application is not used: it has routes that unload the model and load another one, unattached.
"""

from __future__ import annotations

import argparse
import socket
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
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
after another. Temperature 0 is greedy; else the model's generation_config says whether it samples.
"""
NEEDS = ("fastapi", "uvicorn", "openai", "pydantic")
SECONDS_TO_FINISH = 5  # how long a request may still take after Ctrl-C


class _CheckedTokenizer:
    """A model's tokenizer for Transformers' handlers. Its errors are refusals, as `Reader.checked` raises them."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader.tokenizer, name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if options.get("return_tensors") is None:  # generate() looks for stop strings in the vocabulary
            return self._reader.tokenizer(*arguments, **options)
        return self._reader.checked(lambda: self._reader.tokenizer(*arguments, **options), by="tokenizer")

    def apply_chat_template(self, *arguments: Any, **options: Any) -> Any:
        rendered = self._reader.tokenizer.apply_chat_template
        return self._reader.checked(lambda: rendered(*arguments, **options), by="chat template")


def application(name: str, model: Any, tokenizer: Any) -> Any:
    """Return an ASGI application that serves one model.

    A client's mistake, such as a request for another model, gets status 400.
    """
    from fastapi import FastAPI, HTTPException
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, StreamingResponse
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.utils import GenerationState, Modality

    from mobile.cli import request_bodies

    reader = Reader(name, tokenizer, tokenizer.chat_template is not None, model.config)
    checked_tokenizer = _CheckedTokenizer(reader)

    class OneModel(ModelManager):
        """The manager of the one model, which is loaded already."""

        @staticmethod
        def process_model_name(model_id: str) -> str:
            return model_id

        @staticmethod
        def get_model_modality(*_: Any, **__: Any) -> Modality:
            return Modality.LLM  # a tokenizer reads only text, whatever else the model can see

        def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
            return model, checked_tokenizer

    app, manager, state = FastAPI(title="mobile"), OneModel(), GenerationState()
    manager.force_model = name  # given to the constructor, Transformers would load it

    def answer(path: str, kind: Any, handler: Any) -> None:
        @app.post(path)
        async def route(body: dict[str, Any]) -> Any:
            if kind is not request_bodies.Completion and not reader.template:
                raise HTTPException(400, f"The tokenizer of {name} has no chat template; use /v1/completions.")
            if body.get("stream", kind is request_bodies.Response) and not hasattr(tokenizer, "_tokenizer"):
                raise HTTPException(400, f"The tokenizer of {name} cannot write text as it comes; leave stream out.")
            try:
                answered = await handler.handle_request(
                    request_bodies.checked(kind, body, reader.vocabulary), str(uuid4())
                )
            except Refused as refused:
                raise HTTPException(400, str(refused)) from refused
            except ValueError as error:
                if body.get("generation_config") is None:
                    raise
                raise HTTPException(400, f"This generation_config cannot be used: {one_line(error)}.") from error
            if isinstance(answered, StreamingResponse):
                answered.body_iterator = _ended(answered.body_iterator)
            return answered

    @app.exception_handler(RequestValidationError)
    async def no_object(*_: Any) -> Any:
        return JSONResponse({"detail": "The body of a request is a JSON object, sent as application/json."}, 400)

    answer("/v1/completions", request_bodies.Completion, CompletionHandler(manager, state))
    answer("/v1/chat/completions", request_bodies.Chat, ChatCompletionHandler(manager, state))
    answer("/v1/responses", request_bodies.Response, ResponseHandler(manager, state))
    listed = {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "mobile"}]}
    app.get("/v1/models")(lambda: listed)
    app.get("/health")(lambda: {"status": "ok"})
    app.get("/stats")(lambda: model.mobile.stats())
    return app


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
    options.loading(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C; return 0. Raise Refused."""
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise Refused(f"mobile serve needs packages that are not installed; run: pip install {' '.join(missing)}")
    import uvicorn

    name: str = arguments.model
    with _listen(arguments.host, arguments.port) as listener:
        show.waiting(f"opening {name} ...")
        reader = open_reader(arguments)
        app = application(name, session.load_model(arguments, reader), reader.tokenizer)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=SECONDS_TO_FINISH))
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

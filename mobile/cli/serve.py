"""`mobile serve`: the OpenAI protocol around an attached model, by Transformers' own request handlers.

Transformers' application is not used: it has routes that drop the model and load another one, unattached.
"""

from __future__ import annotations

import argparse
import socket
from contextlib import suppress
from importlib.util import find_spec
from typing import Any
from uuid import uuid4

from mobile.cli import options, session, show
from mobile.refusal import Refused

EXAMPLES = """
examples:
  mobile serve FOLDER --memory 8GiB
  curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "Once upon a time"}'
  curl localhost:8000/stats

Routes: /v1/completions, /v1/chat/completions, /v1/responses, /v1/models, /health, /stats. Requests are answered one
after another. Temperature 0 is greedy; else the model's generation_config says whether it samples.
"""
NEEDS = ("fastapi", "uvicorn", "openai", "pydantic")
SECONDS_TO_FINISH = 5  # what a request may still take after Ctrl-C


def application(name: str, model: Any, tokenizer: Any) -> Any:
    """An ASGI application that knows one model; a request for another name gets status 400."""
    from fastapi import FastAPI, HTTPException
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.utils import GenerationState

    class OneModel(ModelManager):
        @staticmethod
        def process_model_name(model_id: str) -> str:
            return model_id

        def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
            return model, tokenizer

    app, manager, state = FastAPI(title="mobile"), OneModel(), GenerationState()
    manager.force_model = name  # as an argument it would be loaded by Transformers

    def answer(path: str, handler: Any, *, chat: bool) -> None:
        @app.post(path)
        async def route(body: dict[str, Any]) -> Any:
            if chat and tokenizer.chat_template is None:
                raise HTTPException(400, f"The tokenizer of {name} has no chat template; use /v1/completions.")
            try:
                return await handler.handle_request(body, str(uuid4()))
            except Refused as refused:
                raise HTTPException(400, str(refused)) from refused

    answer("/v1/completions", CompletionHandler(manager, state), chat=False)
    answer("/v1/chat/completions", ChatCompletionHandler(manager, state), chat=True)
    answer("/v1/responses", ResponseHandler(manager, state), chat=True)
    listed = {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "mobile"}]}
    app.get("/v1/models")(lambda: listed)
    app.get("/health")(lambda: {"status": "ok"})
    app.get("/stats")(lambda: model.mobile.stats())
    return app


# --- the command ------------------------------------------------------------------------------------


def declare(commands: Any) -> None:
    parser = options.command(
        commands, "serve", run, help="an OpenAI-compatible server",
        description="Serve a model whose experts wait in host memory over the OpenAI protocol.", epilog=EXAMPLES,
    )  # fmt: skip
    parser.add_argument("--host", default="localhost", help="(default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0: any free one (default: %(default)s)")
    options.loading(parser)


def run(arguments: argparse.Namespace) -> int:
    lacking = [name for name in NEEDS if find_spec(name) is None]
    if lacking:
        raise Refused(f"mobile serve needs packages that are not installed; run: pip install {' '.join(lacking)}")
    import uvicorn

    name: str = arguments.model
    with _listening(arguments.host, arguments.port) as listening:
        tokenizer = session.load_tokenizer(arguments)
        app = application(name, session.load_model(arguments), tokenizer)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=SECONDS_TO_FINISH))
        show.note(f"{name} is served at http://{arguments.host}:{listening.getsockname()[1]}/v1; Ctrl-C ends it.")
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listening])
    return 0


def _listening(host: str, port: int) -> socket.socket:
    """The address, taken before the model is loaded; who connects meanwhile waits."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise Refused(f"Cannot serve at {host}:{port}: {getattr(error, 'strerror', None) or error}.") from error

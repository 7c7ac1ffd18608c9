"""Requests that are turned away before their body is read, and the reading of the body, which has a limit, too.

A page of another site can make a browser on this machine send requests here: under its own name that it points at
this machine (DNS rebinding), which the header Host tells, or openly, which Origin tells. The second cannot read the
answers, but it would occupy the model. A client that opens connections and never sends a whole header is not kept out;
where strangers can connect, a proxy in front of the server does that.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from mobile.errors import Refused, one_line
from mobile.inputs import shallow_json

LOCAL = {"localhost", "127.0.0.1", "[::1]"}
EVERYWHERE = {"", "0.0.0.0", "[::]"}  # addresses on which a server hears every network
MOST_AT_ONCE = 128
MOST_BYTES = 4 * 2**20
SECONDS_FOR_A_BODY = 60
AUTHORITY = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:/?#@\\\s]+)(?::[0-9]{1,5})?")  # a host, and perhaps a port
ADDRESS = re.compile(r"\[[0-9a-f:.]+\]|[0-9]{1,3}(\.[0-9]{1,3}){3}")
NO_OBJECT = "The body of a request is a JSON object, sent as application/json."


@dataclass(frozen=True)
class Hosts:
    """Hosts under which the server answers. `addresses` adds every IP address: none can be pointed elsewhere."""

    names: frozenset[str]
    sites: frozenset[str]  # those of the names whose pages may use the server
    addresses: bool

    def serves(self, authority: str) -> bool:
        """Return whether `authority`, a host with or without a port, is among them."""
        host = _host(authority)
        return host in self.names or (self.addresses and ADDRESS.fullmatch(host) is not None)


def _host(authority: str) -> str:
    """Return the host in lower case, without the port; an empty text if there is none."""
    found = AUTHORITY.fullmatch(authority)
    return found[1].lower() if found else ""


def hosts(bound: str, allowed: Sequence[str]) -> Hosts:
    """Return the hosts of a server that is bound to `bound`: this machine's own names, `bound`, and those allowed.

    Raise Refused for a name that is none.
    """
    for name in allowed:
        if not name or _host(name) != name.lower():
            raise Refused(
                f"--allowed-host is a host's name without a port, such as model.example.org; {name!r} is none."
            )
    own = f"[{bound}]" if ":" in bound else bound
    everywhere = own in EVERYWHERE
    sites = frozenset(map(str.lower, allowed))
    return Hosts(sites | LOCAL if everywhere else sites | LOCAL | {own.lower()}, sites, everywhere)


class Admission:
    """An ASGI application that passes requests on to another one, or answers them with why not.

    `hosts` None serves every host: for a caller that checks it elsewhere.
    """

    def __init__(self, app: Any, hosts: Hosts | None) -> None:
        self._app, self._hosts, self._at_once = app, hosts, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = self._turned_away(scope)
        if answer is not None:
            await answer(scope, receive, send)
            return
        begun = False

        async def sending(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        counts = scope["method"] == "POST"
        self._at_once += counts
        try:
            await self._app(scope, receive, sending)
        except asyncio.CancelledError:  # the server ends
            if not begun:
                await _detail(503, "The server has ended before the answer was there.")(scope, receive, send)
        finally:
            self._at_once -= counts

    def _turned_away(self, scope: Any) -> JSONResponse | None:
        """Return the answer to a request that is turned away; None if it is not."""
        named = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if self._hosts is not None and (len(named) != 1 or not self._hosts.serves(named[0])):
            return _detail(
                421, "This server does not answer under this host; start it with --allowed-host NAME to let it."
            )
        for name, value in scope["headers"]:
            if name == b"origin" and not self._own_page(value.decode("latin-1"), named):
                return _detail(403, "A page of another site may not use this server.")
        if scope["method"] == "POST" and self._at_once >= MOST_AT_ONCE:
            return _detail(503, f"{MOST_AT_ONCE} requests wait for an answer already; try again later.", again=1)
        return None

    def _own_page(self, origin: str, named: list[str]) -> bool:
        """Return whether a page of `origin` was loaded from here: from the host asked, or through a proxy's name."""
        authority = origin.partition("://")[2].lower()
        proxied = self._hosts is not None and _host(authority) in self._hosts.sites
        return authority != "" and (authority in map(str.lower, named) or proxied)


def _detail(status: int, sentence: str, again: int | None = None) -> JSONResponse:
    """Return an answer of one sentence; `again` is the number of seconds after which to try again."""
    return JSONResponse({"detail": sentence}, status, {"Retry-After": str(again)} if again else None)


async def body_of(request: Request) -> dict[str, Any]:
    """Return the JSON object that a request carries.

    Raise HTTPException with a status from 400 to 415 for another body, for one too long, for one that is not there
    after a minute, and for a client that left before its end.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise HTTPException(400, NO_OBJECT)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "A body that is compressed is not read; send it as it is.")
    try:
        async with asyncio.timeout(SECONDS_FOR_A_BODY):
            content = await _received(request)
    except ClientDisconnect as error:
        raise HTTPException(400, "The body ended too early.") from error
    except TimeoutError as error:
        raise HTTPException(
            408, f"The body was not there after {SECONDS_FOR_A_BODY} seconds; send it faster."
        ) from error
    try:
        body = shallow_json(content)
    except json.JSONDecodeError as error:
        raise HTTPException(400, NO_OBJECT) from error
    except ValueError as error:  # no UTF-8, a number of thousands of digits, a field given twice
        raise HTTPException(400, f"There was an error parsing the body: {one_line(error)}.") from error
    if not isinstance(body, dict):
        raise HTTPException(400, NO_OBJECT)
    return body


async def _received(request: Request) -> bytes:
    """Return the bytes of a body. Raise HTTPException 413 as soon as there are too many."""
    too_long = HTTPException(413, f"The body is longer than {MOST_BYTES} bytes; shorten it.")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 18 or int(length) > MOST_BYTES):
        raise too_long
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MOST_BYTES:
            raise too_long
    return bytes(content)

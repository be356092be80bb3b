"""A second port that a replica of the application answers itself, without Serve's proxy in front.

    serve run serve.app:build run=RUN direct=8001

A request spares the way through the proxy's process, twice, and the fetching of its body from there. Routes, keys and
limits are the port's own. What the proxy does is not there: no other replica takes over from one that died, and
`ray_serve_num_http_requests` does not count. Replicas on one node share the port; on another node it is that node's.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple, Self

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from psyray.errors import PsyrayError

LOOPBACK = "127.0.0.1"
BACKLOG = 2048  # connections that wait to be taken, as in Serve's proxy


class Address(NamedTuple):
    """Where to listen."""

    host: str
    port: int

    @classmethod
    def parse(cls, words: str | int) -> Self:
        """Of PORT, on loopback, or HOST:PORT; ValueError for anything else."""
        host, colon, port = str(words).rpartition(":")
        if not port.isdecimal() or not 1 <= int(port) <= 65535 or bool(colon) != bool(host):
            raise ValueError("expected PORT, on loopback, or HOST:PORT")
        return cls(host.strip("[]") or LOOPBACK, int(port))


def listen(address: Address) -> socket.socket:
    """The port, taken; PsyrayError where it cannot be."""
    port = socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET)
    port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # by the replicas on one node
    try:
        port.bind(address)
        port.listen(BACKLOG)
    except OSError as error:
        port.close()
        raise PsyrayError(f"direct={address.host}:{address.port} cannot be listened at: {error.strerror}") from error
    return port


@asynccontextmanager
async def answering(app: ASGIApp, port: socket.socket, grace_s: float) -> AsyncIterator[None]:
    """Answer on the port; at the end take no more connections and give requests under way `grace_s` seconds."""
    config = uvicorn.Config(
        Attended(app), lifespan="off", ws="none", log_config=None, access_log=False, server_header=False,
        proxy_headers=False, timeout_graceful_shutdown=max(1, round(grace_s)),
    )  # fmt: skip
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[port]))
    yield
    server.should_exit = True
    await serving


class Attended:
    """ASGI middleware that ends the work on a request whose client has gone, as Serve's proxy does."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        messages = asyncio.Queue[Message](maxsize=1)

        async def attend() -> None:
            while (message := await receive())["type"] != "http.disconnect":
                await messages.put(message)

        attending = asyncio.create_task(attend())
        answered = asyncio.ensure_future(self.app(scope, messages.get, send))
        try:
            await asyncio.wait({attending, answered}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            attending.cancel()
            if not answered.done():
                answered.cancel()
        with suppress(asyncio.CancelledError):  # by the lines above: nobody is there to be told
            await answered

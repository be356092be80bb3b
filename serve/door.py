"""What a request's headers may be before Ray Serve's proxy reads them, which it does in front of every gate of ours.

The proxy decodes some headers as UTF-8 and answers 500, with the request's queue left behind, where they are not; and
it obeys others that lift the server's own time limit, keep abandoned work going, or choose a replica. Here such bytes
are a 400, and those orders never reach it; nor do questions for its routes, which it would answer without a key. The
environment variable `HOOK` (psyray/cluster.py), set where the proxy's process starts, has the proxy load this: it holds
for every Serve application of that Ray.
"""

from __future__ import annotations

import logging
import os
import re

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from psyray.cluster import HOOK, QUIET
from serve.refusals import openai_error

# For a load balancer of Serve's own, and for models or sessions that stick to a replica: nothing here uses them.
ORDERS = (
    "x-request-timeout-seconds",
    "x-request-disconnect-disabled",
    "x-session-id",
    os.environ.get("RAY_SERVE_SESSION_ID_HEADER_KEY", "x-session-id"),
    "serve-multiplexed-model-id",
)
HIDDEN = "/-/routes"  # every application's name and place; nothing of Ray's asks. Kubernetes asks /-/healthz
READ = b"x-request-id"  # decoded, kept in logs and sent back
_NAME = re.compile(rb"[!-~]+")
_VALUE = re.compile(rb"[\t -~]*")
_DROPPED = {name.lower().replace("_", "-").encode() for name in ORDERS}


class Door:
    """ASGI middleware around Serve's proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        if any(not readable(name, value) for name, value in scope["headers"]):
            refusal = openai_error(400, "a header that is read here is not in ASCII", "access")
            await refusal(scope, receive, send)  # to a WebSocket's handshake too
            return
        if scope["path"].removeprefix(scope.get("root_path", "")) == HIDDEN:
            await openai_error(404, "not found", "access")(scope, receive, send)
            return
        await self.app({**scope, "headers": passed_on(scope["headers"])}, receive, send)


def readable(name: bytes, value: bytes) -> bool:
    """Whether the proxy can read the header; values that it passes on unread may hold any letters."""
    return bool(_NAME.fullmatch(name)) and (name.lower() != READ or bool(_VALUE.fullmatch(value)))


def passed_on(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers without orders to the proxy."""
    return [(name, value) for name, value in headers if name.lower().replace(b"_", b"-") not in _DROPPED]


def middlewares() -> list[Middleware]:
    """What Serve's proxy asks for."""
    return [Middleware(Door)]


def put_up() -> None:
    """Have a Ray that this process starts load the door in its proxy, and report to nobody; what is set stays."""
    for variable, value in (QUIET | HOOK).items():
        os.environ.setdefault(variable, value)


def look() -> None:
    """Warn where the proxy, whose environment is this process's too, has no door."""
    for variable, path in HOOK.items():
        if os.environ.get(variable) != path:
            logging.getLogger("ray.serve").warning(
                "Ray was started without %s=%s: clients' headers reach Serve's proxy unexamined (docs/serving.md)",
                variable,
                path,
            )

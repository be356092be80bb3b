"""What the pages for people have in common: their own files and nobody else's, and what other origins may do: nothing.

A page is NAME.html and NAME.js in serve/assets, beside page.js, page.css and icon.svg, which are every page's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from psyray.active.database import LedgerError
from serve.access import Gate, Key, Limits
from serve.health import Health
from serve.refusals import invalid

ASSETS = Path(__file__).parent / "assets"
SHARED = ("page.js", "page.css", "icon.svg")


def open_paths(name: str) -> tuple[str, ...]:
    """What of a page is given without a key: it holds nothing of a client."""
    return ("", "/", f"/{name}.js", *(f"/{file}" for file in SHARED), "/healthz")


def page_router(name: str) -> APIRouter:
    """The routes of a page's files."""
    router = APIRouter()

    @router.get("/", include_in_schema=False)
    def index() -> FileResponse:
        return FileResponse(ASSETS / f"{name}.html")

    @router.get("/{file}", include_in_schema=False)
    def asset(file: str) -> FileResponse:
        if file not in (f"{name}.js", *SHARED):
            raise HTTPException(404)
        return FileResponse(ASSETS / file)

    return router


def page_app(
    title: str, name: str, routers: Sequence[APIRouter], keys: tuple[Key, ...], limits: Limits, health: Health
) -> FastAPI:
    """A page and its routes behind the gate: no CORS, so that no page of another origin may read what is said here."""
    app = FastAPI(title=title, docs_url=None, redoc_url=None)
    app.get("/healthz")(health.reply)
    for router in (*routers, page_router(name)):  # the page's own last: it takes every name that is left
        app.include_router(router)
    app.add_middleware(Gate, keys=keys, limits=limits, free=open_paths(name))
    app.add_middleware(Private)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(LedgerError, unavailable)
    return app


def asker(request: Request) -> str:
    """The name of the key that asks, as the gate found it."""
    return str(request.scope["psyray.key"])


async def unavailable(request: Request, error: Exception) -> JSONResponse:
    """503 for a ledger that does not answer."""
    logging.getLogger("ray.serve").error("%s", error)  # holds neither password nor row
    return JSONResponse({"detail": "the label ledger does not answer"}, 503, headers={"Retry-After": "5"})


class Private:
    """Sends headers that keep answers out of caches, other origins out of the page, and the page off other hosts."""

    POLICY = (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    HEADERS = (
        (b"cache-control", b"no-store"),
        (b"content-security-policy", POLICY.encode()),
        (b"cross-origin-opener-policy", b"same-origin"),
        (b"cross-origin-resource-policy", b"same-origin"),
        (b"referrer-policy", b"no-referrer"),
        (b"x-content-type-options", b"nosniff"),
    )

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *self.HEADERS]
            await send(message)

        await self.app(scope, receive, sending)

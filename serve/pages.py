"""What the pages for people have in common: their files, all from here, and what other origins may do: nothing.

A page is NAME.html and NAME.js in serve/assets, beside page.js, page.css, theme.js and icon.svg, which are every
page's, and Bootstrap's stylesheet, which the package Bootstrap-Flask carries. Of Bootstrap's scripts none is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from psyray.active.database import LedgerError
from psyray.errors import PsyrayError
from serve.access import Gate, Key, Limits
from serve.door import put_up
from serve.health import Health
from serve.parts import Part
from serve.refusals import invalid

ASSETS = Path(__file__).parent / "assets"
BOOTSTRAP = "bootstrap.min.css"
T = TypeVar("T")
SHARED = ("page.js", "page.css", "theme.js", "icon.svg", BOOTSTRAP)


def bootstrap() -> Path:
    """Bootstrap's stylesheet in its package, which is not imported: that would load Flask; PsyrayError without it."""
    package = find_spec("flask_bootstrap")
    folders = package.submodule_search_locations if package else None
    found = [path for folder in folders or () if (path := Path(folder, "static/bootstrap5/css", BOOTSTRAP)).is_file()]
    if not found:
        where = f"not in {folders[0]}" if folders else "not installed"
        raise PsyrayError(
            f"the pages need {BOOTSTRAP} of the package Bootstrap-Flask, which is {where}; see requirements/"
        )
    return found[0]


def open_paths(name: str) -> tuple[str, ...]:
    """What of a page is given without a key: it holds nothing of a client."""
    return ("", "/", f"/{name}.js", *(f"/{file}" for file in SHARED), "/healthz")


def page_router(name: str) -> APIRouter:
    """The routes of a page's files."""
    router, page = APIRouter(), Part.read(ASSETS / f"{name}.html")
    paths = {file: ASSETS / file for file in (f"{name}.js", *SHARED)} | {BOOTSTRAP: bootstrap()}
    parts = {file: Part.read(path) for file, path in paths.items()}

    @router.get("/", include_in_schema=False)
    def index(request: Request) -> Response:
        return page.reply(request, "no-store")

    @router.get("/{file}", include_in_schema=False)
    def part(request: Request, file: str) -> Response:
        if file not in parts:
            raise HTTPException(404)
        return parts[file].reply(request, "no-cache")  # kept, but asked about: a page never has an older version's

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
    """Sends headers that keep answers out of caches (unless one says otherwise), other origins out of the page, and the
    page off other hosts."""

    POLICY = (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; "  # Bootstrap's ticks and arrows are in its stylesheet
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
                said = dict(message.get("headers", []))
                missing = [(name, value) for name, value in self.HEADERS if name not in said]
                message["headers"] = [*message.get("headers", []), *missing]
            await send(message)

        await self.app(scope, receive, sending)


class Page:
    """The deployment of a page, whose application is made where it runs: there the ledger is opened."""

    def __init__(self, make: Callable[[Any], FastAPI], needs: Any) -> None:
        self.make, self.needs = make, needs  # `app` is the name of Serve's own property

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self.make(self.needs)


def deployed(name: str, app: Callable[[T], FastAPI], needs: Callable[[], T]) -> Any:
    """The Serve application of a page, of what `needs` finds; PsyrayError says what is wrong before Ray is there."""
    put_up()
    bootstrap()  # a missing one is told here, not by a replica that does not start
    found = needs()
    from ray import serve  # takes seconds: a mistake above is told at once, and the page itself needs no Ray

    # One replica: what a person has before them may be in its memory alone.
    options = {"num_replicas": 1, "max_ongoing_requests": 100, "ray_actor_options": {"num_cpus": 0}}
    return serve.deployment(serve.ingress()(Page), name=name, **options).bind(app, found)

"""A stand-in for a server of this project whose answer takes twelve seconds: `PORT=PORT serve run slow_app:build`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.config import HTTPOptions
from starlette.responses import StreamingResponse

from serve.door import put_up
from serve.mistakes import in_one_line

# `serve run` has no word for the port, and the usual one may be taken.
HTTPOptions.model_fields["port"].default = int(os.environ["PORT"])
HTTPOptions.model_rebuild(force=True)


class Slow:
    def __serve_build_asgi_app__(self) -> FastAPI:
        app = FastAPI()
        app.get("/")(lambda: StreamingResponse(pieces()))
        app.get("/healthz")(lambda: "ok")
        return app


async def pieces() -> AsyncIterator[str]:
    for _ in range(24):
        yield "word "
        await asyncio.sleep(0.5)
    yield "[DONE]"


@in_one_line
def build(args: dict[str, str]) -> Any:
    put_up()
    return serve.deployment(serve.ingress()(Slow), ray_actor_options={"num_cpus": 0}).bind()

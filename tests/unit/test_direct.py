"""The port that the application answers itself: who answers, clients that go away, and how it ends."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from psyray.errors import PsyrayError
from serve.direct import Address, answering, listen
from serve.request import free_port

ASK = b"POST /slow HTTP/1.1\r\nHost: here\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello"


class MadeApp:
    """A stand-in for the application: reads a body, waits until it may, and says the body back."""

    def __init__(self) -> None:
        self.begun, self.may = asyncio.Event(), asyncio.Event()
        self.cancelled = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        self.begun.set()
        try:
            await self.may.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": body})


async def asking(address: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(ASK)
    await writer.drain()
    return reader, writer


def run(scene: Any) -> None:
    async def whole() -> None:
        app, address = MadeApp(), Address("127.0.0.1", free_port())
        await asyncio.wait_for(scene(app, address), 20)

    asyncio.run(whole())


def test_the_application_answers_there_and_the_port_is_free_afterwards() -> None:
    async def scene(app: MadeApp, address: Address) -> None:
        app.may.set()
        async with answering(app, listen(address), 5):
            reader, _ = await asking(address)
            answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"\r\n\r\nhello")
        assert b"server:" not in answer.lower()
        with pytest.raises(OSError):
            await asyncio.open_connection(*address)

    run(scene)


def test_work_for_a_client_that_has_gone_is_ended() -> None:
    async def scene(app: MadeApp, address: Address) -> None:
        async with answering(app, listen(address), 5):
            _, writer = await asking(address)
            await app.begun.wait()
            writer.close()
            await app.cancelled.wait()

    run(scene)


def test_the_end_waits_for_what_is_under_way() -> None:
    async def scene(app: MadeApp, address: Address) -> None:
        async with answering(app, listen(address), 10):
            reader, _ = await asking(address)
            await app.begun.wait()
            asyncio.get_running_loop().call_later(0.3, app.may.set)
        assert (await reader.read()).endswith(b"hello")

    run(scene)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:  # without SO_REUSEPORT, as any other program's
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PsyrayError, match=rf"direct=127\.0\.0\.1:{port} cannot be listened at"):
            listen(Address("127.0.0.1", port))


def test_addresses() -> None:
    assert Address.parse(8001) == Address.parse("8001") == ("127.0.0.1", 8001)
    assert Address.parse("0.0.0.0:80") == ("0.0.0.0", 80) and Address.parse("[::1]:80") == ("::1", 80)
    for wrong in ("", "x", "0", "70000", ":80", "here:", "1.2.3.4"):
        with pytest.raises(ValueError, match="PORT"):
            Address.parse(wrong)

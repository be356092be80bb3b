"""A served run as a client sees it: words as they come, and a name for each way in which a server fails."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest
from threaded import running
from two_policies import POLICIES, SAID, TOKEN, stand_in

from serve.endpoint import Endpoint, NoAnswer

CLIENT = [{"role": "user", "content": "My sister moved abroad."}]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    policies = stand_in()
    policies.state.fails.add(POLICIES[0])
    with running(policies) as url:
        yield Endpoint(url, TOKEN, 20)


async def said(endpoint: Endpoint, model: str) -> list[str]:
    return [piece.text async for piece in endpoint.answer(model, CLIENT)]


def test_words_come_one_by_one(endpoint: Endpoint) -> None:
    pieces = asyncio.run(said(endpoint, POLICIES[1]))
    assert len(pieces) > 5 and "".join(pieces) == SAID[POLICIES[1]][0]
    assert asyncio.run(endpoint.names()) == list(POLICIES)
    assert asyncio.run(endpoint.scores(CLIENT, ["x" * 50]))[0]["score"] == 1.0


def test_each_failure_says_how_and_never_what_was_said(endpoint: Endpoint) -> None:
    nobody = replace(endpoint, url="http://127.0.0.1:9")
    for asked, model, words in (
        (endpoint, POLICIES[0], "it broke off"),
        (endpoint, "other", "it answered 404"),
        (replace(endpoint, token="wrong"), POLICIES[1], "it answered 401"),
        (nobody, POLICIES[1], "ClientConnectorError"),
        (replace(endpoint, timeout_s=0.02), POLICIES[1], "TimeoutError"),
    ):
        with pytest.raises(NoAnswer) as error:
            asyncio.run(said(asked, model))
        assert words in str(error.value) and "sister" not in str(error.value)
    with pytest.raises(NoAnswer, match="ClientConnectorError"):
        asyncio.run(nobody.names())
    with pytest.raises(NoAnswer, match="not what was expected"):
        asyncio.run(endpoint._json("GET", "/v1/models", None, lambda said: said["scores"]))

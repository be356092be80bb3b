"""What passes the door in front of Ray Serve's proxy, and who puts it up."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve._private.http_util import (
    parse_disconnect_disabled_header,
    parse_request_timeout_header,
    validate_http_proxy_callback_return,
)
from ray.serve._private.proxy import _matches_session_id_header
from ray.serve._private.proxy_request_response import ASGIProxyRequest

from psyray.cluster import HOOK
from serve.door import Door, look, middlewares, put_up

ROOT = Path(__file__).parents[2]
(VARIABLE,) = HOOK
Headers = list[tuple[bytes, bytes]]


def passed(headers: Headers, path: str = "/", root: str = "") -> tuple[int, Headers]:
    """The status of the answer, and the headers that a stand-in for the proxy saw."""
    seen: Headers = []
    sent: list[Any] = []

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(scope["headers"])
        await send({"type": "http.response.start", "status": 200})

    async def send(message: Any) -> None:
        sent.append(message)

    lower = [(name.lower(), value) for name, value in headers]  # as uvicorn gives them
    scope = {"type": "http", "method": "GET", "path": path, "root_path": root, "headers": lower}
    asyncio.run(Door(proxy)(scope, None, send))  # type: ignore[arg-type]
    return sent[0]["status"], seen


@pytest.mark.parametrize(
    "header",
    [(b"X-Request-Id", b"\xff"), (b"x-request-id", b"\xc3\xa9"), (b"X-\xff", b"b"), (b"X-\xc3\xa9", b"b")],
    ids=str,
)
def test_what_the_proxy_could_not_read_is_a_400(header: tuple[bytes, bytes]) -> None:
    status, seen = passed([(b"X-Request-Id", b"fine"), header])
    assert status == 400 and seen == []


@pytest.mark.parametrize("value", [b"0", b"?1", b"\xff", b"9999"])
def test_orders_to_the_proxy_do_not_reach_it(value: bytes) -> None:
    names = (
        b"X-Request-Timeout-Seconds", b"x-request-disconnect-disabled", b"X-Session-Id", b"x_session_id",
        b"serve_multiplexed_model_id", b"Serve-Multiplexed-Model-Id",
    )  # fmt: skip
    status, seen = passed([(name, value) for name in names])
    assert status == 200
    assert parse_request_timeout_header(dict(seen), 600.0) == 600 and not parse_disconnect_disabled_header(dict(seen))
    assert not any(_matches_session_id_header(name.decode()) or b"multiplexed" in name for name, _ in seen)


def test_other_headers_pass_as_they_are() -> None:
    given = [(b"x-request-id", b"client's own"), (b"accept-language", b"\xff"), (b"authorization", b"Bearer \xfe")]
    status, seen = passed(given)
    assert status == 200 and seen == given


@pytest.mark.parametrize(
    ("path", "root", "status"),
    [("/-/routes", "", 404), ("/under/-/routes", "/under", 404), ("/-/healthz", "", 200), ("/v1/models", "", 200)],
)
def test_the_proxys_routes_are_nobodys_to_know(path: str, root: str, status: int) -> None:
    """By the proxy's own reading of the path."""
    scope = {"type": "http", "path": path, "root_path": root}
    assert ASGIProxyRequest(scope, None, None).is_route_request == (status == 404)  # type: ignore[arg-type]
    got, seen = passed([(b"accept", b"*/*")], path, root)
    assert got == status and bool(seen) == (status == 200)


def test_serves_proxy_takes_the_hook() -> None:
    assert validate_http_proxy_callback_return(middlewares())[0].cls is Door
    module, _, name = HOOK[VARIABLE].partition(":")
    assert getattr(__import__(module, fromlist=[name]), name) is middlewares


def test_a_ray_that_is_started_here_has_it_and_one_without_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    look()
    assert VARIABLE in caplog.text
    caplog.clear()
    put_up()
    look()
    assert os.environ[VARIABLE] == HOOK[VARIABLE] and not caplog.records
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"  # Ray would tell its makers
    monkeypatch.setenv(VARIABLE, "another:hook")
    put_up()
    look()
    assert os.environ[VARIABLE] == "another:hook" and caplog.records


def test_every_file_for_clusters_puts_it_up() -> None:
    assert (
        f"-e {VARIABLE}={HOOK[VARIABLE]}"
        in yaml.safe_load((ROOT / "cluster.yaml").read_text())["docker"]["run_options"]
    )
    for file in ("raycluster", "rayjob", "rayservice"):
        text = (ROOT / f"configs/kuberay/{file}.yaml").read_text()
        assert f"{{name: {VARIABLE}, value: {HOOK[VARIABLE]}}}" in text.replace('"', "")
    for served in (
        yaml.safe_load((ROOT / "configs/serve.yaml").read_text()),
        yaml.safe_load(yaml.safe_load((ROOT / "configs/kuberay/rayservice.yaml").read_text())["spec"]["serveConfigV2"]),
    ):
        assert served["controller_options"] == {"runtime_env": {"env_vars": HOOK}}

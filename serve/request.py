"""Serve a finished run for the length of one question: the last step of the demo, over real HTTP."""

from __future__ import annotations

import json
import logging
import secrets
import socket
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import serve

from psyray.errors import PsyrayError
from psyray.records import Message, client_words
from psyray.run import read_stages
from serve.app import build
from serve.bring_up import LOGGING, why

APP = "psyray"
HOST = "127.0.0.1"
REQUEST_S = 180.0
_POLL_S, _SAY_EVERY_S = 1.0, 15.0
_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")

Say = Callable[[str], None]


def serve_once(run: Path) -> dict[str, Any]:
    """Serve the run in the current Ray, ask its first held-out speech, score the answer, and shut Serve down again.

    Returns {question, answer, score, spread, seconds}; seconds are those from the question to its score, without
    the start. PsyrayError where Ray is not up, Serve is in use already, the engine fails, or time runs out.
    """
    messages = held_out(run)
    token = secrets.token_hex(24)  # the port is open to the whole machine meanwhile
    with tempfile.TemporaryDirectory() as place:
        keys = Path(place) / "keys"
        keys.write_text(f"once chat,score {token}\n")
        with serving({"run": str(run), "keys": str(keys)}) as url:
            return ask(url, messages, REQUEST_S, token)


def held_out(run: Path) -> list[Message]:
    """The first held-out speech of the run, one without a crisis if there is any; PsyrayError where it has none."""
    stages = [stage for stage in read_stages(run) if stage.name == "speeches"]
    speeches = [row for stage in stages for row in stage.rows() if row["split"] == "test"]
    if not speeches:
        raise PsyrayError(f"the run at {run} has no held-out speech to ask; raise speeches.test_share")
    return list(min(speeches, key=lambda row: bool(row["crisis"]))["messages"])


@contextmanager
def serving(args: Mapping[str, str], *, say: Say = print, start_timeout_s: float = 600) -> Iterator[str]:
    """The address of `serve.app:build` with `args` on a free port of loopback; Serve is shut down at the end."""
    if not ray.is_initialized():
        raise PsyrayError("serving needs a running Ray session; else use `serve run serve.app:build run=RUN`")
    if serve.status().applications:
        raise PsyrayError("Ray Serve is in use on this cluster; end it with `serve shutdown`, or ask its own port")
    for logger in ("ray.serve", "ray.llm"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    application = build(dict(args))
    port = free_port()
    try:
        serve.start(
            http_options={"host": HOST, "port": port},
            proxy_location="HeadOnly",
            logging_config=LOGGING,
        )
        target = serve.RunTarget(application, APP, "/", LOGGING)
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        wait_until_running(start_timeout_s, say)
        yield f"http://{HOST}:{port}"
    finally:
        serve.shutdown()


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def wait_until_running(timeout_s: float, say: Say) -> None:
    """Return when the application answers; PsyrayError with Serve's own message when it fails or time runs out."""
    started = said = time.monotonic()
    say("serve: the engine starts (about a minute on CPU)")
    while True:
        application = serve.status().applications.get(APP)
        state = str(application.status.value) if application else "STARTING"
        if state == "RUNNING":
            say(f"serve: ready after {time.monotonic() - started:.0f} s")
            return
        if application and state in _FAILED:
            raise PsyrayError(f"serve: the run could not be served: {why(application)}")
        if time.monotonic() - started > timeout_s:
            raise PsyrayError(f"serve: not ready after {timeout_s:.0f} s: {why(application) if application else state}")
        if time.monotonic() - said > _SAY_EVERY_S:
            said = time.monotonic()
            say(f"serve: still starting, {said - started:.0f} s")
        time.sleep(_POLL_S)


def ask(url: str, messages: Sequence[Message], timeout_s: float, token: str) -> dict[str, Any]:
    """One chat request and the score of its answer, from a server of `serve.app`."""
    started = time.monotonic()
    chat = post(f"{url}/v1/chat/completions", {"messages": list(messages)}, timeout_s, token)
    answer = chat["choices"][0]["message"]["content"]
    if not (answer or "").strip():
        raise PsyrayError("serve: the policy gave an empty answer, so there is nothing to score")
    item = {"messages": list(messages), "response": answer}
    scored = post(f"{url}/reward/score", {"items": [item]}, timeout_s, token)["scores"][0]
    return {
        "question": client_words(messages),
        "answer": answer,
        "score": scored["score"],
        "spread": scored["spread"],
        "seconds": round(time.monotonic() - started, 2),
    }


def post(url: str, body: Mapping[str, Any], timeout_s: float, token: str) -> dict[str, Any]:
    """The JSON answer to a JSON request; PsyrayError names the address and the server's own words."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    # A proxy from the environment must not come between two ends on one machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_s) as reply:
            answer: dict[str, Any] = json.load(reply)
            return answer
    except urllib.error.HTTPError as error:
        raise PsyrayError(f"{url} answered {error.code}: {error.read().decode(errors='replace')[:500]}") from error
    except (OSError, ValueError) as error:  # no connection, time out, or no JSON
        raise PsyrayError(f"{url} did not answer: {error}") from error

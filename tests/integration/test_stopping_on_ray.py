"""SIGTERM, by which `docker stop`, systemd and Kubernetes end `serve run`, cuts no answer short."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from serve.request import free_port

HERE = Path(__file__).parent


def asked(port: int, path: str) -> http.client.HTTPResponse | None:
    """The reply as soon as it begins; none while nobody listens."""
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        line.request("GET", path)
        return line.getresponse()
    except ConnectionError:
        return None


def test_answers_under_way_are_given_and_no_new_ones(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    words = [str(Path(sys.executable).parent / "serve"), "run", "slow_app:build"]
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))  # of Ray's workers too
    environment = os.environ | {"PORT": str(port), "RAY_ADDRESS": "local", "PYTHONPATH": path}
    environment["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "120"  # after 5 s Serve gives a busy machine's proxy up
    with log.open("wb") as out:
        server = subprocess.Popen(words, env=environment, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 180
        while not (up := asked(port, "/healthz")) or up.status != 200:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        answer = asked(port, "/")
        assert answer and answer.read(5) == b"word "
        server.send_signal(signal.SIGTERM)
        while (late := asked(port, "/healthz")) and late.status == 200:
            time.sleep(0.1)
        assert late and late.status == 404  # the answer under way still has the port open
        assert answer.read() == b"word " * 23 + b"[DONE]"
        assert server.wait(60) == 0
    finally:
        if server.poll() is None:
            server.kill()

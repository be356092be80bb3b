"""`serve deploy configs/serve.yaml` as an operator gives it, to a Ray that asks for a token: nothing else is set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from held_ray import held_ray
from made_exports import save_run

from serve.request import free_port

ROOT = Path(__file__).parents[2]
LIMIT_S = 480  # a busy machine takes long to import the engine


def asked(url: str, body: Any = None) -> tuple[int, str]:
    data, kind = json.dumps(body).encode() if body else None, {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, kind), timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except (urllib.error.URLError, TimeoutError) as error:  # nobody listens, or answers, yet
        return 0, str(error)


def test_the_file_is_deployed_as_it_stands_and_answers(tmp_path: Path) -> None:
    save_run(tmp_path / "runs/demo", 1, "3f2a9c0e1b77")
    port = free_port()
    text = (ROOT / "configs/serve.yaml").read_text()
    assert "\n  port: 8000\n" in text
    (tmp_path / "serve.yaml").write_text(text.replace("\n  port: 8000\n", f"\n  port: {port}\n"))  # which may be taken
    with held_ray({"PSYRAY_HOME": str(tmp_path)}) as (dashboard, token):
        words = [str(Path(sys.executable).parent / "serve"), "deploy", str(tmp_path / "serve.yaml"), "-a", dashboard]
        environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        deadline = time.monotonic() + LIMIT_S
        while (done := subprocess.run(words, env=environment, capture_output=True, text=True)).returncode:
            assert time.monotonic() < deadline, done.stderr  # the dashboard answers before its agent is there
            time.sleep(1)
        url = f"http://127.0.0.1:{port}"
        while asked(f"{url}/healthz")[0] != 200:
            assert time.monotonic() < deadline
            time.sleep(1)
        client = {"role": "user", "content": "I keep putting off calling my sister."}
        status, text = asked(f"{url}/v1/chat/completions", {"messages": [client], "stream": True})
        assert status == 200 and text.endswith("data: [DONE]\n\n")
        status, text = asked(f"{url}/v1/chat/best", {"messages": [client], "of": 2, "temperature": 1.5})
        assert status == 200 and json.loads(text)["best_of"]["by"] == "psyray-reward"
        assert asked(f"{url}/-/routes")[0] == 404  # the door, which the file puts up

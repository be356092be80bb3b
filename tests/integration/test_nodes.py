"""A stage on three nodes of which one dies under it: what the dry run says of them, and every row once in the end."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from endpoint import served

from psyray.run import read_stages

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
SPEECHES, K, LIMIT_S = 40, 2, 150


@dataclass(frozen=True)
class Nodes:
    """The cluster of three_nodes.py, and the environment in which its address is reached."""

    process: subprocess.Popen[str]
    address: str
    environment: dict[str, str]

    def lose(self, title: str) -> str:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{title}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


@pytest.fixture
def three_nodes() -> Iterator[Nodes]:
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command, pipe = [sys.executable, str(HERE / "three_nodes.py")], subprocess.PIPE
    process = subprocess.Popen(command, env=environment, text=True, stdin=pipe, stdout=pipe)
    assert process.stdout
    try:
        address = next(line for line in process.stdout if line.startswith("address ")).split()[1]
        yield Nodes(process, address, environment)
    finally:
        process.communicate(timeout=60)


def test_a_stage_that_loses_the_node_it_works_on_ends_with_every_row_once(
    three_nodes: Nodes, tmp_path: Path, tiny_model: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    with served(lambda model, prompt: "I hear you.", latency=0.25) as endpoint:
        responder = {"name": "a", "model": "any", "endpoint": {"url": endpoint.url, "concurrency": 2}}
        settings = [
            f"speeches.limit={SPEECHES}", f"responses.k={K}", f"responses.responders={json.dumps([responder])}",
            f"reward.model={tiny_model}", f"policy.model={tiny_model}",
            "reward.train.freeze_layers=0", "dpo.train.freeze_layers=0", f"run.path={run}", "engine.replicas=7",
            f"cluster.address={three_nodes.address}", "--until", "responses",
        ]  # fmt: skip
        words = [sys.executable, "-m", "psyray", "run", str(ROOT / "configs/demo.yaml"), *settings]
        plan = subprocess.run(
            [*words, "--dry-run"], env=three_nodes.environment | {"COLUMNS": "200"}, capture_output=True, text=True
        )
        assert plan.returncode == 0, plan.stderr
        assert f"cluster: the Ray at {three_nodes.address}, 4 nodes" in plan.stdout
        rooms = {
            line.split("│")[1].strip(): line.split("│")[4].strip() for line in plan.stdout.splitlines() if "│" in line
        }
        assert rooms["responses"] == "yes"  # no node but the three has a CPU
        assert rooms["round-N/samples"] == "lacks 7.25 CPU (has 6)"

        with log.open("w") as out:
            process = subprocess.Popen(words, env=three_nodes.environment, stdout=out, stderr=out)
        deadline = time.monotonic() + LIMIT_S
        while endpoint.calls["any"].total() < 8 or not any(run.rglob("responses/*/part-*.parquet")):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
        title = "HttpGenerator"  # the one process that asks, wherever it was put
        assert three_nodes.lose(title) == f"lost {title}"
        assert endpoint.calls["any"].total() < SPEECHES * K - 8
        assert process.wait(LIMIT_S) == 0, log.read_text()[-3000:]
    assert "Traceback" not in log.read_text()
    responses = read_stages(run)[-1]
    ids = [row["response_id"] for row in responses.rows()]
    assert responses.name == "responses" and len(set(ids)) == len(ids) == SPEECHES * K
    assert responses.stats["ok"] == SPEECHES * K
    assert endpoint.calls["any"].total() <= SPEECHES * K + 8  # asked twice: what was under way on that node

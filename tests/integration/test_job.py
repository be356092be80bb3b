"""A stage as a Ray job through a job server that asks for a token: stopped, submitted again, ended without a loss."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from endpoint import Endpoint, served
from held_ray import held_ray

from psyray.run import read_stages
from psyray.status import driver, ended, stage_lines

ROOT = Path(__file__).parents[2]
SPEECHES, K, LIMIT_S = 30, 2, 180


@pytest.fixture
def ray_with_token() -> Iterator[tuple[str, str]]:
    """(dashboard, token) of a Ray that gives a stopped job the time that configs/kuberay gives it."""
    with held_ray({"RAY_JOB_STOP_WAIT_TIME_S": "60"}) as found:
        yield found


RUN, PIPELINE = "-m psyray run", "jobs/pipeline.py"  # the two ways in, which are one


def submit(client: Any, way: str, home: Path, model: Path, endpoint: Endpoint) -> str:
    """Hand the stages up to `responses` to the cluster, with jobs/runtime-env.yaml."""
    responders = [
        {"name": name, "model": "any", "endpoint": {"url": endpoint.url, "concurrency": 4}} for name in ("a", "b")
    ]
    settings = [
        f"speeches.limit={SPEECHES}", f"responses.k={K}", f"responses.responders={json.dumps(responders)}",
        f"reward.model={model}", f"policy.model={model}",
        "reward.train.freeze_layers=0", "dpo.train.freeze_layers=0", "run.path=job",
    ]  # fmt: skip
    words = [sys.executable, *way.split(), "configs/demo.yaml", *settings, "--until", "responses"]
    environment = yaml.safe_load((ROOT / "jobs/runtime-env.yaml").read_text())
    environment |= {"working_dir": str(ROOT), "env_vars": {"PSYRAY_HOME": str(home)}}
    deadline = time.monotonic() + LIMIT_S
    while True:
        try:
            return str(client.submit_job(entrypoint=shlex.join(words), runtime_env=environment))
        except RuntimeError as error:  # the dashboard answers before the agent that starts jobs is there
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(1)


def wait(client: Any, job: str, until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not until():
        assert time.monotonic() < deadline, client.get_job_logs(job)[-3000:]
        time.sleep(0.2)


def test_a_stopped_job_says_so_and_the_next_one_goes_on(
    ray_with_token: tuple[str, str], tmp_path: Path, tiny_model: Path
) -> None:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    dashboard, token = ray_with_token
    for wrong in ({}, {"Authorization": "Bearer " + token[::-1]}):
        with pytest.raises(AuthenticationError):
            JobSubmissionClient(dashboard, headers=wrong)
    client = JobSubmissionClient(dashboard, headers={"Authorization": f"Bearer {token}"})
    run = tmp_path / "job"
    with served(lambda model, prompt: "I hear you.", latency=0.5) as endpoint:
        job = submit(client, RUN, tmp_path, tiny_model, endpoint)
        wait(client, job, lambda: endpoint.calls["any"].total() >= 12 and any(run.rglob("responses/*/part-*.parquet")))
        client.stop_job(job)
        wait(client, job, lambda: client.get_job_status(job).is_terminal() and not driver(run)[1])
        assert client.get_job_status(job) == "STOPPED"
        logs = client.get_job_logs(job)
        assert "stopped; nothing is lost" in logs and "Traceback" not in logs
        assert ended(run, "stopped") and stage_lines(run)[1].state == "stopped"

        again = submit(client, PIPELINE, tmp_path, tiny_model, endpoint)
        wait(client, again, lambda: client.get_job_status(again).is_terminal())
        assert client.get_job_status(again) == "SUCCEEDED", client.get_job_logs(again)[-3000:]
        assert "speeches: done before" in client.get_job_logs(again)
    stages = read_stages(run)
    assert [stage.name for stage in stages] == ["speeches", "responses"] and not ended(run, "stopped")
    rows = stages[-1].rows()
    assert len({row["response_id"] for row in rows}) == len(rows) == SPEECHES * K
    # Asked twice is only what was under way when the job was stopped.
    assert endpoint.calls["any"].total() <= SPEECHES * K + 8

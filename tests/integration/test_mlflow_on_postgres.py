"""`mlflow server` on a real PostgreSQL, as docs/operator.md starts it: runs, the registry, promotion and lineage."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from made_run import MadeRun
from postgres_server import free_port, missing, postgres, promised
from typer.testing import CliRunner

from psyray.cli import app
from psyray.mlflow_client import registry
from psyray.pipeline import keep_report
from psyray.run import Artifact
from psyray.sections.place import TrackSection
from psyray.track import Tracker

HOST = "mlflow.study.example"  # the name that nodes know the server by
WRITERS = 8


@dataclass(frozen=True)
class Server:
    """A server at work: its port of loopback, and where it keeps files."""

    port: int
    artifacts: Path

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def status(self, host: str) -> int:
        """What a request gets that names the server so."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        ask = "/api/2.0/mlflow/experiments/search?max_results=1"
        connection.request("GET", ask, headers={"Host": f"{host}:{self.port}"})
        found = connection.getresponse().status
        connection.close()
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if lacking := missing():
        (pytest.fail if promised() else pytest.skip)(lacking)
    folder = tmp_path_factory.mktemp("mlflow")
    made = Server(free_port(), folder / "artifacts")
    with postgres() as database, (folder / "log").open("w") as log:
        places = ["--backend-store-uri", database, "--artifacts-destination", str(made.artifacts)]
        hosts = ["--port", str(made.port), "--allowed-hosts", f"{HOST}:*,127.0.0.1:*", "--workers", "1"]
        command = [sys.executable, "-m", "mlflow", "server", *places, *hosts]
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        try:
            wait_until_up(made, process, folder / "log")
            yield made
        finally:
            process.terminate()
            process.wait(30)


def wait_until_up(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            assert server.status(HOST) == 200
            return
        except OSError:  # nobody listens yet
            time.sleep(0.2)
    pytest.fail(f"mlflow server did not start: {log.read_text()[-2000:]}")


@pytest.fixture
def home(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "5")  # threads that set them shortly and together leave what another had set
    return tmp_path


def psyray(*words: str) -> str:
    done = CliRunner().invoke(app, [*words])
    assert done.exit_code == 0, done.output
    return done.output


def test_a_run_is_logged_registered_promoted_and_traced_back(server: Server, home: Path) -> None:
    exports = []
    for rounds, name in ((1, "first"), (2, "second")):
        made = MadeRun(home / name, rounds=rounds)
        with Tracker(TrackSection(), home / name, made.config, say=lambda line: None) as tracker:
            made.run.on_stage = tracker.stage
            export = next(stage for stage in made.make() if stage.name == "export")
            keep_report(tracker, home / name)
            tags = {"run": str(home / name), "round": "1", "fingerprint": export.fingerprint}
            for model in ("psyray-policy", "psyray-reward"):
                tracker.register(model, export.path / "model", alias="champion", tags=tags)
        exports.append(export)

    with registry(server.uri) as client:
        kept = json.loads((home / "first/mlflow.json").read_text())
        parent = client.get_run(kept["run_id"])
        assert parent.info.status == "FINISHED" and parent.data.metrics["gate/win_rate"] == 0.5625
        assert len(kept["stages"]) == len({*kept["stages"].values()}) == 21
        assert {a.path for a in client.list_artifacts(kept["run_id"])} == {"config.yaml", "report.html"}
        uploaded = client.list_artifacts(kept["stages"][exports[0].fingerprint], f"models/{exports[0].fingerprint}")
        assert [a.path.rpartition("/")[2] for a in uploaded] == ["config.json"]
    assert list(server.artifacts.rglob("report.html"))  # through the server: a node needs no path to them

    def champion() -> str:
        return str(json.loads(psyray("lineage", "psyray-policy@champion", "--runs", str(home), "--json"))["run"])

    assert champion() == str(home / "second")
    assert "psyray-policy: version 1 is champion" in psyray("promote", str(home / "first"), "--runs", str(home))
    assert champion() == str(home / "first")


def test_eight_runs_that_write_at_once_lose_and_double_nothing(server: Server, home: Path) -> None:
    def write(place: int) -> str:
        run = home / f"run-{place}"
        with Tracker(TrackSection(experiment="at once"), run, {"place": place}, say=lambda line: None) as tracker:
            for step in range(3):
                tracker.stage(stage(run, f"{place:08d}{step:08d}", step))
            model = run / "model"
            model.mkdir()
            (model / "config.json").write_text(str(place))
            return tracker.register("at-once", model, tags={"fingerprint": f"{place:016d}"})

    with ThreadPoolExecutor(WRITERS) as pool:
        versions = list(pool.map(write, range(WRITERS)))
    assert sorted(map(int, versions)) == list(range(1, WRITERS + 1))
    with registry(server.uri) as client:
        runs = client.search_runs([client.get_experiment_by_name("at once").experiment_id])
    assert len(runs) == WRITERS * (1 + 3)
    steps = sorted(run.data.metrics["loss"] for run in runs if "psyray.stage" in run.data.tags)
    assert steps == sorted(float(step) for step in range(3) for _ in range(WRITERS))


def stage(run: Path, fingerprint: str, loss: float) -> Artifact:
    finished, stats = "2026-01-01T00:00:00+00:00", {"loss": loss}
    manifest: dict[str, Any] = {"seconds": 1, "stats": stats, "rows": 0, "files": [], "config": {}}
    return Artifact("policy", run, fingerprint, manifest | {"finished": finished})


def test_a_host_that_is_not_allowed_is_turned_away(server: Server) -> None:
    assert (server.status(HOST), server.status("127.0.0.1")) == (200, 200)
    assert (server.status("other.example"), server.status("localhost")) == (403, 403)  # the list is all there is

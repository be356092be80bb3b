"""MLflow on SQLite: what is logged, that a second pass adds nothing, and that no client text or secret gets there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_run import CRISIS, HOSTILE, SECRET_KEY, MadeRun

from psyray import track
from psyray.addresses import redact
from psyray.errors import PsyrayError
from psyray.mlflow_client import alone
from psyray.pipeline import keep_report
from psyray.run import Artifact
from psyray.sections.place import TrackSection
from psyray.track import Tracker

import mlflow  # isort: skip  (psyray.mlflow_client goes first: it switches telemetry off before MLflow is imported)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables made: seconds, so once."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def home(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for runs, with such a database beside them."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[tuple[Path, Any, list[str]]]:
    """A tracked run of one round: its folder, a client, and what was said."""
    home = tmp_path_factory.mktemp("runs")
    shutil.copy(empty_database, home / "mlflow.db")
    said: list[str] = []
    made = MadeRun(home / "run", rounds=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with tracker(home, made.config, said) as open_tracker:
            made.run.on_stage = open_tracker.stage
            made.make()
            keep_report(open_tracker, home / "run")
    yield home / "run", client(home), said


def tracker(home: Path, config: Any, said: list[str] | None = None, **section: Any) -> Tracker:
    return Tracker(TrackSection(**section), home / "run", config, say=(said if said is not None else []).append)


def client(home: Path) -> Any:
    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")


def kept(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "mlflow.json").read_text()))


def nested(client: Any, run: Path, stage: str) -> Any:
    parent = kept(run)["run_id"]
    experiment = client.get_run(parent).info.experiment_id
    query = f"tags.`mlflow.parentRunId` = '{parent}' and tags.`psyray.stage` = '{stage}'"
    [found] = client.search_runs([experiment], query)
    return found


def all_runs(client: Any) -> list[Any]:
    return list(client.search_runs([e.experiment_id for e in client.search_experiments()]))


def model_folder(path: Path, weights: str = "1") -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_text(weights)
    return path


def test_one_run_with_one_nested_run_per_stage(tracked: tuple[Path, Any, list[str]]) -> None:
    run, mlflow_client, _ = tracked
    parent = mlflow_client.get_run(kept(run)["run_id"])
    assert parent.info.status == "FINISHED" and parent.info.run_name == "run"
    assert len(kept(run)["stages"]) == 21 and len(all_runs(mlflow_client)) == 22
    gate = nested(mlflow_client, run, "round-1/gate")
    assert gate.info.run_name == "round-1/gate" and gate.info.status == "FINISHED"
    assert gate.data.tags["psyray.round"] == "1"
    assert gate.data.metrics["win_rate"] == 0.5625 and gate.data.metrics["passed"] == 1.0
    assert gate.data.metrics["principles/empathy"] == pytest.approx(2.6)
    assert nested(mlflow_client, run, "speeches").data.metrics["dropped/too short"] == 3


def test_training_curves_have_their_steps(tracked: tuple[Path, Any, list[str]]) -> None:
    run, mlflow_client, _ = tracked
    reward = nested(mlflow_client, run, "reward").info.run_id
    history = mlflow_client.get_metric_history(reward, "loss")
    assert sorted((m.step, round(m.value, 2)) for m in history) == [(n, round(0.7 - 0.02 * n, 2)) for n in range(1, 9)]
    policy = nested(mlflow_client, run, "round-1/policy").info.run_id
    assert len(mlflow_client.get_metric_history(policy, "rewards/margins")) == 5


def test_rounds_are_a_curve_of_the_parent_run(tracked: tuple[Path, Any, list[str]]) -> None:
    run, mlflow_client, _ = tracked
    history = mlflow_client.get_metric_history(kept(run)["run_id"], "gate/win_rate")
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [(0, 0.5), (1, 0.5625)]


def test_the_time_of_a_round_is_summed_by_parts(home: Path) -> None:
    def stage(name: str, seconds: float, minute: int, **stats: float) -> Artifact:
        finished = f"2026-01-01T00:{minute:02d}:00+00:00"
        manifest = {"seconds": seconds, "stats": stats, "rows": 0, "files": [], "config": {}, "finished": finished}
        return Artifact(name, home / "run", name, manifest)

    stages = [stage("speeches", 9, 1), stage("round-1/heads", 3, 2), stage("round-1/policy", 100, 3)]
    stages += [stage("round-1/samples", 60, 4, engine_start_s=40), stage("round-2/heads", 5, 5)]
    for _ in range(2):  # a second pass sends the same points
        with tracker(home, {}) as open_tracker:
            for artifact in stages:
                open_tracker.stage(artifact)
    parent = kept(home / "run")["run_id"]

    def points(part: str) -> list[tuple[int, float]]:
        history = client(home).get_metric_history(parent, f"seconds/{part}")
        return [(m.step, m.value) for m in sorted(history, key=lambda m: m.timestamp)]

    assert points("training") == [(1, 3), (1, 103), (2, 5)]
    assert points("engine_start") == [(1, 40)] and points("sampling") == [(1, 20)]


def test_rows_are_named_as_data_sets_by_fingerprint(tracked: tuple[Path, Any, list[str]]) -> None:
    run, mlflow_client, _ = tracked
    speeches = nested(mlflow_client, run, "speeches")
    [entry] = speeches.inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("speeches", speeches.data.tags["psyray.fingerprint"])
    assert json.loads(entry.dataset.profile) == {"num_rows": 24}
    source = mlflow.data.get_source(entry.dataset)
    assert Path(source.uri) == run / "stages/speeches" / entry.dataset.digest
    assert nested(mlflow_client, run, "reward").inputs.dataset_inputs == []


def test_settings_are_kept_and_the_report_too(tracked: tuple[Path, Any, list[str]]) -> None:
    run, mlflow_client, _ = tracked
    parent = mlflow_client.get_run(kept(run)["run_id"])
    assert parent.data.params["loop.budget"] == "24"
    artifacts = {a.path for a in mlflow_client.list_artifacts(parent.info.run_id)}
    assert artifacts == {"config.yaml", "report.html"}
    assert (run.parent / "mlartifacts").is_dir()


def test_no_secret_and_no_client_text_reaches_mlflow(tracked: tuple[Path, Any, list[str]]) -> None:
    run, _, said = tracked
    files = [run.parent / "mlflow.db", *(p for p in (run.parent / "mlartifacts").rglob("*") if p.is_file())]
    assert len(files) == 3 and "Answer of round" in (run / "report.html").read_text()
    for content in [*(f.read_bytes() for f in files), "\n".join(said).encode()]:
        for secret in (SECRET_KEY, "hunter2", HOSTILE, CRISIS, "CRISIS-SPEECH", "I feel ", "Answer of ", "<script>"):
            assert secret.encode() not in content


def test_a_second_pass_adds_nothing(home: Path) -> None:
    for _ in range(2):
        made = MadeRun(home / "run", rounds=0)
        with tracker(home, made.config) as open_tracker:
            made.run.on_stage = open_tracker.stage
            made.make()
    assert len(all_runs(client(home))) == 1 + 13
    reward = nested(client(home), home / "run", "reward").info.run_id
    assert len(client(home).get_metric_history(reward, "loss")) == 8


def test_a_stage_whose_logging_was_cut_off_is_completed_in_its_own_run(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = MadeRun(home / "run", rounds=0, until="judgements")
    stages = made.make()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), tracker(home, made.config) as cut:
        patch.setattr(cut, "_data_set", _interrupt)
        cut.stage(stages[0])
    assert client(home).get_run(kept(home / "run")["run_id"]).info.status == "KILLED"
    with tracker(home, made.config) as again:
        again.stage(stages[0])
    assert len(all_runs(client(home))) == 2
    run = nested(client(home), home / "run", "speeches")
    assert run.info.status == "FINISHED" and len(run.inputs.dataset_inputs) == 1
    assert len(client(home).get_metric_history(run.info.run_id, "kept")) == 1


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_error_ends_the_run_as_failed_and_resume_reopens_it(home: Path) -> None:
    with pytest.raises(ValueError, match="own"), tracker(home, {"a": 1}):
        raise ValueError("the run's own error")
    first = kept(home / "run")["run_id"]
    assert client(home).get_run(first).info.status == "FAILED"
    with tracker(home, {"a": 2}) as again:
        assert client(home).get_run(first).info.status == "RUNNING"
        assert again.run_id == first
    run = client(home).get_run(first)
    assert run.info.status == "FINISHED"
    assert run.data.params["a"] == "1" and run.data.tags["changed.a"] == "2"


def test_a_run_that_is_gone_is_opened_anew_and_said_so(home: Path) -> None:
    made = MadeRun(home / "run", rounds=0, until="judgements")
    stages = made.make()
    with tracker(home, made.config) as first:
        first.stage(stages[0])
    client(home).delete_run(first.run_id)
    said: list[str] = []
    with tracker(home, made.config, said) as second:
        second.stage(stages[0])
    assert second.run_id != first.run_id and any("a new one is opened" in line for line in said)
    assert nested(client(home), home / "run", "speeches").info.status == "FINISHED"
    (home / "run" / "mlflow.json").write_text(json.dumps({"run_id": "0" * 32, "stages": {}}))
    with tracker(home, made.config, said) as third:
        assert third.run_id not in ("0" * 32, second.run_id)


def test_a_model_is_registered_once_and_found_by_its_alias(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = model_folder(home / "run" / "a" / "model"), model_folder(home / "run" / "b" / "model")
    with tracker(home, {}) as open_tracker:
        assert open_tracker.register("psyray-policy", first, tags={"fingerprint": "f1", "round": "1"}) == "1"
        assert open_tracker.register("psyray-policy", first, "champion", {"fingerprint": "f1"}) == "1"
        assert open_tracker.register("psyray-policy", second, tags={"fingerprint": "f2"}) == "2"
    assert len(client(home).search_model_versions("name = 'psyray-policy'")) == 2
    version = client(home).get_model_version_by_alias("psyray-policy", "champion")
    assert version.version in ("1", 1) and version.tags["round"] == "1"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home / 'mlflow.db'}")
    found = mlflow.artifacts.download_artifacts("models:/psyray-policy@champion")
    assert Path(found).resolve() == first.resolve()  # the folder itself: nothing was copied
    assert {p.name for p in first.iterdir()} == {"config.json", "model.safetensors"}


def test_only_a_new_version_becomes_champion_so_that_going_back_holds(home: Path) -> None:
    first, second = model_folder(home / "run" / "a" / "model"), model_folder(home / "run" / "b" / "model")

    def champion_after(folder: Path, fingerprint: str) -> tuple[str, list[str]]:
        said: list[str] = []
        with tracker(home, {}, said) as open_tracker:
            open_tracker.register("psyray-policy", folder, "champion", {"fingerprint": fingerprint})
        version = client(home).get_model_version_by_alias("psyray-policy", "champion").version
        return str(version), [line for line in said if "stays champion" in line]

    assert champion_after(first, "f1") == ("1", []) and champion_after(second, "f2") == ("2", [])
    assert champion_after(second, "f2") == ("2", [])
    client(home).set_registered_model_alias("psyray-policy", "champion", "1")  # as `psyray promote` does
    version, [line] = champion_after(second, "f2")
    assert version == "1" and f"psyray promote psyray-policy/2 --runs {home}" in line
    client(home).delete_registered_model_alias("psyray-policy", "champion")
    assert champion_after(first, "f1") == ("1", [])


def test_a_model_without_a_fingerprint_is_known_by_its_files(home: Path) -> None:
    folder = model_folder(home / "model")
    with tracker(home, {}) as open_tracker:
        assert open_tracker.register("psyray-reward", folder) == open_tracker.register("psyray-reward", folder) == "1"
        (folder / "model.safetensors").write_text("other weights")
        assert open_tracker.register("psyray-reward", folder) == "2"
        with pytest.raises(PsyrayError, match="no model folder"):
            open_tracker.register("psyray-reward", home / "absent")


@pytest.mark.parametrize(
    "uri", ["http://me:hunter2@127.0.0.1:9/mlflow", "postgresql://me:hunter2@127.0.0.1:9/mlflow", "postgresq://x"]
)
def test_an_unreachable_server_is_a_clear_error_within_seconds(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    before, started = dict(os.environ), time.monotonic()
    with pytest.raises(PsyrayError, match="MLflow at ") as caught, tracker(tmp_path, {}):
        pass
    assert time.monotonic() - started < 10
    assert "hunter2" not in str(caught.value) and uri.rpartition("@")[2] in str(caught.value)
    assert dict(os.environ) == before


def test_only_one_process_at_a_time_makes_the_database(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with alone(f"sqlite:///{tmp_path / 'mlflow.db'}"):
            order.append("second")

    with alone(f"sqlite:///{tmp_path / 'mlflow.db'}"):
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(timeout=0.3)
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]


def test_a_server_that_goes_away_in_between_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = MadeRun(home / "run", rounds=0, until="responses").make()
    with pytest.raises(PsyrayError, match="run the same command again"), tracker(home, {}) as open_tracker:
        monkeypatch.setattr(open_tracker._client, "search_runs", _refuse)
        open_tracker.stage(stages[0])
    assert kept(home / "run")["stages"] == {}


def _refuse(*_: object, **__: object) -> None:
    raise ConnectionRefusedError("gone")


def test_a_deleted_experiment_is_named(home: Path) -> None:
    client(home).delete_experiment(client(home).create_experiment("old"))
    with pytest.raises(PsyrayError, match="'old' was deleted"), tracker(home, {}, experiment="old"):
        pass


def test_importing_the_tracker_switches_telemetry_off_and_loads_no_mlflow() -> None:
    code = (
        "import sys; from psyray.mlflow_client import client_at; assert 'mlflow' not in sys.modules; "
        "client_at('http://127.0.0.1:9');"
        "from mlflow.telemetry import get_telemetry_client; assert get_telemetry_client() is None"
    )
    silent = {k: v for k, v in os.environ.items() if k not in ("CI", "PYTEST_CURRENT_TEST", "DO_NOT_TRACK")}
    silent.pop("MLFLOW_DISABLE_TELEMETRY", None)
    done = subprocess.run([sys.executable, "-c", code], env=silent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_flattening() -> None:
    config = {
        "a": {"b": 1, "api_key_env": "X", "max_tokens": 3, "headers": {"Authorization": "Bearer z"}},
        "c": "y" * 900,
    }
    assert dict(track.parameters(track.public(config))) == {"a.b": "1", "a.max_tokens": "3", "c": "y" * 500}
    stats = {"n": 1, "nested": {"x y": 2.5, "bad:name": 1}, "text": "t", "none": None, "inf": float("inf"), "list": [1]}
    assert dict(track.numbers(stats)) == {"n": 1, "nested/x y": 2.5, "nested/bad_name": 1}
    assert list(track.series({"steps": [{"step": 3, "loss": 1}, {"loss": 2}]})) == [("loss", 1, 3), ("loss", 2, 1)]
    assert redact("postgresql://a:p@s@h/db?sslpassword=q&x=1") == "postgresql://***@h/db?sslpassword=***&x=1"


def test_artifact_without_rows_is_tolerated(home: Path) -> None:
    manifest = {"stage": "x", "config": {}, "files": [], "rows": 0, "stats": {}, "seconds": 0.5}
    artifact = Artifact("x", home, "f" * 16, {**manifest, "finished": "2024-05-01T10:00:00+00:00"})
    with tracker(home, {}) as open_tracker:
        open_tracker.stage(artifact)
    info = nested(client(home), home / "run", "x").info
    assert info.end_time - info.start_time == 500

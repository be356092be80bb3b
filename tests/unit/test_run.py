"""Stages, their fingerprints, resume, and the run's lock."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from psyray.errors import PsyrayError
from psyray.homes import run_path
from psyray.run import Run, find_run, read_stages

SCHEMA = pa.schema([("key", pa.string()), ("value", pa.int64())])


class Counted:
    """A stage's work that counts how often each row was made, and can be cut off."""

    def __init__(self, keys: str, stop_after: int | None = None) -> None:
        self.keys, self.stop_after, self.made = keys, stop_after, []

    def __call__(self, folder):
        parts = folder.parts(SCHEMA, "key")
        for row in parts.todo({"key": key, "value": ord(key)} for key in self.keys):
            if self.stop_after is not None and len(self.made) >= self.stop_after:
                raise KeyboardInterrupt
            self.made.append(row["key"])
            parts.append([row])
        parts.finish()
        return {"count": len(self.keys)}


@pytest.fixture
def said() -> list[str]:
    return []


def open_run(tmp_path: Path, said: list[str]) -> Run:
    return Run(tmp_path / "run", said.append)


def test_a_finished_stage_is_read_and_not_made_again(tmp_path, said):
    first, again = Counted("cab"), Counted("cab")
    made = open_run(tmp_path, said).stage("letters", {"a": 1}, [], first)
    read = open_run(tmp_path, said).stage("letters", {"a": 1}, [], again)
    assert first.made == ["c", "a", "b"] and again.made == []
    assert read.rows() == made.rows() == [{"key": k, "value": ord(k)} for k in "abc"]
    assert "done before" in said[-1]


def test_a_stage_that_was_cut_off_makes_only_what_is_missing_and_ends_the_same(tmp_path, said):
    undisturbed = open_run(tmp_path / "other", said).stage("letters", {}, [], Counted("dcba"))
    with pytest.raises(KeyboardInterrupt):
        open_run(tmp_path, said).stage("letters", {}, [], Counted("dcba", stop_after=2))
    rest = Counted("dcba")
    artifact = open_run(tmp_path, said).stage("letters", {}, [], rest)
    assert rest.made == ["b", "a"]
    data = [a.path / a.manifest["files"][0] for a in (artifact, undisturbed)]
    assert data[0].read_bytes() == data[1].read_bytes()
    assert not list(artifact.path.glob("part-*"))


def test_a_changed_setting_re_runs_what_depends_on_it_and_keeps_the_old_result(tmp_path, said):
    def build(setting: int) -> tuple[list[str], list[str]]:
        run, first, second = open_run(tmp_path, said), Counted("ab"), Counted("xy")
        base = run.stage("base", {"fixed": 0}, [], first)
        run.stage("next", {"setting": setting}, [base], second)
        return first.made, second.made

    assert build(1) == (["a", "b"], ["x", "y"])
    assert build(2) == ([], ["x", "y"])
    assert build(1) == ([], [])
    assert any("runs again" in line for line in said)


def test_settings_that_changed_are_said_without_a_password_that_an_older_version_kept(tmp_path, said):
    for rounds, uri in ((1, "https://me:hunter2@host/mlflow"), (2, None)):
        with open_run(tmp_path, said).open({"loop": {"rounds": rounds}, "track": {"uri": uri}}):
            pass
    changed = ["loop.rounds: 1 -> 2", "track.uri: 'https://***@host/mlflow' -> None"]
    assert said == [f"changed since the last run: {line}" for line in changed]


def test_broken_settings_of_the_last_run_are_one_clear_error(tmp_path, said):
    run = open_run(tmp_path, said)
    run.path.mkdir(parents=True, exist_ok=True)
    (run.path / "config.yaml").write_text("loop: [")
    with pytest.raises(PsyrayError, match=r"config\.yaml is no YAML .*; put a copy of it back"), run.open({}):
        pass


def test_two_processes_cannot_work_in_one_run(tmp_path, said):
    run = open_run(tmp_path, said)
    code = f"from psyray.run import Run\nwith Run(__import__('pathlib').Path({str(run.path)!r})).open({{}}): pass"
    with run.open({}):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert other.returncode != 0 and f"in use by process {os.getpid()}" in other.stderr
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_half_written_file_is_not_a_row(tmp_path, said):
    with pytest.raises(KeyboardInterrupt):
        open_run(tmp_path, said).stage("letters", {}, [], Counted("ab", stop_after=1))
    folder = next((tmp_path / "run/stages/letters").iterdir())
    (folder / ".part-000001.parquet.99").write_bytes(b"half")
    assert open_run(tmp_path, said).stage("letters", {}, [], Counted("ab")).manifest["rows"] == 2


def test_rows_set_aside_are_kept_beside_and_made_anew(tmp_path, said):
    def make(folder):
        parts = folder.parts(SCHEMA, "key")
        parts.append({"key": k, "value": 0} for k in "abc")
        aside = parts.set_aside({"b"})
        assert [r["key"] for r in pa.parquet.read_table(aside).to_pylist()] == ["b"]
        assert [r["key"] for r in parts.todo({"key": k} for k in "abc")] == ["b"]
        parts.append([{"key": "b", "value": 1}])
        parts.finish()
        return {}

    import pyarrow.parquet  # noqa: F401

    assert open_run(tmp_path, said).stage("letters", {}, [], make).manifest["rows"] == 3


def test_there_is_no_status_of_no_run(tmp_path):
    with pytest.raises(PsyrayError, match="no run at"):
        read_stages(tmp_path)


def test_a_run_in_a_ray_job_does_not_land_in_the_jobs_throw_away_folder(monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({}))
    monkeypatch.delenv("PSYRAY_HOME", raising=False)
    assert run_path(Path("runs/demo")) == Path.home() / ".psyray/runs/demo"
    monkeypatch.setenv("PSYRAY_HOME", "/shared")
    assert run_path(Path("runs/demo")) == Path("/shared/runs/demo")


def test_a_run_that_is_there_is_found_here_and_where_jobs_write(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PSYRAY_HOME", raising=False)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    demo, here, of_job = Path("runs/demo"), tmp_path / "here/runs/demo", tmp_path / "home/.psyray/runs/demo"
    assert find_run(demo) == here  # nowhere yet: where one would be made
    with pytest.raises(PsyrayError, match=f"no run at {here} or {of_job}; start one with"):
        read_stages(demo)
    of_job.mkdir(parents=True)
    assert find_run(demo) == of_job and find_run(of_job) == of_job
    here.mkdir(parents=True)
    assert find_run(demo) == here
    monkeypatch.setenv("PSYRAY_HOME", str(tmp_path / "shared"))
    assert find_run(demo) == here
    (tmp_path / "shared/runs/demo").mkdir(parents=True)
    assert find_run(demo) == tmp_path / "shared/runs/demo"  # where a run would go on from here

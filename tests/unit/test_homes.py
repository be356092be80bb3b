"""A run at a URI: its folder here, its settings, and what those who only read it fetch."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from made_mirrored import Counted, passes
from typer.testing import CliRunner

from psyray.active.place import ledger_name, place_of
from psyray.cli import app
from psyray.config import checked, load_config
from psyray.data.export import read_source
from psyray.errors import PsyrayError
from psyray.homes import folder_of, run_path, uri_of
from psyray.mirror import Mirror
from psyray.pipeline import open_mirror
from psyray.run import Run, find_run, read_stages
from psyray.status import driver, stage_lines
from serve.champion import Args


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place that stands for object storage, and a machine that has nothing."""
    monkeypatch.setenv("PSYRAY_HOME", str(tmp_path / "home"))
    passes(tmp_path / "elsewhere" / "run", tmp_path / "store" / "demo", Counted())
    return tmp_path / "store" / "demo"


@pytest.mark.parametrize("written", ["s3://bucket/runs/demo", "S3://bucket/runs/demo/", "s3:/bucket/runs/demo"])
def test_a_uri_is_known_however_a_path_writes_it(written: str) -> None:
    assert uri_of(written) == uri_of(Path(written)) == "s3://bucket/runs/demo"


def test_a_folder_is_no_uri() -> None:
    assert [uri_of(path) for path in ("runs/demo", "/mnt/runs", "c:demo", Path("a:b/c"))] == [None] * 4
    assert uri_of(Path("file:///mnt/store/demo")) == "file:///mnt/store/demo"


def test_the_folder_of_a_uri_is_readable_stable_and_no_other_uris() -> None:
    uris = [
        "s3://b/a/demo",
        "s3://b/a-demo",
        "s3://b-a/demo",
        "gs://b/a/demo",
        "s3://b/..",
        "s3://b",
        f"s3://b/{'x' * 900}",
    ]
    folders = [folder_of(uri) for uri in uris]
    assert str(folders[0]) == "runs/s3-b-a-demo-f255e68e/demo"
    # A parent of its own: a SQLite ledger lies beside the run.
    assert len({folder.parent for folder in folders}) == len(uris)
    for folder in folders:
        assert folder.parts[0] == "runs" and len(folder.parts) == 3 and ".." not in folder.parts
        assert max(map(len, folder.parts)) < 120


def test_a_uri_as_run_path_is_a_folder_with_that_mirror(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PSYRAY_HOME", str(tmp_path))
    config = load_config(None, ["run.path=s3://bucket/demo/"])
    assert config.run.mirror == "s3://bucket/demo" and config.run.path == folder_of("s3://bucket/demo")
    assert run_path(config.run.path) == run_path(Path("s3://bucket/demo")) == tmp_path / folder_of("s3://bucket/demo")
    assert ledger_name(config, tmp_path) == "s3://bucket/demo"
    assert checked(config.model_dump(mode="json")) == config  # as RUN/config.yaml keeps it
    local = load_config(None, [f"run.path=file://{tmp_path}/store"])
    mirror = open_mirror(local, print)
    assert mirror and mirror.ledger == run_path(local.run.path).parent / "labels.db"


def test_a_mirror_beside_a_uri_and_a_secret_in_it_are_refused() -> None:
    with pytest.raises(PsyrayError, match=r"run\.path is a URI.*leave run\.mirror out"):
        load_config(None, ["run.path=s3://bucket/a", "run.mirror=s3://bucket/a"])
    with pytest.raises(PsyrayError, match=r"run\.path is a plain URI") as told:
        load_config(None, ["run.path=s3://me:hidden@bucket/a"])
    assert "hidden" not in str(told.value)


def test_status_fetches_what_it_reads_and_no_run_takes_it_for_a_stage(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"file://{store}"
    folder = find_run(Path(uri))
    assert folder == run_path(Path(uri))
    assert f"{uri}: facts of 1 stages fetched to {folder}" in capsys.readouterr().err
    (stage,) = read_stages(folder)
    assert stage.stats == {"rows": 3} and not stage.files[0].exists()
    assert find_run(Path(uri)) == folder and not capsys.readouterr().err  # nothing lacks any more

    (stage,) = read_stages(find_run(Path(uri), "rows"))
    assert [row["key"] for row in stage.rows()] == ["a", "b", "c"] and not stage.model.exists()

    shown = CliRunner().invoke(app, ["status", uri], env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and "letters" in shown.output and "done" in shown.output
    work = Counted()
    run = passes(folder, store, work)
    assert work.times == 0 and (read_stages(run.path)[0].model / "config.json").exists()


def test_what_another_machine_did_since_is_seen(store: Path, tmp_path: Path) -> None:
    uri, first = f"file://{store}", tmp_path / "elsewhere" / "run"
    folder = find_run(Path(uri))
    mirror = Mirror(uri, first)
    run = Run(first, lambda line: None, mirror=mirror)
    with mirror.open(), run.open({"a": 2}):
        run.stage("letters", {}, [], Counted())
        run.stage("more", {}, [], Counted())
    assert [stage.name for stage in read_stages(find_run(Path(uri)))] == ["letters", "more"]
    # What a process here is at work on is newer than any copy of it.
    listed = folder / "run.json"
    with Run(folder, lambda line: None).open({"a": 3}):
        listed.write_text('{"pid": 1, "stages": []}')
        os.utime(listed, (1, 1))
        assert read_stages(find_run(Path(uri))) == []


def test_a_driver_on_another_machine_is_not_said_to_be_dead(store: Path) -> None:
    folder = find_run(Path(f"file://{store}"))
    state = json.loads((folder / "run.json").read_text())
    state |= {
        "host": "another",
        "pid": os.getpid(),
        "stages": [*state["stages"], {"name": "pairs", "fingerprint": "f"}],
    }
    (folder / "run.json").write_text(json.dumps(state))
    assert driver(folder) == (os.getpid(), False)
    assert next(line.state for line in stage_lines(folder) if line.name == "pairs") == "elsewhere"
    shown = CliRunner().invoke(app, ["status", str(folder)], env={"COLUMNS": "200"})
    assert "on another; whether it is at work cannot be seen from here" in shown.output


def test_a_damaged_copy_is_not_read(store: Path) -> None:
    (data,) = store.glob("stages/letters/*/data-*.parquet")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(PsyrayError, match=r"of letters at .* is damaged"):
        find_run(Path(f"file://{store}"), "rows")


def test_no_run_at_a_uri_is_one_clear_line(tmp_path: Path, store: Path) -> None:
    with pytest.raises(PsyrayError, match=r"no run at file://.*: it holds no run\.json"):
        read_source(Path(f"file://{tmp_path}/nothing"))


def test_a_ledger_that_lies_on_the_machine_at_work_is_not_made_anew(store: Path) -> None:
    (store / "config.yaml").write_text("speeches: {limit: 5}")
    with pytest.raises(PsyrayError, match=r"is a SQLite file on the machine that works on the run"):
        place_of(Path(f"file://{store}"))
    assert not list(run_path(Path(f"file://{store}")).parent.glob("*.db"))


def test_a_run_is_served_and_fetched_from_its_uri(store: Path) -> None:
    uri = f"file://{store}"
    run = Args.read({"run": uri}).settled().run
    assert run == run_path(Path(uri)) and (read_stages(run)[0].model / "weights.bin").exists()
    shutil.rmtree(run)
    fetched = CliRunner().invoke(app, ["fetch", uri], env={"COLUMNS": "300"})
    assert fetched.exit_code == 0 and (read_stages(run)[0].model / "weights.bin").exists()

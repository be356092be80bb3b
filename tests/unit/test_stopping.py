"""SIGTERM is Ctrl-C, a stopped run says so, and a run ends after the stage that was asked for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from rich.console import Console

from psyray.config import Config, load_config
from psyray.errors import PsyrayError
from psyray.run import Folder, Run
from psyray.status import ended, expected_stages, show_status, stage_lines
from psyray.stopping import Reached, last_stage

ROOT = Path(__file__).parents[2]
SCHEMA = pa.schema([("key", pa.string())])
RUN = """
import sys, time
from pathlib import Path
from psyray.run import Run
from psyray.stopping import sigterm_is_ctrl_c
sigterm_is_ctrl_c()
def make(folder):
    try:
        print("at work", flush=True)
        time.sleep(60)
    finally:
        print("in order", flush=True)
run = Run(Path(sys.argv[1]))
with run.open({}):
    run.stage("one", {}, [], lambda folder: {})
    run.stage("two", {}, [], make)
"""


def test_sigterm_puts_things_in_order_and_the_run_says_when_it_was_stopped(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    assert process.stdout
    while "at work" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert "in order" in process.stdout.read()
    assert process.wait(30) == -signal.SIGINT  # Python's way to end by Ctrl-C, where nobody catches it
    assert ended(tmp_path, "stopped")
    assert [(line.name, line.state) for line in stage_lines(tmp_path)[:2]] == [("one", "done"), ("two", "stopped")]


def make(folder: Folder) -> dict[str, int]:
    folder.keep(SCHEMA, "key", [{"key": "a"}])
    return {"a": 1}


def test_the_next_pass_is_not_stopped_any_more(tmp_path: Path) -> None:
    run = Run(tmp_path, lambda line: None)
    with pytest.raises(KeyboardInterrupt), run.open({}):
        raise KeyboardInterrupt
    assert ended(tmp_path, "stopped") and json.loads((tmp_path / "run.json").read_text())["pid"] == os.getpid()
    again = Run(tmp_path, lambda line: None)
    with again.open({}):
        again.stage("one", {}, [], make)
    assert not ended(tmp_path, "stopped")


@pytest.mark.parametrize("before", [False, True])
def test_a_run_ends_after_the_stage_that_was_asked_for(tmp_path: Path, before: bool) -> None:
    if before:
        Run(tmp_path, lambda line: None).stage("one", {}, [], make)
    said: list[str] = []
    run = Run(tmp_path, said.append, until="one")
    with pytest.raises(Reached):
        run.stage("one", {}, [], make)
    assert "--until" in said[-1] and stage_lines(tmp_path)[0].state == "done"
    assert "Driver: ended after one, as --until said; the same command without it" in shown(tmp_path)


def test_a_run_that_ended_with_an_error_says_which(tmp_path: Path) -> None:
    def refused(folder: Folder) -> dict[str, int]:
        raise PsyrayError("the endpoint failed 20 rows")

    run = Run(tmp_path, lambda line: None)
    with pytest.raises(PsyrayError), run.open({}):
        run.stage("one", {}, [], refused)
    assert stage_lines(tmp_path)[0].state == "failed"
    assert "Driver: ended with an error: the endpoint failed 20 rows" in shown(tmp_path)


def shown(run: Path) -> str:
    console = Console(width=200, record=True)
    show_status(run, console)
    return console.export_text()


@pytest.mark.parametrize(
    ("until", "expected"),
    [("responses", "responses"), ("round-1", "round-1/gate"), ("round-0/features", "round-0/features")],
)
def test_the_last_stage_may_be_named_by_its_round(until: str, expected: str) -> None:
    assert last_stage(until, expected_stages(Config().model_dump(mode="json"))) == expected


def test_a_stage_that_is_not_there_is_told_with_the_nearest() -> None:
    stages = expected_stages(load_config(None, ["loop.rounds=1"]).model_dump(mode="json"))
    with pytest.raises(PsyrayError, match="did you mean 'responses'"):
        last_stage("response", stages)
    with pytest.raises(PsyrayError, match="no stage 'round-2'"):
        last_stage("round-2", stages)


def test_the_runtime_environment_of_jobs_is_one_and_keeps_what_stages_need() -> None:
    from ray.runtime_env import RuntimeEnv

    known = yaml.safe_load((ROOT / "jobs/runtime-env.yaml").read_text())
    assert RuntimeEnv(**known)["excludes"] == known["excludes"]
    assert not {"/psyray", "/serve", "/configs", "/jobs", "/requirements"} & set(known["excludes"])
    assert (ROOT / "requirements/gpu.txt").is_file()

"""The whole path through the command, once undisturbed and once killed at three moments: both end the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from doc_lines import commands
from typer.testing import CliRunner

from psyray.active.ledger import Ledger
from psyray.cli import app
from psyray.run import read_stages

ROOT = Path(__file__).parents[2]
LIMIT_S = 1500


def settings(model: Path, home: Path) -> list[str]:
    responders = [
        {"name": name, "model": str(model), "max_tokens": 16, "temperature": t} for name, t in (("a", 1.3), ("b", 1.6))
    ]
    train = {"learning_rate": 1e-3, "batch_size": 2, "micro_batch": 2, "max_length": 512, "save_every": 2, "epochs": 2}
    return [
        f"run.path={home}/demo", "speeches.limit=24", "speeches.test_share=0.4",
        "engine.max_num_seqs=8", "engine.kv_cache_gib=1", "engine.max_model_len=768",
        "responses.k=2", f"responses.responders={json.dumps(responders)}", "pairs.gap=0.01",
        f"reward.model={model}", f"reward.train={json.dumps(train)}", f"policy.model={model}", "policy.max_tokens=16",
        # Hot, so that the random model does not say nothing but line breaks: an empty answer is not judged.
        "policy.temperature=1.5", "policy.stop=[]",
        f"dpo.train={json.dumps(train)}", "loop.rounds=1", "loop.prompts=8", "loop.k=3", "loop.budget=4",
        "loop.reward_margin=0.0", "loop.replay=2",
        # A random model gets no better: the gate is held open so that the path goes on.
        "evaluate.min_win_rate=0.0", "evaluate.max_length_change=9", "evaluate.max_repeat_rise=1",
        "evaluate.max_truncated_rise=1",
        "evaluate.max_perplexity_rise=1e9", "evaluate.max_capability_drop=1", "evaluate.probe_answers=4",
    ]  # fmt: skip


def start(model: Path, home: Path, log: Path) -> subprocess.Popen[bytes]:
    home.mkdir(exist_ok=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    with log.open("ab") as out:
        command = [sys.executable, "-m", "psyray.cli", "run", "configs/demo.yaml", *settings(model, home)]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)


def wait(process: subprocess.Popen[bytes], log: Path, until: Callable[[], bool] | None = None) -> None:
    """Until the condition holds, or without one until the process ends well."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if until and until():
            return
        if process.poll() is not None:
            assert until is None and process.returncode == 0, log.read_text()[-3000:]
            return
        time.sleep(0.05)
    process.kill()
    pytest.fail(f"not there after {LIMIT_S} s:\n{log.read_text()[-3000:]}")


def stage_file(home: Path, pattern: str) -> bool:
    return bool(list((home / "demo" / "stages").glob(pattern)))


def contents(home: Path) -> dict[str, list[str]]:
    """For each stage of rows the ids that it holds."""
    keys = {"speeches": "speech_id", "pairs": "pair_id", "labels": "pair_id", "probe": "key"}
    return {
        stage.name: [row[keys.get(stage.name.split("/")[-1], "response_id")] for row in stage.rows()]
        for stage in read_stages(home / "demo")
        if stage.manifest["files"]
    }


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("undisturbed") / "runs"
    process = start(tiny_model, home, home / "log")
    wait(process, home / "log")
    return home


def test_every_stage_leaves_what_the_next_ones_and_a_user_need(undisturbed):
    stages = {stage.name: stage for stage in read_stages(undisturbed / "demo")}
    rows = {name: stage.manifest["rows"] for name, stage in stages.items()}
    held_out = stages["speeches"].stats["test"]
    assert rows["speeches"] == 24 and rows["responses"] == 48
    assert rows["judgements"] == stages["responses"].stats["ok"] > 40
    assert rows["round-0/samples"] == 8 * 3 + held_out and rows["round-1/samples"] == held_out
    assert rows["pairs"] > 0 and stages["round-1/labels"].stats["bought"] == 4
    assert 0 <= stages["reward-heads"].stats["metrics"]["accuracy"] <= 1
    by_topic = stages["reward-topics"].stats["strata"]["topic"]
    assert sum(part["pairs"] for part in by_topic.values()) == stages["round-1/heads"].stats["test_pairs"] > 0
    probe = stages["round-1/gate"].stats["probe"]
    assert probe["kl"] > 0 and probe["perplexity"] > 1 and (probe["questions"], probe["answers"]) == (40, 4)
    assert stages["round-1/gate"].stats["passed"] and stages["export"].stats["champion_round"] == 1
    layout = pq.read_table(stages["pairs"].path / "psychocounsel.parquet")
    assert layout.num_rows == rows["pairs"]
    champion = json.loads((undisturbed / "demo/champion.json").read_text())
    assert (Path(champion["policy"]["path"]) / "model.safetensors").exists() and Path(
        champion["reward"]["heads"]
    ).exists()
    report = (undisturbed / "demo/report.html").read_text()
    assert "no substitute" in report and "https://" not in report
    assert (undisturbed / "mlflow.db").exists() and (undisturbed / "labels.db").exists()


def test_the_same_command_again_does_nothing_and_a_changed_setting_re_runs_what_depends_on_it(undisturbed, tiny_model):
    before = Ledger(f"sqlite:///{undisturbed}/labels.db").summary(str(undisturbed / "demo"))
    log = undisturbed / "again"
    wait(start(tiny_model, undisturbed, log), log)
    text = log.read_text()
    assert "starts" not in text and text.count("done before") == len(read_stages(undisturbed / "demo"))
    assert Ledger(f"sqlite:///{undisturbed}/labels.db").summary(str(undisturbed / "demo")) == before


READERS = ("status", "report", "lineage", "export", "compare", "promote")
NOT_THERE = {"s3://bucket/demo", "pairs-before", "psyray-policy/3"}  # a bucket, an older export, a third version


def test_every_command_of_the_docs_that_reads_a_finished_run_runs_as_it_stands(undisturbed, monkeypatch):
    told = [words for words in commands() if words[0] in READERS and not NOT_THERE & {*words}]
    assert {words[0] for words in told} == {*READERS}
    (undisturbed / "mine").symlink_to("demo")
    monkeypatch.chdir(undisturbed.parent)
    monkeypatch.delenv("PSYRAY_HOME", raising=False)
    for words in told:
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (words, done.output, done.exception)
    subprocess.run([sys.executable, ROOT / "jobs/report.py", "runs/demo"], check=True)  # and as a job's entry point


@pytest.fixture(scope="module")
def killed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose driver is killed twice and whose engine once, each with SIGKILL."""
    home = tmp_path_factory.mktemp("killed") / "runs"
    log = home / "log"

    def driver_dies_when(pattern: str) -> None:
        process = start(tiny_model, home, log)
        wait(process, log, lambda: stage_file(home, pattern))
        process.send_signal(signal.SIGKILL)
        process.wait()

    driver_dies_when("responses/*/part-*.parquet")
    process = start(tiny_model, home, log)
    wait(process, log, lambda: stage_file(home, "round-0/samples/*") and engine_of(process) is not None)
    engine = engine_of(process)
    assert engine is not None
    engine.kill()
    wait(process, log, lambda: stage_file(home, "round-1/policy/*/steps.jsonl"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait(start(tiny_model, home, log), log)
    return home


def engine_of(driver: subprocess.Popen[bytes]) -> psutil.Process | None:
    """The Ray worker that holds this driver's vLLM engine."""
    for child in psutil.Process(driver.pid).children(recursive=True):
        try:
            if "vLLMEngineStage" in " ".join(child.cmdline()):
                return child
        except psutil.Error:  # it ended while it was looked at
            continue
    return None


def test_a_killed_run_ends_with_the_ids_of_an_undisturbed_one(killed, undisturbed):
    here, there = contents(killed), contents(undisturbed)
    assert here.keys() == there.keys()
    # Texts are sampled anew, so what is chosen by text differs; what is asked and answered does not.
    for name in ("speeches", "responses", "round-0/samples"):
        assert here[name] == there[name], name
    for name, ids in here.items():
        assert len(ids) == len(set(ids)), name
    assert len(here["round-1/samples"]) == len(there["round-1/samples"])
    # A random model may end before its first word; that answer keeps its row and is not judged.
    for home, found in ((killed, here), (undisturbed, there)):
        assert found["judgements"] == usable(home, "responses")
        for number in (0, 1):
            assert found[f"round-{number}/gate"] == usable(home, f"round-{number}/samples", split="test")


def usable(home: Path, name: str, split: str = "") -> list[str]:
    """The responses of a stage that have a text."""
    [stage] = [stage for stage in read_stages(home / "demo") if stage.name == name]
    return [r["response_id"] for r in stage.rows() if r["status"] == "ok" and split in ("", r["split"])]


def test_no_label_was_spent_twice(killed):
    spent = Ledger(f"sqlite:///{killed}/labels.db").summary(str(killed / "demo"))
    bought = {row["purpose"]: row["bought"] for row in spent}
    assert bought["round-1"] == 4 and bought["judgements"] <= 48
    assert all(row["open"] == 0 for row in spent)

"""The whole path through the command, once undisturbed and once killed at three moments: both end the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from doc_lines import commands
from typer.testing import CliRunner

from psyray.active.ledger import Ledger
from psyray.cli import app
from psyray.rubric import load_rubric
from psyray.run import read_stages

ROOT = Path(__file__).parents[2]
READERS = ("status", "report", "lineage", "export", "compare", "promote")
NOT_THERE = {"s3://bucket/demo", "pairs-before", "psyray-policy/3"}  # a bucket, an older export, a third version


def contents(home: Path) -> dict[str, list[str]]:
    """For each stage of rows the ids that it holds."""
    keys = {"speeches": "speech_id", "pairs": "pair_id", "labels": "pair_id", "probe": "key"}
    return {
        stage.name: [row[keys.get(stage.name.split("/")[-1], "response_id")] for row in stage.rows()]
        for stage in read_stages(home / "demo")
        if stage.manifest["files"]
    }


@pytest.fixture(scope="module")
def undisturbed(whole_path: Callable[[str], Path]) -> Path:
    return whole_path("undisturbed")


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
    rubric = load_rubric(str(undisturbed / f"demo/rubric-{stages['judgements'].manifest['config']['rubric']}.yaml"))
    assert rubric == load_rubric("counselling")
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


def test_the_same_command_again_does_nothing(undisturbed):
    text = (undisturbed / "again").read_text()
    assert "starts" not in text and text.count("done before") == len(read_stages(undisturbed / "demo"))
    before, after = (
        Ledger(f"sqlite:///{undisturbed}/{name}.db").summary(str(undisturbed / "demo"))
        for name in ("labels-before", "labels")
    )
    assert after == before != []


def test_every_command_of_the_docs_that_reads_a_finished_run_runs_as_it_stands(undisturbed, monkeypatch):
    told = [words for words in commands() if words[0] in READERS and not NOT_THERE & {*words}]
    assert {words[0] for words in told} == {*READERS}
    for name in ("mine", "law"):
        (undisturbed / name).symlink_to("demo")
    monkeypatch.chdir(undisturbed.parent)
    monkeypatch.delenv("PSYRAY_HOME", raising=False)
    for words in told:
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (words, done.output, done.exception)
    subprocess.run([sys.executable, ROOT / "jobs/report.py", "runs/demo"], check=True)  # and as a job's entry point


@pytest.fixture(scope="module")
def killed(whole_path: Callable[[str], Path]) -> Path:
    return whole_path("killed")


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

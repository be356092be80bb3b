"""Agreement measured through Ray: judges that rate or compare, a reward model; the ledger between, the budget kept.

The rubric is of another field, in another language, with a scale and a number of principles of its own.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from comparing_server import comparing_server
from mlflow import MlflowClient
from typer.testing import CliRunner

from psyray.active.ledger import Ledger
from psyray.active.oracles import label
from psyray.cli import app
from psyray.config import Config, load_config
from psyray.data.judge import Desk
from psyray.engines.judges import make_judge
from psyray.evaluate.measure import Request, measure
from psyray.evaluate.rulings import Again
from psyray.records import Verdict
from psyray.rubric import load_rubric
from psyray.run import Folder

COOKING = {
    "name": "kochen",
    "scale": [0, 9],
    "speaker": "gast",
    "principles": {
        "geschmack": {"name": "Geschmack", "weight": 2, "guidance": "Schmeckt es?"},
        "einfach": {"name": "Einfachheit", "guidance": "Gelingt es in einer kleinen Küche?"},
        "gesund": {"name": "Gesundheit", "guidance": "Tut es gut?"},
    },
    "prompt": "Bewerte den Rat.\n{principles}\nVon {low} bis {high}.\n{conversation}\n\nRat:\n{response}",
    "json_instruction": "Antworte mit JSON, Schlüssel: {keys}.",
    "pairwise_prompt": "Welcher Rat ist besser?\n{principles}\n{conversation}\n\nRat A:\n{a}\n\nRat B:\n{b}\n\n"
    "Antworte mit einem Wort: A, B oder tie.",
}
MARKS = {"one": "Rat:", "a": "Rat A:", "b": "Rat B:", "keys": r"Schlüssel: (.*)\."}
ROWS = [  # prompt, better, worse: as the labels have it
    ("plain one", "salt ++", "salt"), ("plain two", "fry +", "fry"), ("plain three", "boil", "boil +++"),
    ("plain four", "bake ++", "bake ++ well"), ("biased", "grill ++", "grill"), ("odd", "steam +", "steam"),
]  # fmt: skip


@pytest.fixture
def declared(tmp_path: Path) -> Path:
    with (tmp_path / "set.csv").open("w", newline="") as out:
        csv.writer(out).writerows([("frage", "gut", "schlecht"), *ROWS])
    tree = {"name": "cooking", "path": "set.csv", "prompt": "frage",
            "tiers": {"columns": {"good": ["gut"], "bad": ["schlecht"]}}}  # fmt: skip
    (tmp_path / "set.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    (tmp_path / "kochen.yaml").write_text(yaml.safe_dump(COOKING, allow_unicode=True))
    return tmp_path / "set.yaml"


def settings(tmp_path: Path, url: str, *more: str) -> Config:
    words = [f"run.path={tmp_path}/runs/x", f"rubric={tmp_path}/kochen.yaml", "judge.engine=http", "judge.model=m",
             f"judge.url={url}", "judge.retries=0", *more]  # fmt: skip
    return load_config(None, words)


def test_a_judge_that_compares_is_asked_in_both_orders_and_both_verdicts_are_kept(tmp_path, declared, ray_cluster):
    with comparing_server(**MARKS) as server:
        config = settings(tmp_path, server.url, "judge.form=pairwise")
        found, folder = measure(config, Request(declared))
        assert len(server.calls) == 2 * len(ROWS)
        assert measure(config, Request(declared))[0] == found and len(server.calls) == 2 * len(ROWS)
    judge = found["strata"]["good>bad"]["judge"]
    assert (judge["right"], judge["ties"], judge["wrong"], judge["invalid"]) == (2, 2, 1, 1)
    assert judge["accuracy"] == (2 + 2 / 2) / 5
    assert found["position"]["changed"]["value"] == 1 / 5 and found["position"]["first_shown_wins"] == 1
    assert found["ledger"]["bought"] == len(ROWS) and found["ledger"]["failed"] == 1
    rows = pq.read_table(next(folder.glob("stages/agreement/*/data-*.parquet"))).to_pylist()
    by_text = {min(row["a"], row["b"]): row for row in rows}
    assert by_text["grill"]["orders"] == ["A", "B"] and by_text["grill"]["verdict"] == "tie"
    assert by_text["steam"]["verdict"] == "invalid" and "none of A, B, tie" in by_text["steam"]["error"]
    assert json.loads((folder / "agreement.json").read_text()) == found
    assert (folder / "agreement.png").stat().st_size > 1000
    mlflow = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    everywhere = [experiment.experiment_id for experiment in mlflow.search_experiments()]
    (noted,) = mlflow.search_runs(everywhere, "tags.`psyray.stage` = 'agreement'")
    assert noted.data.metrics["strata/good_bad/judge/accuracy"] == 0.6


def test_a_judge_that_rates_is_asked_once_per_response_within_its_budget(tmp_path, declared, ray_cluster):
    with comparing_server(**MARKS) as server:
        config = settings(tmp_path, server.url)
        few, _ = measure(config, Request(declared, budget=4))
        assert few["unasked"] == len(ROWS) - 2 and len(server.calls) == 4
        found, _ = measure(config, Request(declared, again=Again(2, comparisons=3)))
        assert len(server.calls) == 2 * len(ROWS) + 2 * 2 * 3
    judge = found["strata"]["good>bad"]["judge"]
    assert (judge["right"], judge["ties"], judge["wrong"], judge["invalid"]) == (4, 1, 1, 0)
    assert found["position"]["applicable"] is False and found["unasked"] == 0
    assert found["repetition"]["comparisons"] == 3 and found["repetition"]["same_answer"]["value"] == 1.0


def test_a_judge_of_moods_does_not_repeat_itself(tmp_path, declared, ray_cluster):
    table = [("frage", "gut", "schlecht"), *((f"moody {n}", "stew", f"stew {n} +") for n in range(6))]
    with (tmp_path / "set.csv").open("w", newline="") as out:
        csv.writer(out).writerows(table)
    with comparing_server(**MARKS) as server:
        config = settings(tmp_path, server.url, "judge.form=pairwise")
        found, _ = measure(config, Request(declared, again=Again(2)))
    again = found["repetition"]
    assert again["times"] == 2 and again["same_verdict"]["value"] == again["same_answer"]["value"] == 0.0


def test_the_oracle_of_a_round_compares_by_any_fields_rubric(tmp_path, declared, ray_cluster):
    a, b = ({"messages": [{"role": "user", "content": "plain"}], "text": text} for text in ("salt ++", "salt"))
    with comparing_server(**MARKS) as server:
        config = settings(tmp_path, server.url, "judge.form=pairwise")
        rubric = load_rubric(config.rubric)
        judge = make_judge(config.judge, rubric, config.engine, 10)
        desk = Desk(judge, rubric, Ledger(f"sqlite:///{tmp_path}/l.db"), "run", config.judge)
        folder = Folder(tmp_path)
        forward, _ = label(folder, desk, [(a, b, {"value": 1.0})], purpose="round-1", strategy="drts", budget=5)
        backward, counts = label(folder, desk, [(b, a, {"value": 1.0})], purpose="round-1", strategy="drts", budget=5)
    assert forward[0] is not None and forward[0][:2] == (Verdict.A, 1.0)
    assert backward[0] is not None and backward[0][:2] == (Verdict.B, -1.0)
    assert counts["bought"] == 1 and len(server.calls) == 2
    assert all("Geschmack" in prompt and "Gast:\nplain" in prompt for prompt in server.calls)


@pytest.mark.parametrize("form", ["pointwise", "pairwise"])
def test_a_panel_is_measured_by_what_its_rules_make_of_its_judges(tmp_path, declared, ray_cluster, form):
    with comparing_server(**MARKS) as server:
        alone, _ = measure(settings(tmp_path, server.url, f"judge.form={form}"), Request(declared))
        member = {"engine": "http", "url": server.url, "retries": 0, "form": form}
        judges = [{**member, "model": name} for name in ("m", "n", "o")]
        tree = {"run": {"path": f"{tmp_path}/runs/x"}, "rubric": f"{tmp_path}/kochen.yaml", "panel": {"judges": judges}}
        (tmp_path / "panel.yaml").write_text(yaml.safe_dump(tree))
        calls = len(server.calls)
        found, _ = measure(load_config(tmp_path / "panel.yaml"), Request(declared))
        # The first judge's answers were bought before; only its failure, in both orders, may be bought again.
        assert len(server.calls) == 3 * calls + (2 if form == "pairwise" else 0)
    assert found["judge_id"].startswith("panel-")
    assert found["strata"]["good>bad"]["judge"] == alone["strata"]["good>bad"]["judge"]
    assert found["position"]["applicable"] is False


def test_a_reward_model_with_and_without_heads(tmp_path, declared, tiny_model, ray_cluster):
    import numpy as np
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from psyray.reward.heads import Heads

    torch.manual_seed(0)
    reward = tmp_path / "reward"
    model = AutoModelForSequenceClassification.from_pretrained(str(tiny_model), num_labels=1)
    model.to(torch.bfloat16).save_pretrained(reward)
    AutoTokenizer.from_pretrained(str(tiny_model)).save_pretrained(reward)
    width = model.config.hidden_size
    Heads(np.random.default_rng(0).normal(size=(3, width)), np.zeros(width), np.ones(width)).save(tmp_path / "h.npz")
    config = load_config(None, [f"run.path={tmp_path}/runs/x"])
    plain, folder = measure(config, Request(declared, reward=reward, again=Again(1)))
    headed, other = measure(config, Request(declared, reward=reward, heads=tmp_path / "h.npz"))
    assert folder != other and plain["judge_id"].startswith("reward-")
    for found in (plain, headed):
        judge = found["strata"]["good>bad"]["judge"]
        assert judge["right"] + judge["wrong"] + judge["ties"] == len(ROWS) and judge["invalid"] == 0
    assert plain["repetition"]["comparisons"] == len(ROWS) and plain["repetition"]["same_verdict"]["value"] == 1.0
    assert "ledger" not in plain and not (tmp_path / "runs/labels.db").exists()


def test_the_command_prints_the_table(tmp_path, declared, ray_cluster):
    words = ["agreement", str(declared), f"run.path={tmp_path}/runs/x", "--repeats", "1"]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "on cooking: 6 comparisons" in result.output and "same answer 100.0 %" in result.output
    assert "position bias: not applicable" in result.output

"""`psyray layers`: a planted layer is found, what cannot be told apart is said to be so, and the whole command."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from psyray.active.replay import Bank
from psyray.cli import app
from psyray.config import Config
from psyray.errors import PsyrayError
from psyray.evaluate.labelled import Labelled
from psyray.evaluate.layers import RIDGES, Request, configuration, figures, held_out_margins, length_margins, measure
from psyray.evaluate.layers_report import page, verdict
from psyray.records import Verdict, speech_id
from psyray.reward.body import Reading
from psyray.sections.learning import EfficiencySection
from psyray.sections.place import TrackSection

P, K, D = 60, 4, 6


def made_bank(noise: float, seed: int = 0) -> Bank:
    """Reply k of a prompt beats those after it; the first feature tells, but for the noise, the rest nothing."""
    rng = np.random.default_rng(seed)
    features_PKD = rng.normal(size=(P, 1, D)) + 0.1 * rng.normal(size=(P, K, D))
    features_PKD[:, :, 0] = np.arange(K)[::-1] + noise * rng.normal(size=(P, K))
    labels_KK = np.triu(np.ones((K, K), dtype=np.intp), 1)
    strata_KK = np.maximum(*np.indices((K, K))) - 1
    tile = (P, 1, 1)
    return Bank(features_PKD, np.tile(labels_KK - labels_KK.T, tile), np.tile(strata_KK, tile), ("x", "y", "z"))


def test_margins_come_from_heads_that_did_not_see_the_prompt() -> None:
    clear, blind = held_out_margins(made_bank(0.1)), held_out_margins(made_bank(1e6))
    assert clear.shape == (len(RIDGES), P * 6) and (clear > 0).mean() > 0.99
    assert 0.4 < (blind[-1] > 0).mean() < 0.6  # a head that had seen them would do better
    assert (np.diff(np.abs(clear).mean(axis=1)) > 0).all()  # the strongest ridge, which comes first, is least sure


def test_a_head_did_not_see_another_length_of_the_conversation_either() -> None:
    rng = np.random.default_rng(0)
    talks_P = np.arange(P) // 5
    better_PD = rng.normal(size=(P // 5, 40))[talks_P]  # what is better is another thing in each conversation
    features_PKD = np.stack([better_PD, -better_PD], axis=1) + 0.1 * rng.normal(size=(P, 2, 40))
    labels_KK = np.array([[0, 1], [-1, 0]])
    alone = Bank(features_PKD, np.tile(labels_KK, (P, 1, 1)), np.zeros((P, 2, 2), dtype=np.intp), ("x",))
    together = replace(alone, talks_P=talks_P)
    leaked, kept = (float((held_out_margins(bank)[-1] > 0).mean()) for bank in (alone, together))
    assert leaked > 0.95 and kept < 0.75
    right_MN = np.where(alone.conversation_P // 5 % 2, 1.0, -1.0)[None]  # a whole conversation, or nothing of it
    narrow, wide = (
        figures(right_MN, np.ones(P), [Reading(0, "mean")], [1.0], bank)["readings"][0]["all"]
        for bank in (alone, together)
    )
    assert wide[2] - wide[0] > 1.8 * (narrow[2] - narrow[0])


def test_the_planted_reading_is_best_and_its_twin_is_as_good() -> None:
    banks = [made_bank(noise, seed) for seed, noise in enumerate((3.0, 0.5, 0.5, 1e6))]
    readings = [Reading(0, "mean"), Reading(1, "mean"), Reading(1, "last"), Reading(2, "last")]
    margins_MN = np.stack([held_out_margins(bank)[RIDGES.index(10)] for bank in banks])
    length_N = np.where(np.arange(margins_MN.shape[1]) % 2, 3.0, -3.0)
    found = figures(margins_MN, length_N, readings, [1.0, 10.0, 10.0, 100.0], banks[0])
    told = {(row["layer"], row["pooling"]): row for row in found["readings"]}
    assert list(told)[-2:] == [(0, "mean"), (2, "last")]
    assert [row["as_good"] for row in found["readings"]] == [True, True, False, False]
    best = found["readings"][0]
    assert best["behind"] == [0.0, 0.0, 0.0] and best["ridge"] == 10.0
    for row in found["readings"]:
        low, value, high = row["accuracy"]
        assert low <= value <= high
        assert value == pytest.approx(np.mean([share[1] for share in row["strata"].values()]))
        assert row["behind"][1] == pytest.approx(best["accuracy"][1] - value)
    assert found["longer_wins"]["all"][1] == pytest.approx(0.5) and found["strata"] == ["x", "y", "z"]
    # Of six pairs a prompt one is x, two y, three z: the mean over strata counts them alike, the mean over pairs not.
    counts = dict(zip("xyz", (1, 2, 3), strict=True))
    every = sum(counts[name] * share[1] for name, share in best["strata"].items()) / 6
    assert best["all"][1] == pytest.approx(every)


def test_intervals_are_as_wide_as_prompts_are_few() -> None:
    bank = made_bank(0.0)
    prompt_N = bank.pairs()[0]
    margins_MN = np.where(prompt_N % 2, 1.0, -1.0)[None]  # all pairs of a prompt are right, or all wrong
    found = figures(margins_MN, np.ones(len(prompt_N)), [Reading(0, "mean")], [1.0], bank)
    low, value, high = found["readings"][0]["all"]
    assert value == 0.5 and (high - low) / 4 == pytest.approx(0.5 / np.sqrt(P), rel=0.15)


def test_what_is_printed_can_be_configured() -> None:
    words = yaml.safe_dump(configuration({"layer": 20, "pooling": "mean", "ridge": 100.0}, 30))
    config = Config.model_validate(yaml.safe_load(words))
    assert (config.reward.heads.layer, config.reward.heads.pooling, config.reward.heads.ridge) == (20, "mean", 100)
    assert (config.efficiency.layer, config.efficiency.pooling) == (20, "mean")
    last = configuration({"layer": 30, "pooling": "last", "ridge": 10.0}, 30)
    assert last["reward"]["heads"]["layer"] is None and last["efficiency"]["layer"] == 30


def item(number: int, a: str, b: str) -> Labelled:
    messages = [{"role": "user", "content": f"Prompt {number}"}]
    return Labelled(speech_id(messages), messages, a, b, "good>poor", Verdict.A)


def test_lengths_are_those_of_the_same_pairs() -> None:
    assert sorted(length_margins([item(0, "aaaa", "b"), item(1, "a", "bbb")])) == [-2, 3]


DECLARED = "name: made-up\npath: made_up.csv\nprompt: prompt\ntiers:\n  columns: {good: [g], poor: [p1, p2]}\n"


@pytest.fixture
def declaration(tmp_path: Path) -> Path:
    with (tmp_path / "made_up.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "g", "p1", "p2"])
        writer.writerows([f"Prompt {n}", f"You feel {n}.", f"Do {n}.", f"Never mind {n}!"] for n in range(30))
    path = tmp_path / "made_up.yaml"
    path.write_text(DECLARED)
    return path


def test_the_whole_command(
    declaration: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PSYRAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    out = tmp_path / "out"
    words = ["layers", str(declaration), "--model", str(tiny_model), "--out", str(out), "efficiency.dev_share=0.6"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    found = json.loads((out / "layers.json").read_text())
    assert len(found["readings"]) == 9 and found["layers"] == 2
    assert 15 <= found["prompts"] < 30 and found["pairs"] == 2 * found["prompts"]
    # The good reply says other words than the poor ones; embeddings tell as much.
    best = found["readings"][0]
    assert best["accuracy"][1] > 0.9
    last = next(row for row in found["readings"] if (row["layer"], row["pooling"]) == (0, "last"))
    assert last["accuracy"][1] == 0.5  # every chat ends in the same token, whose embedding tells nothing
    assert not last["as_good"]
    assert page(found) == (out / "layers.md").read_text() and verdict(found) in result.output
    assert f"layer: {best['layer']}" in result.output and (out / "layers.png").stat().st_size > 1000

    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    run_id = json.loads((out / "mlflow.json").read_text())["run_id"]
    curve = {m.step: m.value for m in client.get_metric_history(run_id, "accuracy/last")}
    assert curve[0] == 0.5 and sorted(curve) == [0, 1, 2]

    # The same again computes no feature.
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.parquet")}
    assert len({path.parent for path in files}) == 9
    measure(request(declaration, tiny_model, out, 0.6), lambda line: None)
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.parquet")}


def request(declaration: Path, model: Path, out: Path, dev_share: float) -> Request:
    section = EfficiencySection(model=str(model), dev_share=dev_share)
    return Request(declaration, out, section, TrackSection())


def test_too_few_prompts_are_an_error(declaration: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        PsyrayError, match=r"made-up: \d conversations in the dev part are too few .* efficiency.dev_share"
    ):
        measure(request(declaration, tiny_model, tmp_path / "out", 0.05), lambda line: None)

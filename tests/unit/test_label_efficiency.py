"""`psyray label-efficiency` on a made-up set and the tiny model: features, bank, figures, files, MLflow."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from psyray.config import load_config
from psyray.errors import PsyrayError
from psyray.evaluate.efficiency_report import page, spans, tables
from psyray.evaluate.label_efficiency import Request, bank_of, measure
from psyray.evaluate.labelled import Labelled, load_labelled
from psyray.records import Verdict, speech_id
from psyray.reward import frozen
from psyray.reward.body import Reading
from psyray.reward.frozen import FeatureCache, chat_id
from psyray.sections.learning import EfficiencySection, Pooling
from psyray.sections.place import TrackSection

DECLARED = """
name: made-up
path: made_up.csv
prompt: prompt
tiers:
  columns: {good: [g], fair: [f], poor: [p1, p2]}
"""
COLUMNS = ["prompt", "g", "f", "p1", "p2"]


@pytest.fixture
def declaration(tmp_path: Path) -> Path:
    with (tmp_path / "made_up.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for n in range(30):
            writer.writerow([f"Prompt {n}", f"You feel {n}.", f"It is {n}.", f"Do {n}.", f"Never mind {n}!"])
    path = tmp_path / "made_up.yaml"
    path.write_text(DECLARED)
    return path


def chat(prompt: str, reply: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]


def test_features_are_the_mean_of_a_layer_and_are_kept(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chats = {chat_id(c): c for c in (chat("Hello", "I hear you."), chat("A longer word to begin with", "Go on."))}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    cache = FeatureCache(str(tiny_model), tmp_path, batch_size=2)
    for layer in (0, 1):
        reading = Reading(layer, "mean")
        cache.fill(chats, [reading])
        found = cache.features(chats, reading)
        for key, one in chats.items():
            text = tokenizer.apply_chat_template(one, tokenize=False).rstrip("\n")
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.inference_mode():
                states = model(ids, output_hidden_states=True).hidden_states[layer]
            assert found[key] == pytest.approx(states[0].float().mean(0).numpy(), abs=0.02)
        files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
        cache.fill(chats, [reading])
        assert all((cache.features(chats, reading)[key] == found[key]).all() for key in chats)
        assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    with pytest.raises(ValueError, match="layers 0"):
        cache.fill({"new": chat("a", "b")}, [Reading(3, "mean")])


def test_a_pass_that_was_stopped_goes_on(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "PART", 2)
    chats = {chat_id(c): c for c in (chat("Hello", "Go on." * n) for n in range(1, 8))}
    readings = [Reading(layer, pooling) for layer in (0, 2) for pooling in get_args(Pooling)]
    whole, parted = (FeatureCache(str(tiny_model), tmp_path / name, batch_size=1) for name in ("whole", "parted"))
    whole.fill(chats, readings)
    counted, write = [0], frozen._write

    def stopped(folder: Path, part: Any) -> None:
        if counted[0] == 8:  # in the middle of the second part's six files
            raise KeyboardInterrupt
        counted[0] += 1
        write(folder, part)

    with monkeypatch.context() as cut, pytest.raises(KeyboardInterrupt):
        cut.setattr(frozen, "_write", stopped)
        parted.fill(chats, readings)
    read: list[int] = []
    monkeypatch.setattr(frozen, "_write", lambda folder, part: (read.append(len(part)), write(folder, part)))
    parted.fill(chats, readings)
    assert read == [2] * 12 + [1] * 6  # all but the first part's two chats
    for reading in readings:
        assert all((whole.features(chats, reading)[k] == parted.features(chats, reading)[k]).all() for k in chats)


def test_lengths_of_one_conversation_have_its_number_in_the_bank() -> None:
    opening = [{"role": "user", "content": "I cannot sleep. " * 7}]
    longer = [*opening, {"role": "assistant", "content": "Since when?"}, {"role": "user", "content": "A year."}]
    other = [{"role": "user", "content": "My dog died."}]
    items = [Labelled(speech_id(m), m, "a", "b", "all", Verdict.A) for m in (longer, other, opening)]
    ids = [chat_id([*m, {"role": "assistant", "content": text}]) for m in (opening, longer, other) for text in "ab"]
    prompts, bank = bank_of(items, {key: np.zeros(2) for key in ids})
    number = dict(zip(prompts, bank.conversation_P.tolist(), strict=True))
    assert number[speech_id(opening)] == number[speech_id(longer)] != number[speech_id(other)]


def test_a_bank_holds_each_label_both_ways_and_no_tie(declaration: Path) -> None:
    _, items, _ = load_labelled(declaration)
    tie = Labelled(items[0].speech_id, items[0].messages, items[0].a, "Something new", "poor>poor", Verdict.TIE)
    items = [*items, tie]
    ids = {chat_id([*i.messages, {"role": "assistant", "content": t}]) for i in items for t in (i.a, i.b)}
    prompts, bank = bank_of(items, {key: np.full(2, float(n)) for n, key in enumerate(sorted(ids))})
    assert (len(prompts), bank.features_PKD.shape) == (30, (30, 5, 2))
    assert np.isnan(bank.features_PKD).all(axis=2).sum() == 29  # only the tie's prompt has a fifth reply
    assert (bank.labels_PKK == -bank.labels_PKK.transpose(0, 2, 1)).all()
    assert (bank.labels_PKK > 0).sum() == 30 * 5
    assert bank.strata == ("fair>poor", "good>fair", "good>poor", "poor>poor")
    prompt_N, better_N, worse_N = bank.pairs()
    assert np.bincount(bank.strata_PKK[prompt_N, better_N, worse_N]).tolist() == [60, 30, 60]
    with pytest.raises(PsyrayError, match="nothing to learn"):
        bank_of([tie], {key: np.zeros(2) for key in ids})


def test_the_whole_study(declaration: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSYRAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    section = EfficiencySection(
        strategies=["d_optimal"], seeds=3, batch=2, budget=16, aim=16, model=str(tiny_model), layer=1, components=4
    )
    said: list[str] = []
    request = Request(declaration, tmp_path / "out", section, TrackSection())
    found = measure(request, said.append)
    assert list(found["strategies"]) == ["random", "d_optimal"]
    assert found["prompts"]["report"] < found["prompts"]["all"] == 30
    rows = found["strategies"]["d_optimal"]["budgets"]
    assert [row["labels"] for row in rows] == list(range(2, 17, 2))
    assert all(0 <= row["accuracy"][0] <= row["accuracy"][1] <= row["accuracy"][2] <= 1 for row in rows)
    assert json.loads((tmp_path / "out" / "efficiency.json").read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / "out" / "efficiency.png").stat().st_size > 1000
    assert (tmp_path / "out" / "efficiency.md").read_text() == page(found)
    assert [len(row) for head, table in tables(found, str) for row in (head, *table)] == [3] * 3 + [6] * 3

    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    run_id = json.loads((tmp_path / "out" / "mlflow.json").read_text())["run_id"]
    curve = client.get_metric_history(run_id, "accuracy/d_optimal")
    assert [(m.step, m.value) for m in curve] == [(row["labels"], row["accuracy"][1]) for row in rows]
    assert client.get_run(run_id).data.params["set"] == "made-up"

    too_far = Request(
        declaration, tmp_path / "out", section.model_copy(update={"budget": 512, "aim": 512}), TrackSection()
    )
    with pytest.raises(PsyrayError, match="fewer than the aim, 512"):
        measure(too_far, said.append)


def test_budgets_in_a_row_are_drawn_together() -> None:
    assert spans([32, 48, 56, 64, 96], [32, 40, 48, 56, 64, 72, 96]) == "32, 48-64, 96"
    assert spans([], [8, 16]) == ""


@pytest.mark.parametrize(
    ("word", "says"),
    [("efficiency.strategies=[d-optimal]", "unknown acquisition"), ("efficiency.aim=100", "multiple of 4 x batch")],
)
def test_settings_that_cannot_be(word: str, says: str) -> None:
    with pytest.raises(PsyrayError, match=says):
        load_config(None, [word])

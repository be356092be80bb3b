"""The crisis flag's rates on the speeches that ship do not fall, and the command that tells them counts rightly."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from made_ear import made_ear

from psyray import crisis


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("crisis_rates")


FLOORS = {  # part: (fewest hits of, most false alarms of)
    "mend": (97, 98, 1, 117),
    "held-out": (74, 75, 3, 108),
    "later": (59, 60, 0, 61),
    "strangers": (258, 300, 14, 340),
    "independent": (76, 110, 18, 110),
    "blind": (84, 150, 27, 170),
}


@pytest.mark.parametrize("part", FLOORS)
def test_the_rates_of_the_shipped_speeches_do_not_fall(command: ModuleType, part: str) -> None:
    rates = command.rates(command.shipped()[part])
    (hits, must), (alarms, must_not) = rates["must be flagged"], rates["must not be"]
    fewest, of, most, of_calm = FLOORS[part]
    assert (must, must_not) == (of, of_calm), "the speeches changed: their rates in docs/crisis.md are others too"
    assert hits >= fewest and alarms <= most


def test_every_shipped_speech_says_what_it_is(command: ModuleType) -> None:
    cases = [case for part in command.shipped().values() for case in part]
    assert len({case.text for case in cases}) == len(cases)
    kinds = {"suicide", "self-harm", "abuse", "danger", "danger to others"}
    assert {case.kind for case in cases if case.crisis} == kinds
    assert all(case.form != "-" or (case.kind != "-" and not case.crisis) for case in cases)


def test_wilson_is_the_interval_of_the_textbook(command: ModuleType) -> None:
    assert command.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert command.wilson(0, 0) == (0.0, 1.0) and command.wilson(0, 5)[0] == 0.0 and command.wilson(5, 5)[1] == 1.0


def test_a_file_of_ones_own_is_counted_with_what_it_lacks(
    command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"words": "I want to die", "crisis": True, "kind": "suicide"},
        {"words": "I am fading out", "crisis": True},
        {"words": "I am suicidal"},
    ]
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(sys, "argv", ["crisis_rates", str(file), "--text", "words", "--misread"])
    command.main()
    said = capsys.readouterr().out
    assert "| must be flagged | 1 | 2 | 50.0% |" in said and "| must be flagged: suicide | 1 | 1 |" in said
    assert "| unlabelled: as self-harm | 1 | 1 |" in said and "I am fading out" in said and "I want to die" not in said


def test_a_model_is_counted_alone_and_beside_the_phrases(
    command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {"I want to die": "no", "I am fading out": "yes", "It is raining": "yes", "It is dry": "well"}
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(json.dumps({"text": text, "crisis": "It" not in text}) for text in said))
    with made_ear() as ear:
        ear.replies = said
        words = ["crisis_rates", str(file), "--ask", ear.url, "--ask-model", "listener"]
        monkeypatch.setattr(sys, "argv", words)
        command.main()
    alone, model, both = capsys.readouterr().out.split("own.jsonl, ")[1:]
    assert "| must be flagged | 1 | 2 |" in alone and "| must not be | 0 | 2 |" in alone
    assert "| must be flagged | 1 | 2 |" in model and "| must not be | 1 | 2 |" in model
    assert "| must be flagged | 2 | 2 |" in both and "| must not be | 1 | 2 |" in both
    assert "no answer to 1 of 4 (1 unclear)" in both


def test_what_is_held_out_is_never_shown(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(crisis, "RULES", ())  # so that every crisis is a miss
    monkeypatch.setattr(sys, "argv", ["crisis_rates", "--misread"])
    command.main()
    shown = capsys.readouterr().out
    assert tuple(command.shipped()) == command.PARTS
    for part, cases in command.shipped().items():
        assert all((case.text in shown) == (bool(case.crisis) and part in command.OPEN) for case in cases)

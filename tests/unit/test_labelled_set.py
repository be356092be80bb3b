"""A labelled set that answers in the place of an oracle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_oracles import SPEECH, ask, verdicts

from psyray.active.labelled_set import UNKNOWN, LabelledPairs, labelled_source
from psyray.data.judge import Desk
from psyray.errors import PsyrayError
from psyray.files import write_parquet
from psyray.records import PAIRS, Verdict, content_id, pair_row, speech_id, table
from psyray.sections.learning import OracleSection


def rows_of(*chosen: tuple[str, str]) -> list[dict]:
    speech = {"speech_id": speech_id(SPEECH), "messages": SPEECH, "split": "train"}
    made = [[{"response_id": content_id(t), "text": t, "model": "m"} for t in pair] for pair in chosen]
    return [pair_row(speech, *pair, margin=0.5, source="judge") for pair in made]


def published(folder: Path, *chosen: tuple[str, str]) -> Path:
    lines = [{"ID": "x", "question": SPEECH[0]["content"], "chosen": a, "rejected": b} for a, b in chosen]
    path = folder / "set.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def own(folder: Path, *chosen: tuple[str, str]) -> Path:
    write_parquet(folder / "pairs.parquet", table(rows_of(*chosen), PAIRS))
    return folder / "pairs.parquet"


def labelled(desk: Desk, path: Path) -> LabelledPairs:
    return LabelledPairs(desk, labelled_source(OracleSection(kind="replay", path=str(path))), "regex")


@pytest.mark.parametrize("write", [published, own])
def test_a_labelled_set_answers_what_it_knows(desk, folder, tmp_path, write):
    oracle = labelled(desk, write(tmp_path, ("good 0", "bad 0"), ("bad  1", "good 1"), ("good 3", "bad 3")))
    labels, counts = ask(oracle, folder, 4)
    assert verdicts(labels) == [Verdict.B, Verdict.B, Verdict.INVALID, Verdict.A]
    assert labels[2][2] == {"error": UNKNOWN} and labels[0][1] == -1.0
    assert (counts["bought"], counts["answered"], counts["unknown"]) == (4, 3, 1)
    assert oracle.id == f"replay-{oracle.content}" and ask(oracle, folder, 4)[0] == labels


def test_a_pair_that_the_set_holds_both_ways_goes_to_the_majority_or_is_a_tie(desk, folder, tmp_path):
    both = [("good 0", "bad 0"), ("bad 0", "good 0")]
    path = published(tmp_path, *both, ("good 1", "bad 1"), ("good 1", "bad 1"), ("bad 1", "good 1"))
    labels, _ = ask(labelled(desk, path), folder, 2)
    assert verdicts(labels) == [Verdict.TIE, Verdict.A] and labels[1][1] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("none.jsonl", None, r"no labelled set at .*none\.jsonl \(oracle\.path\)"),
        ("speeches.jsonl", '{"question": "x"}', r"\(oracle\.path\) has no column chosen, rejected; it has question"),
    ],
)
def test_a_set_that_cannot_be_replayed_is_named(tmp_path, name, text, said):
    if text:
        (tmp_path / name).write_text(text)
    with pytest.raises(PsyrayError, match=said):
        labelled_source(OracleSection(kind="replay", path=str(tmp_path / name)))

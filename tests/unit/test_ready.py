"""Ready pairs and pools: on the side of the split where their speech is, and never from a speech that went."""

import json
from math import nan
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_stage import made_stage

from psyray.data.pairs import pairs_stage
from psyray.data.ready import Ready, ready_stage
from psyray.data.speeches import speeches_stage
from psyray.errors import PsyrayError
from psyray.records import JUDGEMENTS, RESPONSES
from psyray.rubric import load_rubric
from psyray.run import Artifact, Run
from psyray.sections.data import PairsSection, SpeechesSection

RUBRIC = load_rubric("counselling")


def question(n: int) -> str:
    return f"Question {n}. " + " ".join(f"My {n + m} letters and the {n * m} windows are too much." for m in range(4))


def row(n: int, chosen: str = "I hear you.", rejected: str = "So what?", high: int | None = 5, low: int = 2) -> dict:
    rated = {
        f"{side}_{key}_rating": value for side, value in (("chosen", high), ("rejected", low)) for key in RUBRIC.keys
    }
    sides = {"chosen": chosen, "rejected": rejected, "chosen_model": "a", "rejected_model": "b"}
    return {"ID": f"{n}", "prefID": n, "question": question(n), **sides, **rated}


def stages(folder: Path, rows: list[dict], use: str, **settings) -> tuple[Run, Artifact, Ready | None]:
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    source = {"name": "set", "path": str(folder / "pairs.parquet"), "use": use}
    section = SpeechesSection.model_validate({"sources": [source], "test_share": 0.5, **settings})
    run = Run(folder / "run", lambda line: None)
    speeches = speeches_stage(run, section)
    return run, speeches, ready_stage(run, section, RUBRIC, speeches)


def paired(run: Run, ready: Ready | None, **settings) -> Artifact:
    """The stage `pairs` of a run in which nothing was drawn or judged."""
    made = {"responses": RESPONSES, "judgements": JUDGEMENTS}
    nothing = (made_stage(run, name, schema, "response_id", []) for name, schema in made.items())
    return pairs_stage(run, PairsSection(**settings), RUBRIC, *nothing, ready)


def test_ready_pairs_are_pairs_on_the_side_of_their_speech(tmp_path):
    rows = [row(n) for n in range(20)] + [row(n, chosen="It hurts.", rejected="Well, well.") for n in range(20)]
    run, speeches, ready = stages(tmp_path, rows, "pairs")
    sides = {s["speech_id"]: s["split"] for s in speeches.rows()}
    assert set(sides.values()) == {"train", "test"} and all(s["answered"] for s in speeches.rows())
    pairs = paired(run, ready).rows()
    assert len(pairs) == 40 and {p["source"] for p in pairs} == {"data set"}
    assert all(p["split"] == sides[p["speech_id"]] and p["margin"] == 3.0 and p["crisis"] is False for p in pairs)
    responses = {r["response_id"]: r for r in ready.responses()}
    assert len(responses) == 80
    assert {p["chosen_id"] for p in pairs} | {p["rejected_id"] for p in pairs} == responses.keys()
    assert ready.artifact.stats["train"] + ready.artifact.stats["test"] == 40


def test_pairs_of_a_speech_that_went_go_too(tmp_path):
    near = row(3) | {"question": question(3).replace("Question", "A question")}
    short, blank = row(50) | {"question": "Too short."}, row(4, chosen=" ")
    rows = [*(row(n) for n in range(20)), near, short, blank, row(5, rejected="I  hear you."), row(6)]
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": question(7)}))
    run, _, ready = stages(tmp_path, rows, "pairs", exclude=[str(tmp_path / "test.jsonl")])
    counts = ready.artifact.stats
    assert counts["no text"] == counts["same text"] == counts["duplicate"] == 1
    assert counts["speech dropped"] == 3  # the near-duplicate or its twin, the short one, the one in the test set
    assert counts["train"] + counts["test"] == len(paired(run, ready).rows()) == 19
    assert not {p["messages"][0]["content"] for p in paired(run, ready).rows()} & {question(7)}


def test_a_pair_that_stands_both_ways_round_is_no_label(tmp_path):
    turned = row(3, chosen="So what?", rejected="I hear you.")
    _, _, ready = stages(tmp_path, [*(row(n) for n in range(20)), turned], "pairs")
    assert ready.artifact.stats["both ways round"] == 2 and len(list(ready.pairs())) == 19


def test_a_pool_goes_through_the_gap_rule(tmp_path):
    rows = [row(n) for n in range(20)] + [row(n, rejected="Hm.", low=4) for n in range(20)]
    rows += [row(n, chosen="Unrated.", high=None) for n in range(20)]
    run, _, ready = stages(tmp_path, rows, "pool")
    rated = [r for r in ready.responses() if set(RUBRIC.keys) <= set(r["ratings"] or {})]
    assert list(ready.pairs()) == [] and len(rated) == 60
    pairs = paired(run, ready, gap=1.5).rows()
    assert len(pairs) == 40 and {p["source"] for p in pairs} == {"judge"}
    assert {(p["chosen"], p["rejected"]) for p in pairs} == {("I hear you.", "So what?"), ("Hm.", "So what?")}


def test_a_rating_that_is_no_number_costs_its_response_alone(tmp_path):
    rows = [row(n) for n in range(20)]
    # Sorted among the others, the NaN would part the best from the worst, and their pair would be "gap too small".
    rows += [row(n, chosen="Hm.", rejected="Well.", high=4, low=3) | {"rejected_safety_rating": nan} for n in range(20)]
    run, _, ready = stages(tmp_path, rows, "pool")
    assert ready.artifact.stats["unusable ratings"] == 20
    pairs = paired(run, ready, gap=2.0)
    assert {(p["chosen"], p["rejected"]) for p in pairs.rows()} == {("I hear you.", "So what?"), ("Hm.", "So what?")}
    assert len(pairs.rows()) == 40 and all(p["margin"] >= 2.0 for p in pairs.rows())


def test_ready_pairs_with_a_rating_that_is_no_number_have_no_made_up_margin(tmp_path):
    rows = [row(n) | {"chosen_empathy_rating": nan} for n in range(20)]
    _, _, ready = stages(tmp_path, rows, "pairs")
    assert {p["margin"] for p in ready.pairs()} == {None} and len(list(ready.pairs())) == 20


def test_names_go_from_the_responses_as_from_the_speech(tmp_path):
    rows = [row(n) for n in range(20)]
    rows[2] |= {"question": question(2) + " My name is Anna.", "chosen": "Write to a@b.org."}
    _, _, ready = stages(tmp_path, rows, "pairs")
    found = [p for p in ready.pairs() if "[name]" in p["messages"][0]["content"]]
    assert [p["chosen"] for p in found] == ["Write to [email]."] and len(list(ready.pairs())) == 20


def test_half_a_character_in_a_response_stops_no_set(tmp_path):
    rows = [row(n, chosen="I hear you \ud83d.") for n in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    source = {"name": "set", "path": str(tmp_path / "pairs.jsonl"), "use": "pairs"}
    section = SpeechesSection.model_validate({"sources": [source], "test_share": 0.5})
    run = Run(tmp_path / "run", lambda line: None)
    ready = ready_stage(run, section, RUBRIC, speeches_stage(run, section))
    assert [pair["chosen"] for pair in ready.pairs()] == ["I hear you \ufffd."] * 20


def test_a_source_without_pairs_cannot_be_used_as_pairs(tmp_path):
    with pytest.raises(PsyrayError, match="needs the columns chosen and rejected"):
        stages(tmp_path, [{"question": question(n)} for n in range(9)], "pairs")

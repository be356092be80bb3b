"""What differs between two data sets: found where it was put, and nothing where nothing was."""

import io
import json
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_pairs import finished_run
from rich.console import Console
from typer.testing import CliRunner

from psyray.cli import app
from psyray.data.compare import compare, principles, show
from psyray.data.export import export_run
from psyray.errors import PsyrayError

DIFFERENCES = ("only_in_a", "only_in_b", "changed_labels", "changed_ratings")


def rows(count=6):
    rated = {"chosen_empathy_rating": 4, "rejected_empathy_rating": 2}
    rated |= {"chosen_safety_rating": 5, "rejected_safety_rating": 5}
    return [
        {
            "ID": f"s{n // 2}",
            "prefID": n,
            "question": f"question {n // 2}",
            "chosen": f"good {n}",
            "rejected": f"bad {n}",
        }
        | rated
        for n in range(count)
    ]


def swapped(row):
    other = {"chosen": "rejected", "rejected": "chosen"}
    return {
        name: row[name.replace(side, other[side], 1)] if (side := name.split("_")[0]) in other else row[name]
        for name in row
    }


def file(path, listed):
    pq.write_table(pa.Table.from_pylist(listed), path)
    return path


def differences(tmp_path, a, b):
    found = compare(file(tmp_path / "a.parquet", a), file(tmp_path / "b.parquet", b))
    return found, {name: found[name]["pairs"] for name in DIFFERENCES if found[name]["pairs"]}


def test_a_data_set_does_not_differ_from_itself_in_any_order(tmp_path):
    found, different = differences(tmp_path, rows(), rows()[::-1])
    assert different == {}
    assert found["a"] == {"rows": 6, "pairs": 6, "questions": 3, "ids": 3, "labelled_both_ways": 0} == found["b"]
    assert found["shared"] == {"pairs": 6, "questions": 3, "ids": 3}
    assert found["principles"] == {key: {"changed": 0, "mean_change": 0.0} for key in ("empathy", "safety")}


def test_swapped_labels_are_found_and_their_ratings_follow_the_texts(tmp_path):
    other = rows()
    other[1], other[4] = swapped(other[1]), swapped(other[4])
    found, different = differences(tmp_path, rows(), other)
    assert different == {"changed_labels": 2} and found["changed_labels"]["examples"] == ["s0", "s2"]


def test_changed_ratings_are_found_by_principle(tmp_path):
    other = rows()
    other[0]["chosen_empathy_rating"] = 5
    other[3]["rejected_empathy_rating"] = 1
    other[3]["chosen_empathy_rating"] = 5
    found, different = differences(tmp_path, rows(), other)
    assert different == {"changed_ratings": 2} and found["changed_ratings"]["examples"] == ["s0", "s1"]
    # Of 12 ratings of empathy three changed, by +1, +1 and -1.
    assert found["principles"]["empathy"] == {"changed": 3, "mean_change": round(1 / 12, 4)}
    assert found["principles"]["safety"] == {"changed": 0, "mean_change": 0.0}


def test_pairs_of_one_only_and_what_is_shared(tmp_path):
    other = [*rows()[2:], rows(8)[6] | {"ID": "new"}]
    found, different = differences(tmp_path, rows(), other)
    assert different == {"only_in_a": 2, "only_in_b": 1}
    assert found["only_in_a"]["examples"] == ["s0"] and found["only_in_b"]["examples"] == ["new"]
    assert found["shared"] == {"pairs": 4, "questions": 2, "ids": 2}


def test_ids_do_not_matter_and_neither_do_spaces_or_unicode_forms(tmp_path):
    a = [row | {"question": f"café {row['ID']}"} for row in rows()]
    b = [
        row | {"ID": f"x{n}", "question": f"  {unicodedata.normalize('NFD', row['question'])}\n"}
        for n, row in enumerate(a)
    ]
    found, different = differences(tmp_path, a, b)
    assert different == {} and found["shared"] == {"pairs": 6, "questions": 3, "ids": 0}


def test_a_pair_that_stands_there_twice_or_both_ways_counts_once(tmp_path):
    a = [*rows(), rows()[0], swapped(rows()[1])]
    found, different = differences(tmp_path, a, rows())
    assert found["a"]["rows"] == 8 and found["a"]["pairs"] == 6 and found["a"]["labelled_both_ways"] == 1
    assert different == {}


def test_a_data_set_without_ratings_or_ids_compares_by_its_texts(tmp_path):
    bare = [{key: row[key] for key in ("question", "chosen", "rejected")} for row in rows()]
    found, different = differences(tmp_path, rows(), [swapped(bare[0]), *bare[1:]])
    assert different == {"changed_labels": 1} and found["b"]["ids"] == 0
    assert found["principles"] == {} and found["principles_of_one_only"] == ["empathy", "safety"]


@settings(deadline=None, max_examples=15)
@given(st.lists(st.sampled_from(["same", "swap", "gone", "rated"]), min_size=1, max_size=12))
def test_every_change_is_counted_once_and_the_same_from_both_sides(tmp_path_factory, changes):
    tmp_path = tmp_path_factory.mktemp("compare")
    a, b = rows(len(changes)), []
    for row, change in zip(a, changes, strict=True):
        if change != "gone":
            b.append(
                swapped(row) if change == "swap" else row | {"chosen_safety_rating": 1} if change == "rated" else row
            )
    b.append(rows(100)[99])
    found, _ = differences(tmp_path, a, b)
    there, _ = differences(tmp_path, b, a)
    assert found["changed_labels"]["pairs"] == there["changed_labels"]["pairs"] == changes.count("swap")
    assert found["changed_ratings"]["pairs"] == there["changed_ratings"]["pairs"] == changes.count("rated")
    assert found["only_in_a"]["pairs"] == there["only_in_b"]["pairs"] == changes.count("gone")
    assert found["only_in_b"]["pairs"] == there["only_in_a"]["pairs"] == 1


def test_exports_of_two_gaps_differ_by_the_pairs_between_them(tmp_path):
    wide, narrow = tmp_path / "wide", tmp_path / "narrow"
    lost = len(finished_run(tmp_path / "run", gap=1.0).rows()) - len(finished_run(tmp_path / "run", gap=2.0).rows())
    finished_run(tmp_path / "run", gap=1.0)
    export_run(tmp_path / "run", narrow)
    finished_run(tmp_path / "run", gap=2.0)
    export_run(tmp_path / "run", wide)
    found = compare(narrow, wide)
    assert found["only_in_a"]["pairs"] == lost > 0 and found["only_in_b"]["pairs"] == 0
    assert found["changed_labels"]["pairs"] == found["changed_ratings"]["pairs"] == 0


def test_the_tables_name_ids_and_never_texts(tmp_path):
    other = [swapped(rows()[0]), *rows()[1:5], rows()[5] | {"chosen_empathy_rating": 3}]
    paths = [str(file(tmp_path / name, listed)) for name, listed in (("a.parquet", rows()), ("b.parquet", other))]
    out = Console(width=160, record=True, file=io.StringIO())
    show(compare(*map(Path, paths)), out)
    text = out.export_text()
    assert "changed labels" in text and "s0" in text and "-0.083" in text
    result = CliRunner().invoke(app, ["compare", *paths, "--json"])
    assert json.loads(result.output)["changed_labels"] == {"pairs": 1, "examples": ["s0"]}
    for words in (text, result.output):
        assert "question 0" not in words and "good" not in words


def test_what_is_no_data_set_is_refused(tmp_path):
    with pytest.raises(PsyrayError, match="no Parquet file at"):
        compare(tmp_path, tmp_path)
    pq.write_table(pa.table({"question": ["a"]}), tmp_path / "p.parquet")
    with pytest.raises(PsyrayError, match=r"p.parquet is not in the layout .*no column chosen, rejected"):
        compare(tmp_path / "p.parquet", tmp_path / "p.parquet")


def test_a_principle_needs_both_sides():
    assert principles(["chosen_a_b_rating", "rejected_a_b_rating", "chosen_c_rating", "a_rating"]) == ["a_b"]

"""A run's pairs as a data set: it loads, it says what it is, it never overwrites what is not its own."""

import json
import re
import shlex
import shutil
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from made_pairs import RUBRIC, add_topics, finished_run
from typer.testing import CliRunner

from psyray.cli import app
from psyray.data import export
from psyray.data.export import export_run, other_content
from psyray.data.layout import from_layout, rating_columns
from psyray.errors import PsyrayError
from psyray.rubric import load_rubric
from psyray.run import read_stages

PAGE = Path(__file__).parents[2] / "docs/export.md"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    where = tmp_path_factory.mktemp("home") / "runs/demo"
    finished_run(where)
    return where


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def card_of(folder):
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_export_loads_as_a_data_set_in_the_published_layout(home, tmp_path):
    made = {p["pair_id"]: p for p in finished_run(home).rows()}
    export_run(home, tmp_path / "out")
    loaded = datasets.load_dataset(str(tmp_path / "out"))
    texts = ["ID", "prefID", "question", "chosen", "rejected", "chosen_model", "rejected_model"]
    assert set(loaded) == {"train", "test"} and loaded["train"].column_names == texts + rating_columns(RUBRIC.keys)
    rows = [row | {"split": split} for split in loaded for row in loaded[split]]
    assert {row["prefID"] for row in rows} == {int(key[:15], 16) for key in made} and len(rows) == len(made)
    by_id = {int(key[:15], 16): pair for key, pair in made.items()}
    for row in rows:
        pair = by_id[row["prefID"]]
        assert (row["ID"], row["split"]) == (pair["speech_id"], pair["split"])
        assert row["question"] == pair["messages"][-1]["content"]
        assert (row["chosen"], row["rejected"]) == (pair["chosen"], pair["rejected"])
        assert row["chosen_empathy_rating"] == pair["chosen_ratings"]["empathy"]
    assert {row["chosen_model"] for row in rows} == {"llama 3b", "m"}


def test_the_export_comes_back_as_pairs_with_whole_conversations(home, tmp_path):
    made = [p for p in finished_run(home).rows() if p["split"] == "train"]
    export_run(home, tmp_path / "out", full=True)
    written = pq.read_table(tmp_path / "out/data/train-00000-of-00001.parquet").to_pylist()
    back = [from_layout(row, row["messages"], RUBRIC) | {"split": "train"} for row in written]
    seen = ["speech_id", "messages", "chosen", "rejected", "chosen_ratings", "rejected_ratings", "margin", "split"]
    assert sorted(([p[key] for key in seen] for p in back), key=str) == sorted(
        ([p[key] for key in seen] for p in made), key=str
    )
    assert any(len(p["messages"]) > 1 for p in back)


def test_full_adds_columns_and_rounds_a_subset(home, tmp_path):
    pair = finished_run(home).rows()[0]
    export_run(home, tmp_path / "out", full=True, rounds=True)
    loaded = datasets.load_dataset(str(tmp_path / "out"))
    (row,) = [r for split in loaded for r in loaded[split] if r["pair_id"] == pair["pair_id"]]
    assert row["margin"] == pair["margin"] and row["source"] == "judge" and row["messages"] == pair["messages"]
    assert {r["topic"] for r in loaded["train"]} == {"sleep", "work", "a | b"}
    assert {r["crisis"] for r in loaded["train"]} == {True, False}
    (asked,) = datasets.load_dataset(str(tmp_path / "out"), "rounds")["train"]
    assert asked["round"] == 1 and asked["source"] == "oracle" and asked["chosen_safety_rating"] is None


def test_topics_that_an_engine_picked_are_those_of_the_export(home, tmp_path):
    where = tmp_path / "run"
    shutil.copytree(home, where)
    add_topics(where, {stage.name: stage for stage in read_stages(where)}["speeches"].rows())
    known = export_run(where, tmp_path / "out", full=True)
    assert {t["topic"] for t in known["topics"]} == {"picked", ""}
    loaded = datasets.load_dataset(str(tmp_path / "out"))["train"]
    assert {(r["topic"], r["subtopic"]) for r in loaded} == {("picked", "so"), (None, None)}


def test_large_exports_are_cut_into_files_that_hold_every_row_once(home, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "ROWS_PER_FILE", 7)
    monkeypatch.setattr(export, "ROWS_PER_GROUP", 5)
    known = export_run(home, tmp_path / "out")
    train = known["splits"][0]["pairs"]
    files = sorted((tmp_path / "out/data").glob("train-*"))
    assert [f.name for f in files] == [f"train-{i:05d}-of-{-(-train // 7):05d}.parquet" for i in range(-(-train // 7))]
    assert [pq.read_metadata(f).num_rows for f in files] == [7] * (train // 7) + ([train % 7] if train % 7 else [])
    whole = [row for f in files for row in pq.read_table(f, columns=["ID", "prefID"]).to_pylist()]
    assert len({row["prefID"] for row in whole}) == train and whole == sorted(whole, key=lambda r: r["ID"])
    assert datasets.load_dataset(str(tmp_path / "out"))["train"].num_rows == train


def test_an_export_written_again_keeps_its_licence_until_another_is_named(home, tmp_path):
    said = [export_run(home, tmp_path / "out", licence=given)["licence"] for given in (None, "cc-by-4.0", None, "mit")]
    assert said == ["unknown", "cc-by-4.0", "cc-by-4.0", "mit"]
    assert card_of(tmp_path / "out")[0]["license"] == "mit"


def test_the_card_tells_what_the_data_hold(home, tmp_path):
    made = finished_run(home)
    known = export_run(home, tmp_path / "out", rounds=True, licence="cc-by-4.0")
    front, body = card_of(tmp_path / "out")
    assert front["license"] == "cc-by-4.0" and front["size_categories"] == ["n<1K"]
    rows = made.rows()
    train = [p for p in rows if p["split"] == "train"]
    split = known["splits"][0]
    assert (split["pairs"], split["speeches"]) == (len(train), len({p["speech_id"] for p in train}))
    longer = sum(len(p["chosen"]) > len(p["rejected"]) for p in train) / len(train)
    assert split["chosen_longer"] == pytest.approx(longer, abs=1e-4)
    assert split["several_turns"] == sum(len(p["messages"]) > 1 for p in train) > 0
    assert sum(m["chosen"] for m in known["models"]) == len(rows) == sum(t["pairs"] for t in known["topics"])
    mean = sum(p["chosen_ratings"]["safety"] for p in rows) / len(rows)
    (safety,) = [p for p in known["rubric"]["principles"] if p["key"] == "safety"]
    assert safety["chosen"] == pytest.approx(mean, abs=0.005)
    assert known["rounded_not_ahead"] == 0 and known["agreement"] == {1: 0.75}
    assert known["dropped"]["speeches"] == {"too short": 3} and known["dropped"]["pairs"] == made.stats["dropped"]
    told = [
        f"| train | {len(train)} |",
        "round 1: 75.0 %",
        "3 too short",
        "| a \\| b |",
        made.fingerprint,
        "`gap: 1.0`",
    ]
    told += ["`veto: ['safety']`", "by a fixed rule", "conversations of several turns", "| 1 | oracle | 1 |"]
    told += [f"Labelled by: judge ({len(rows)})."]
    for words in told:
        assert words in body, words
    assert "No licence" not in body and str(home) not in body
    assert "How far it agrees with people was not measured" in body


def test_the_card_names_no_margin_where_the_pairs_have_none(tmp_path):
    made = finished_run(tmp_path / "run")
    for file in made.files:
        rows = pq.read_table(file)
        column = rows.schema.get_field_index("margin")
        pq.write_table(rows.set_column(column, "margin", pa.nulls(len(rows), pa.float32())), file)
    export_run(tmp_path / "run", tmp_path / "out")
    assert re.search(r"\| train \| \d+ \| \d+ \| none \|", card_of(tmp_path / "out")[1])


def test_the_card_tells_how_far_this_judge_agrees_with_people(home, tmp_path):
    def measured(judge, accuracy):
        side = {"accuracy": accuracy, "low": 0.5, "high": 0.75}
        strata = {
            "hq>mq": {"judge": side, "longer_wins": {"accuracy": None}},
            "none": {"judge": side | {"accuracy": None}},
        }
        strata["none"]["longer_wins"] = {"accuracy": 0.5}
        folder = tmp_path / f"agreement-set-{judge}"
        folder.mkdir()
        (folder / "agreement.json").write_text(json.dumps({"set": "tiers", "judge_id": judge, "strata": strata}))

    shutil.copytree(home, tmp_path / "demo")
    measured("j", 0.625)
    measured("another", 0.9)
    known = export_run(tmp_path / "demo", tmp_path / "out")
    assert [(row["set"], row["stratum"], row["accuracy"]) for row in known["with_people"]] == [
        ("tiers", "hq>mq", 0.625)
    ]
    _, body = card_of(tmp_path / "out")
    assert "| tiers | hq>mq | 62.5 % [50.0 %, 75.0 %] | – |" in body  # noqa: RUF001
    assert "not measured" not in body


def test_ratings_that_lose_their_order_when_rounded_are_counted(tmp_path):
    rated = {1.0: 2.6, 2.0: 2.9, 3.0: 3.4, 4.0: 4.0}  # the first three round to 3
    made = finished_run(tmp_path / "run", rated=rated, gap=0.25)
    known = export_run(tmp_path / "run", tmp_path / "out")
    lost = sum(p["chosen_ratings"]["empathy"] < 3.5 for p in made.rows())
    assert known["rounded_not_ahead"] == lost > 0
    assert f"in {lost} pairs they no longer show" in card_of(tmp_path / "out")[1]


def test_an_export_takes_the_place_of_an_earlier_one(home, tmp_path):
    out = tmp_path / "out"
    export_run(home, out, full=True, rounds=True)
    (out / ".git").mkdir()
    (out / ".git/config").write_text("kept")
    export_run(home, out)
    assert not (out / "rounds").exists() and (out / ".git/config").read_text() == "kept"
    assert not (out / ".draft").exists() and other_content(out) == []
    assert "margin" not in pq.read_schema(out / "data/train-00000-of-00001.parquet").names


@pytest.mark.parametrize(
    ("name", "before"),
    [("notes.txt", False), ("data/mine.parquet", False), ("README.md", True), ("data/more.csv", True)],
)
def test_other_content_is_never_overwritten_without_force(name, before, home, tmp_path):
    out = tmp_path / "out"
    if before:
        export_run(home, out)
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("mine")
    with pytest.raises(PsyrayError, match=r"holds what no export wrote.*--force"):
        export_run(home, out)
    assert (out / name).read_text() == "mine" and not (out / ".draft").exists()
    export_run(home, out, force=True)
    assert datasets.load_dataset(str(out))["train"].num_rows
    assert (out / name).exists() == (name in ("notes.txt", "README.md"))


def test_a_file_in_the_way_or_a_run_without_pairs_is_an_error(home, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(PsyrayError, match="is a file; --to names a folder"):
        export_run(home, tmp_path / "file", force=True)
    young = tmp_path / "young"
    shutil.copytree(home, young)
    state = json.loads((young / "run.json").read_text())
    (young / "run.json").write_text(json.dumps(state | {"stages": state["stages"][:2]}))
    with pytest.raises(PsyrayError, match="has no finished stage `pairs` yet"):
        export_run(young, tmp_path / "out")
    (young / "run.json").write_text(json.dumps(state | {"stages": state["stages"][:4]}))
    with pytest.raises(PsyrayError, match="no finished round"):
        export_run(young, tmp_path / "out", rounds=True)
    config = yaml.safe_load((young / "config.yaml").read_text())
    other = tmp_path / "other.yaml"
    shipped = Path(export.__file__).parents[1] / "assets/rubrics/counselling.yaml"
    other.write_text(shipped.read_text().replace("weight: 1", "weight: 2", 1))
    (young / "config.yaml").write_text(yaml.safe_dump(config | {"rubric": str(other)}))
    with pytest.raises(PsyrayError, match=r"the rubric .*other.yaml has changed since"):
        export_run(young, tmp_path / "out")
    shutil.copy(shipped, young / f"rubric-{load_rubric('counselling').id}.yaml")  # as a run keeps it
    assert export_run(young, tmp_path / "out")["rubric"]["principles"][0]["weight"] == 1


def test_what_the_page_shows_works(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PSYRAY_HOME", raising=False)
    shutil.copytree(home, tmp_path / "runs/demo")
    page = PAGE.read_text()
    lines = re.findall(r"^psyray .*$", page, re.MULTILINE)
    assert len(lines) == 5
    for line in lines:
        result = CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False, env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
    same = json.loads(result.output)
    assert same["shared"]["pairs"] == same["a"]["pairs"] == same["b"]["pairs"] > 0
    assert all(same[kind]["pairs"] == 0 for kind in ("only_in_a", "only_in_b", "changed_labels", "changed_ratings"))
    (snippet,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(snippet, {})

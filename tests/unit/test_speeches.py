"""Client speeches: every form of file, every reason to drop a row, every clear error."""

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from psyray.config import SpeechesSection
from psyray.data.speeches import SHIPPED, read_file, select
from psyray.errors import PsyrayError

SECTION = SpeechesSection(test_share=0.5)


def texts(count: int) -> list[str]:
    return [f"Speech number {i}. " + "I keep thinking about it, again and again. " * 4 for i in range(count)]


def load(path: Path, section: SpeechesSection = SECTION):
    return select(read_file(path), section, path)


def write(path: Path, values: list[str]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(values)))
    elif path.suffix == ".csv":
        path.write_text("id,text\n" + "".join(f'{i},"{t}"\n' for i, t in enumerate(values)))
    else:
        pq.write_table(pa.table({"id": range(len(values)), "text": values}), path)
    return path


def test_the_three_forms_of_file_give_the_same_speeches(tmp_path):
    found = [load(write(tmp_path / f"s{suffix}", texts(20)))[0] for suffix in (".jsonl", ".csv", ".parquet")]
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 20 and {row["split"] for row in found[0]} == {"train", "test"}


def test_rows_are_dropped_for_a_reason_that_is_counted(tmp_path):
    values = [*texts(20), texts(20)[3].replace(" ", "  "), "short", "x" * 1001, " "]
    kept, dropped = load(write(tmp_path / "s.jsonl", values))
    assert len(kept) == 20
    assert dropped == Counter({"duplicate": 1, "too short": 1, "too long": 1, "no text": 1})


def test_a_speech_keeps_its_side_when_others_are_added(tmp_path):
    few = {row["speech_id"]: row["split"] for row in load(write(tmp_path / "a.jsonl", texts(20)))[0]}
    many = {row["speech_id"]: row["split"] for row in load(write(tmp_path / "b.jsonl", texts(60)))[0]}
    assert few.items() <= many.items()


def test_conversations_are_speeches_when_they_end_in_the_clients_words(tmp_path):
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    rows = [{"messages": [*turns, {"role": "user", "content": t}]} for t in texts(20)] + [{"messages": turns}]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept, dropped = load(path)
    assert all(len(row["messages"]) == 3 for row in kept) and dropped["no text"] == 1


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("none.jsonl", None, "no file of client speeches at"),
        ("s.txt", "x", ".jsonl, .csv or .parquet"),
        ("s.jsonl", "", "is empty"),
        ("s.jsonl", "\n\n", "holds no rows"),
        ("s.jsonl", '{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("s.jsonl", "[1]\n", "line 1 is no JSON object"),
        ("s.jsonl", '{"id": 1}\n', "set speeches.text_column"),
        ("s.jsonl", '{"text": "too short"}\n', "no speech is left (1 too short"),
        ("s.parquet", "not parquet", "cannot be read"),
        ("s.csv", '"a\n', "s.csv"),
    ],
)
def test_a_bad_file_is_one_error_that_names_it(tmp_path, name, content, expected):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(PsyrayError) as caught:
        load(path)
    assert expected in str(caught.value) and name in str(caught.value)


def test_a_named_column_that_is_not_there_is_named_with_those_that_are(tmp_path):
    path = write(tmp_path / "s.csv", texts(3))
    with pytest.raises(PsyrayError, match=r"no column 'txt' .* it has id, text"):
        load(path, SpeechesSection(text_column="txt"))


def test_the_speeches_that_ship_are_many_and_varied():
    kept, dropped = load(SHIPPED, SpeechesSection())
    assert len(kept) >= 240 and not dropped
    assert len({row["topic"] for row in kept}) == 8 and len({row["subtopic"] for row in kept}) == 42
    openings = Counter(row["messages"][0]["content"].split()[0] for row in kept)
    assert openings.most_common(1)[0][1] < len(kept) / 10

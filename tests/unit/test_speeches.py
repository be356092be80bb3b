"""Client speeches: every form of file, every reason to drop a row, every clear error."""

import csv
import json
from collections import Counter
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from psyray.data import speeches
from psyray.data.speeches import SHIPPED, preview, speeches_stage
from psyray.errors import PsyrayError
from psyray.run import Run
from psyray.sections.data import SpeechesSection

SECTION = SpeechesSection(test_share=0.5)


THINGS = [
    "rain",
    "dog",
    "train",
    "letter",
    "garden",
    "window",
    "piano",
    "kettle",
    "river",
    "winter",
    "ladder",
    "bread",
    "coat",
    "lamp",
    "market",
    "stairs",
]


def texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 100 to 1,000 characters that have little in common."""
    draw = Random(seed)
    return [
        f"Speech number {i}. "
        + " ".join(f"The {draw.choice(THINGS)} and my {draw.choice(THINGS)} {i + n}." for n in range(8))
        for i in range(count)
    ]


def load(path: Path, section: SpeechesSection = SECTION, **settings):
    kept, stats = preview(section.model_copy(update={"path": str(path), **settings}))
    return kept, stats["dropped"]


def source(name: str, path: Path, **settings) -> dict:
    return {"name": name, "path": str(path), **settings}


def several(*sources: dict, **settings):
    return preview(SpeechesSection.model_validate({"sources": list(sources), "test_share": 0.5, **settings}))


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
    assert dropped == {"duplicate": 1, "too short": 1, "too long": 1, "no text": 1}


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


def test_a_conversation_that_comes_in_several_lengths_is_on_one_side(tmp_path):
    greeting = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    path, between = tmp_path / "c.jsonl", {"role": "assistant", "content": "Tell me more."}
    with path.open("w") as file:
        for number, (first, then) in enumerate(zip(texts(90)[:30], texts(90)[60:], strict=True)):
            short = [*greeting * (number % 2), {"role": "user", "content": first}]
            for talk in (short, [*short, between, {"role": "user", "content": then}]):
                file.write(json.dumps({"messages": talk}) + "\n")
    sides = {}
    for row in load(path)[0]:
        first = next(m["content"] for m in row["messages"] if len(m["content"]) >= 100)
        sides.setdefault(first, []).append(row["split"])
    assert Counter(map(tuple, sides.values())).keys() == {("train", "train"), ("test", "test")}


def test_a_crisis_that_comes_up_late_holds_the_conversations_shorter_lengths_out_too(tmp_path):
    path, turns = tmp_path / "c.jsonl", [{"role": "user", "content": texts(30)[0]}]
    last = texts(90)[80] + " I want to kill myself."
    later = [{"role": "assistant", "content": "Tell me more."}, {"role": "user", "content": last}]
    talks = [turns, [*turns, *later], *([{"role": "user", "content": text}] for text in texts(30)[1:])]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    kept, _ = load(path, crisis="test_only", test_share=0.05)
    assert [row["split"] for row in kept if row["messages"][0] == turns[0]] == ["test", "test"]
    assert Counter(row["split"] for row in kept)["train"] > 20


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_conversation_may_be_written_as_json_in_a_column_named_messages(tmp_path, ending):
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    cells = [json.dumps([*turns, {"role": "user", "content": f'{t} "so" \ud83d'}]) for t in texts(20)]
    cells += ["[1, 2]", json.dumps(turns), texts(21)[20]]
    path = tmp_path / f"c.{ending}"
    if ending == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["Messages"], *([cell] for cell in cells)])
    elif ending == "jsonl":
        path.write_text("".join(json.dumps({"messages": cell}) + "\n" for cell in cells))
    else:
        pq.write_table(pa.table({"messages": cells}), path)
    kept, dropped = load(path)
    assert Counter(len(row["messages"]) for row in kept) == {3: 20, 1: 1} and dropped == {"no text": 2}
    assert sum(row["messages"][-1]["content"].endswith('"so" \ufffd') for row in kept) == 20


def test_a_column_of_plain_texts_may_begin_with_a_bracket(tmp_path):
    values = [f"[at night] {text}" for text in texts(20)]
    assert len(load(write(tmp_path / "s.csv", values))[0]) == 20
    path = tmp_path / "m.csv"
    path.write_text("messages\n" + "".join(f'"{text}"\n' for text in [*texts(3), *values]))
    with pytest.raises(PsyrayError, match=r"m\.csv, row 4, column 'messages' .* is not JSON; .* another name") as said:
        load(path)
    assert "night" not in str(said.value)


def test_half_a_character_stops_no_set(tmp_path):
    first, second, *rest = texts(20)
    rows = [{"text": f"{first} \ud83d", "topic": "sleep \ude00"}, {"text": f"{second} \U0001f600"}]
    path = tmp_path / "s.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *({"text": text} for text in rest)]))
    said = {row["messages"][-1]["content"]: row["topic"] for row in load(path)[0]}
    assert len(said) == 20 and said[f"{first} \ufffd"] == "sleep \ufffd" and f"{second} \U0001f600" in said
    path.write_text(
        "".join(json.dumps({"messages": [{"role": "user", "content": text + " \udfff"}]}) + "\n" for text in texts(20))
    )
    assert all(row["messages"][-1]["content"].endswith(" \ufffd") for row in load(path)[0])


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
        ("s.jsonl", '{"messages": [{"role": "visitor", "content": "a"}]}\n', "has the roles user and assistant"),
        ("s.parquet", "not parquet", "cannot be read"),
        ("s.csv", '"a\n', "s.csv"),
        ("s.csv", "text\n", "no rows"),
        ("s.csv", "text\none\ntwo, three\n", "Row #3: Expected 1 columns, got 2"),
        ("s.csv", b"text\ngr\xfcn\n", "save it as UTF-8"),
    ],
)
def test_a_bad_file_is_one_error_that_names_it(tmp_path, name, content, expected):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PsyrayError) as caught:
        load(path)
    assert expected in str(caught.value) and name in str(caught.value) and "three" not in str(caught.value)


@pytest.mark.parametrize("mark", [";", "\t"])
def test_a_csv_file_of_another_spreadsheet_is_read(tmp_path, mark):
    path = tmp_path / "s.csv"
    path.write_text(f"nr{mark}question\n" + "".join(f'{i}{mark}"{text}, yes"\n' for i, text in enumerate(texts(20))))
    assert {row["messages"][0]["content"] for row in load(path)[0]} == {f"{text}, yes" for text in texts(20)}


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


def test_counsel_chats_rows_are_answers_and_its_questions_speeches(tmp_path):
    head = "questionID,questionTitle,questionText,questionLink,topic,therapistInfo,answerText,upvotes,views,split"
    lines = [
        f'{i},Title,"{text}\nYours, me",http://x,{"anxiety" if i % 2 else "sleep"},T,"Answer, {n}",{n},3,train'
        for i, text in enumerate(texts(20)) for n in range(3)
    ]  # fmt: skip
    (tmp_path / "c.csv").write_text("\n".join([head, *lines]))
    kept, stats = preview(SECTION.model_copy(update={"path": str(tmp_path / "c.csv")}))
    assert len(kept) == 20 and stats["read"] == 60 and stats["dropped"] == {"another row of its speech": 40}
    assert {row["topic"] for row in kept} == {"anxiety", "sleep"}
    assert sum(sides[side] for sides in stats["topics"].values() for side in ("train", "test")) == 20


def test_several_sources_keep_their_names_and_share_no_speech(tmp_path):
    a = source("a", write(tmp_path / "a.jsonl", texts(20)))
    b = source("b", write(tmp_path / "b.parquet", texts(30)[10:]))
    kept, stats = several(b, a)
    assert stats["sources"] == {"b": 20, "a": 20} and stats["kept_of"] == {"a": 20, "b": 10}
    assert stats["dropped"] == {"duplicate": 10}
    assert kept == several(a, b)[0], "the order of the sources decides nothing"


def test_many_topics_are_summed_up(tmp_path, monkeypatch):
    monkeypatch.setattr(speeches, "TOPICS_SHOWN", 3)
    rows = [{"text": text, "topic": f"t{n // 4}"} for n, text in enumerate(texts(20))]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, stats = several(source("a", tmp_path / "s.jsonl"))
    assert list(stats["topics"]) == ["t0", "t1", "t2", "others"]
    assert [sum(sides.values()) for sides in stats["topics"].values()] == [4, 4, 4, 8]


def test_a_sources_side_is_kept_and_test_wins(tmp_path):
    a = source("a", write(tmp_path / "a.jsonl", texts(20)), side="train")
    b = source("b", write(tmp_path / "b.jsonl", texts(25)[15:]), side="test")
    kept, _ = several(a, b)
    sides = {row["messages"][0]["content"]: row["split"] for row in kept}
    assert [sides[text.strip()] for text in texts(25)] == ["train"] * 15 + ["test"] * 10


def test_nothing_in_or_near_an_excluded_set_is_kept(tmp_path):
    path = write(tmp_path / "s.jsonl", texts(40))
    near = texts(40)[7].replace("Speech number", "Speech with number")
    exclude = write(tmp_path / "test.csv", [texts(40)[3].upper(), near, "short but excluded"])
    kept, dropped = load(path, exclude=[str(exclude)])
    assert dropped == {"near an excluded speech": 2} and len(kept) == 38
    left = {row["messages"][0]["content"] for row in kept}
    assert not left & {texts(40)[3].strip(), texts(40)[7].strip()}
    kept, dropped = load(path, exclude=[str(write(tmp_path / "same.csv", texts(2)))], near_duplicates=None)
    assert dropped == {"in an excluded set": 2} and len(kept) == 38


@pytest.mark.parametrize(
    ("crisis", "left", "sides"), [("keep", 24, None), ("drop", 20, set()), ("test_only", 24, {"test"})]
)
def test_flagged_speeches_are_kept_or_dropped_or_held_out(tmp_path, crisis, left, sides):
    values = texts(20) + [f"{text} He hits me. I want to die." for text in texts(4, seed=9)]
    kept, stats = preview(SECTION.model_copy(update={"path": str(write(tmp_path / "s.csv", values)), "crisis": crisis}))
    flagged = [row for row in kept if row["crisis"]]
    assert len(kept) == left and len(flagged) == left - 20 == stats["crisis"]
    assert all(row["crisis_kinds"] == ["self-harm", "abuse"] for row in flagged)
    if sides is not None:
        assert {row["split"] for row in flagged} == sides


def test_personal_details_are_gone_before_anything_is_kept(tmp_path):
    values = [f"{text} Write to me at jo{i}@mail.org." for i, text in enumerate(texts(20))]
    kept, stats = preview(SECTION.model_copy(update={"path": str(write(tmp_path / "s.csv", values))}))
    assert stats["scrubbed"]["email"] == 20 and all("@" not in row["messages"][0]["content"] for row in kept)


def test_a_data_set_folder_is_a_source(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": texts(20), "topic": ["sleep"] * 20}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "files").mkdir()
    write(tmp_path / "files/train.jsonl", texts(20))
    write(tmp_path / "files/test.jsonl", texts(30)[20:])
    saved, _ = several(source("a", tmp_path / "saved"))
    files, _ = several(source("a", tmp_path / "files", split="train"))
    assert [r["messages"] for r in saved] == [r["messages"] for r in files] and saved[0]["topic"] == "sleep"
    assert several(source("a", tmp_path / "files"))[1]["kept"] == 30
    with pytest.raises(PsyrayError, match="files cannot be read as a data set"):
        several(source("a", tmp_path / "files", split="dev"))


def test_the_hub_is_asked_only_when_the_path_says_so(tmp_path):
    with pytest.raises(PsyrayError, match="a hub data set is written hf://owner/name"):
        several(source("a", Path("owner/name")))
    with pytest.raises(PsyrayError, match="the hub gives no such data set"):
        speeches_stage(Run(tmp_path / "run"), SECTION.model_copy(update={"path": "hf://owner/name"}))


def test_a_row_that_cannot_be_read_is_not_quoted(tmp_path):
    (tmp_path / "s.csv").write_text("id,text\n1,fine\n2,my secret,and more\n")
    with pytest.raises(PsyrayError) as caught:
        load(tmp_path / "s.csv")
    assert "Expected 2 columns, got 3" in str(caught.value) and "secret" not in str(caught.value)


def test_the_stage_is_done_once_for_a_text_wherever_its_file_lies(tmp_path):
    said: list[str] = []
    run = Run(tmp_path / "run", said.append)
    first = write(tmp_path / "a.jsonl", texts(20))
    second = tmp_path / "b.jsonl"
    second.write_bytes(first.read_bytes())
    made = [speeches_stage(run, SECTION.model_copy(update={"path": str(path)})) for path in (first, second)]
    assert made[0].path == made[1].path and len(made[0].rows()) == 20 and "done before" in said[-1]
    assert not (made[0].path / "work").exists()
    stats = made[0].stats
    assert stats["read"] == stats["kept"] + sum(stats["dropped"].values())

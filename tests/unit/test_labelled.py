"""Human-labelled sets as a YAML file declares them: tiers, pairs with annotators, votes; and every mistake named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from psyray.errors import PsyrayError
from psyray.evaluate.labelled import Labelled, consensus, load_labelled, read_declaration
from psyray.records import Verdict

ROOT = Path(__file__).parents[2]
A, B, TIE = Verdict.A, Verdict.B, Verdict.TIE

TIERS = {"columns": {"high": ["h1", "h2"], "mid": ["m1"], "low": ["l1"]}}
PAIRS = {"a": "left", "b": "right", "annotators": ["anna", "ben", "cleo"]}
VOTES = {"group": "id", "response": "answer", "count": "votes", "gap": 2}


def declare(folder: Path, kind: str, section: dict, table: str, **more) -> Path:
    (folder / "set.csv").write_text(table)
    path = folder / "set.yaml"
    tree = {"name": "made-up", "path": "set.csv", "prompt": "prompt", kind: section} | more
    path.write_text(yaml.safe_dump(tree, sort_keys=False))  # the best tier stands first
    return path


def better(item: Labelled) -> tuple[str, str]:
    return (item.a, item.b) if item.human is A else (item.b, item.a)


def test_every_higher_tier_meets_every_lower_one_and_either_side_may_win(tmp_path):
    table = "prompt,h1,h2,m1,l1\nHow do I boil an egg?,long one,other one,short one,no\nAnd rice?,r h,,r m,r l\n"
    _, items, dropped = load_labelled(declare(tmp_path, "tiers", TIERS, table))
    assert {(item.stratum, *better(item)) for item in items} == {
        ("high>mid", "long one", "short one"), ("high>mid", "other one", "short one"), ("high>mid", "r h", "r m"),
        ("high>low", "long one", "no"), ("high>low", "other one", "no"), ("high>low", "r h", "r l"),
        ("mid>low", "short one", "no"), ("mid>low", "r m", "r l"),
    }  # fmt: skip
    assert dropped == {"no response": 1} and len({item.speech_id for item in items}) == 2
    assert {item.human for item in items} == {A, B}  # whoever always says A is right by chance only
    some = {"columns": TIERS["columns"], "strata": ["high > low"]}
    _, items, _ = load_labelled(declare(tmp_path, "tiers", some, table))
    assert {item.stratum for item in items} == {"high>low"}


def test_pairs_keep_each_annotators_word_and_the_majority(tmp_path):
    rows = ["p1,x,y,A,a,B", "p2,x,y,tie,Tie,A", "p3,x,y,A,B,", "p4,x,y,,,B", "p5,x,y,,,", "p6,same,same,A,A,A",
            ",x,y,A,A,A", "p1,y,x,A,A,A"]  # fmt: skip
    path = declare(tmp_path, "pairwise", PAIRS, "\n".join(["prompt,left,right,anna,ben,cleo", *rows]))
    _, items, dropped = load_labelled(path)
    by_prompt = {item.messages[0]["content"]: item for item in items}
    assert {prompt: item.human for prompt, item in by_prompt.items()} == {"p1": A, "p2": TIE, "p3": TIE, "p4": B}
    assert by_prompt["p1"].annotators == {"anna": A, "ben": A, "cleo": B}
    assert by_prompt["p4"].annotators == {"cleo": B}
    assert (by_prompt["p1"].a, by_prompt["p1"].b) == ("x", "y")
    assert dropped == {"no prompt": 1, "nobody labelled it": 1, "same text twice": 1, "duplicate": 1}


def test_words_of_another_tongue_mean_what_the_file_says(tmp_path):
    section = PAIRS | {"annotators": ["anna"], "words": {"links": "A", "rechts": "B", "gleich": "tie"}}
    path = declare(tmp_path, "pairwise", section, "prompt,left,right,anna\np,x,y,Rechts\n")
    assert load_labelled(path)[1][0].human is B


def test_votes_make_pairs_that_lie_apart_and_prompts_come_from_another_file(tmp_path):
    (tmp_path / "questions.jsonl").write_text(
        '{"id": 1, "text": "", "title": "one"}\n{"id": 2, "text": "two", "title": "T"}\n'
    )
    (tmp_path / "answers.jsonl").write_text(
        "\n".join(
            f'{{"id": {i}, "answer": "{answer}", "votes": {votes}}}'
            for i, answer, votes in ((1, "a", 5), (1, "b", 3), (1, "c", 2), (2, "d", 0), (2, "e", 1), (3, "f", 9))
        )
    )
    path = tmp_path / "set.yaml"
    tree = {"name": "v", "path": "answers.jsonl", "join": {"path": "questions.jsonl", "key": "id"},
            "prompt": ["text", "title"], "votes": VOTES}  # fmt: skip
    path.write_text(yaml.safe_dump(tree))
    _, items, dropped = load_labelled(path)
    assert {better(item) for item in items} == {("a", "b"), ("a", "c")}
    assert items[0].messages == [{"role": "user", "content": "one"}] and dropped == {"no prompt": 1}


def test_a_conversation_is_a_prompt_too(tmp_path):
    turns = (
        '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "?"}, {"role": "user", "content": "x"}]'
    )
    (tmp_path / "set.jsonl").write_text(f'{{"prompt": {turns}, "left": "l", "right": "r", "anna": "A"}}\n')
    path = tmp_path / "set.yaml"
    section = PAIRS | {"annotators": ["anna"]}
    path.write_text(yaml.safe_dump({"name": "c", "path": "set.jsonl", "prompt": "prompt", "pairwise": section}))
    assert [m["role"] for m in load_labelled(path)[1][0].messages] == ["user", "assistant", "user"]


TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "?"}, {"role": "user", "content": "x"}]


def test_a_conversation_may_be_json_text_in_a_column_named_messages(tmp_path):
    turns = json.dumps(TURNS).replace('"', '""')
    table = f'messages,left,right,anna\n"{turns}",l,r,A\n'
    section = PAIRS | {"annotators": ["anna"]}
    path = declare(tmp_path, "pairwise", section, table, prompt="messages")
    assert [m["content"] for m in load_labelled(path)[1][0].messages] == ["hi", "?", "x"]
    (tmp_path / "set.csv").write_text(table.replace(turns, "[my private words"))
    with pytest.raises(PsyrayError, match=r"set\.csv, row 1, column 'messages' .* is not JSON") as error:
        load_labelled(path)
    assert "private" not in str(error.value)


@pytest.mark.parametrize(
    "prompt",
    [["hi", "x"], [{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": None}], TURNS[:2], {"a": 1}, 7],
    ids=str,
)
def test_what_is_no_conversation_is_no_prompt(tmp_path, prompt):
    rows = [{"prompt": p, "title": "t", "left": "l", "right": "r", "anna": "A"} for p in (prompt, "x", [], " ")]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "set.yaml"
    section = PAIRS | {"annotators": ["anna"]}
    tree = {"name": "c", "path": "set.jsonl", "prompt": ["prompt", "title"], "pairwise": section}
    path.write_text(yaml.safe_dump(tree))
    _, items, dropped = load_labelled(path)
    assert {item.messages[0]["content"] for item in items} == {"x", "t"}
    assert dropped == {"no prompt": 1, "duplicate": 1}


@pytest.mark.parametrize(
    ("table", "other", "expected"),
    [
        ("id,left,right,anna\n1,l,r,A\n", "id,prompt\n", r"other\.csv holds no rows \(join\.path\)"),
        ("id,left,right,anna\n", "id,prompt\n1,p\n", r"set\.csv holds no rows \(path\)"),
        ("nr,left,right,anna\n1,l,r,A\n", "id,prompt\n1,p\n", r"set\.csv has no column 'id' \(join\.key\)"),
    ],
)
def test_a_join_that_cannot_be_made_names_its_file(tmp_path, table, other, expected):
    (tmp_path / "other.csv").write_text(other)
    join = {"path": "other.csv", "key": "id"}
    path = declare(tmp_path, "pairwise", PAIRS | {"annotators": ["anna"]}, table, join=join)
    with pytest.raises(PsyrayError, match=expected):
        load_labelled(path)


def test_jsonl_is_read_as_it_stands(tmp_path):
    rows = [
        {"prompt": "half \ud83d a face", "left": "2020-01-01", "right": "r", "anna": "A"},
        {"prompt": [{"role": "user", "content": "\ude00"}], "left": "l", "right": "r \udfff", "ben": "B"},
    ]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "set.yaml"
    section = PAIRS | {"annotators": ["anna", "ben"]}
    path.write_text(yaml.safe_dump({"name": "c", "path": "set.jsonl", "prompt": "prompt", "pairwise": section}))
    found = {(item.messages[0]["content"], item.a, item.b, item.human) for item in load_labelled(path)[1]}
    assert found == {("half \ufffd a face", "2020-01-01", "r", A), ("\ufffd", "l", "r \ufffd", B)}


def test_swapping_twice_changes_nothing_and_keeps_the_id():
    item = Labelled("s", [{"role": "user", "content": "p"}], "x", "y", "all", A, {"anna": A, "ben": TIE})
    assert item.swap().human is B and item.swap().annotators == {"anna": B, "ben": TIE} and item.swap().a == "y"
    assert item.swap().swap() == item and item.swap().comparison_id == item.comparison_id


@pytest.mark.parametrize(
    ("verdicts", "expected"), [([A], A), ([A, B], TIE), ([A, A, B], A), ([TIE, TIE, A], TIE), ([A, TIE], TIE)]
)
def test_consensus_is_what_most_say(verdicts, expected):
    assert consensus(verdicts) is expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"pairwise": {**PAIRS, "a": "secret"}}, "has no column 'secret'"),
        ({"pairwise": {**PAIRS, "annotator": "x"}}, "pairwise.annotator: Extra inputs"),
        ({"tiers": TIERS}, "exactly one of tiers, pairwise and votes"),
        ({"path": "none.csv"}, "no file at .*none.csv"),
        ({"path": "set.xlsx"}, "comes as .csv, .jsonl"),
        ({"name": "a/b"}, "name: "),
        ({"join": {"path": "set.csv", "key": "nr"}}, "no column 'nr'"),
        ({"pairwise": None, "tiers": {"columns": {"one": ["left"]}}}, "two tiers at least"),
        ({"pairwise": None, "tiers": {**TIERS, "strata": ["low>high"]}}, "no stratum 'low>high'"),
        (
            {"pairwise": None, "votes": {"group": "prompt", "response": "left", "count": "right"}},
            "row 1, column 'right'",
        ),
        ({"pairwise": {**PAIRS, "annotators": ["left"]}}, r"row 1, column 'left' holds none of a, b, tie"),
    ],
)
def test_a_mistake_is_named_without_a_clients_words(tmp_path, change, expected):
    (tmp_path / "set.xlsx").write_text("x")
    table = "prompt,left,right,anna,ben,cleo\nmy private words,l private,r private,A,A,A\n"
    path = declare(tmp_path, "pairwise", PAIRS, table)
    tree = {k: v for k, v in (yaml.safe_load(path.read_text()) | change).items() if v is not None}
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(PsyrayError, match=expected) as error:
        load_labelled(path)
    assert "private" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": "my private words", "left": \n', r"set\.jsonl, line 1 is not JSON"),
        (b'{"prompt": "my private \xff words"}\n', r"set\.jsonl cannot be read: .* byte 0xff"),
    ],
)
def test_a_broken_file_is_named_without_a_clients_words(tmp_path, content, said):
    path = declare(tmp_path, "pairwise", PAIRS, "x")
    (tmp_path / "set.jsonl").write_bytes(content)
    path.write_text(path.read_text().replace("set.csv", "set.jsonl"))
    with pytest.raises(PsyrayError, match=said) as error:
        load_labelled(path)
    assert "private" not in str(error.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/agreement").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_that_ship_are_valid(path):
    declared = read_declaration(path)
    assert sum(map(bool, (declared.tiers, declared.pairwise, declared.votes))) == 1

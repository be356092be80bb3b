"""A run folder's copy: whole stages only, fetched where they lack, the ledger with them, and clear refusals."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from made_mirrored import Counted, passes

from psyray import mirror as mirrors
from psyray.active.ledger import Answer, Ledger, Question
from psyray.config import load_config
from psyray.errors import PsyrayError
from psyray.mirror import Mirror
from psyray.pipeline import open_mirror
from psyray.run import Run, fetch_run, followed
from psyray.status import stage_lines


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store" / "demo"


def stage_in(folder: Path) -> Path:
    (manifest,) = folder.glob("stages/letters/*/manifest.json")
    return manifest.parent


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_machine_that_has_nothing_fetches_what_is_done(tmp_path: Path, store: Path) -> None:
    first, again, said = Counted(), Counted(), []
    passes(tmp_path / "one", store, first)
    run = passes(tmp_path / "two", store, again, said)
    assert (first.times, again.times) == (1, 0)
    assert f"letters: fetched from file://{store}" in said
    made, fetched = contents(stage_in(tmp_path / "one")), contents(stage_in(tmp_path / "two"))
    assert made.pop("progress.json") and made == fetched
    assert next(line.state for line in stage_lines(run.path)) == "done"
    assert not (tmp_path / "two" / ".fetched").exists()


def test_a_finished_stage_is_known_by_its_copy(tmp_path: Path, store: Path) -> None:
    passes(tmp_path / "one", store, Counted())
    path = tmp_path / "two"
    assert Run(path, mirror=Mirror(f"file://{store}", path)).has("letters", {}, [])
    assert not Run(path, mirror=Mirror(f"file://{store}", path)).has("letters", {"other": 1}, [])


def test_a_copy_without_its_manifest_counts_for_nothing(tmp_path: Path, store: Path) -> None:
    passes(tmp_path / "one", store, Counted())
    (stage_in(store) / "manifest.json").unlink()
    work = Counted()
    passes(tmp_path / "two", store, work)
    assert work.times == 1 and (stage_in(store) / "manifest.json").exists()


def test_a_damaged_copy_is_thrown_away_and_made_anew(tmp_path: Path, store: Path) -> None:
    passes(tmp_path / "one", store, Counted())
    weights = stage_in(store) / "model" / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    work, said = Counted(), list[str]()
    passes(tmp_path / "two", store, work, said)
    assert work.times == 1 and any("model/weights.bin" in line and "damaged" in line for line in said)
    assert weights.read_bytes() == bytes(range(256)) * 64
    passes(tmp_path / "three", store, unneeded := Counted())
    assert unneeded.times == 0


def test_a_stage_that_was_done_without_a_copy_gets_one(tmp_path: Path, store: Path) -> None:
    run = Run(tmp_path / "one", lambda line: None)
    run.stage("letters", {}, [], Counted())
    passes(tmp_path / "one", store, unneeded := Counted())
    passes(tmp_path / "two", store, unneeded)
    assert unneeded.times == 0


def question(name: str) -> Question:
    return Question(name, "rating", "judge", "rubric", {"text": name})


def bought(path: Path, *names: str) -> None:
    ledger = Ledger(f"sqlite:///{path}")
    ledger.reserve("run", "judge", [question(name) for name in names], budget=None)
    for name in names:
        ledger.answer([Answer(name, True, {"score": 1})])


def test_the_ledger_goes_along_and_stays_where_there_is_one(tmp_path: Path, store: Path) -> None:
    here, there = tmp_path / "one" / "labels.db", tmp_path / "two" / "labels.db"
    here.parent.mkdir()
    bought(here, "q1", "q2")
    passes(tmp_path / "one" / "run", store, Counted(), ledger=here)
    assert len(list(store.glob("ledger-*.db"))) == 1
    passes(tmp_path / "two" / "run", store, Counted(), ledger=there)
    assert Ledger(f"sqlite:///{there}").answers(["q1", "q2"]).keys() == {"q1", "q2"}
    bought(there, "q3")
    passes(tmp_path / "two" / "run", store, Counted(), ledger=there)
    assert len(list(store.glob("ledger-*.db"))) == 1  # the latest only
    assert Ledger(f"sqlite:///{there}").answers(["q3"]).keys() == {"q3"}
    passes(tmp_path / "three" / "run", store, Counted(), ledger=tmp_path / "three" / "labels.db")
    assert Ledger(f"sqlite:///{tmp_path}/three/labels.db").answers(["q1", "q3"]).keys() == {"q1", "q3"}


def test_the_ledger_is_copied_while_a_stage_is_at_work(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirrors, "LEDGER_EVERY_S", 0.05)
    here, there, pointer = tmp_path / "labels.db", tmp_path / "two" / "labels.db", store / "ledger.json"
    bought(here, "q1")
    with Mirror(f"file://{store}", tmp_path / "run", here).open():
        deadline = time.monotonic() + 30
        while not (pointer.exists() and pointer.stat().st_size):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # The machine is lost now, with nothing put in order.
        Mirror(f"file://{store}", tmp_path / "two" / "run", there, lambda line: None).fetch_ledger()
        assert Ledger(f"sqlite:///{there}").answers(["q1"]).keys() == {"q1"}


def test_a_ledger_that_is_damaged_is_not_taken(tmp_path: Path, store: Path) -> None:
    ledger = tmp_path / "labels.db"
    bought(ledger, "q1")
    passes(tmp_path / "run", store, Counted(), ledger=ledger)
    (copy,) = store.glob("ledger-*.db")
    copy.write_bytes(copy.read_bytes()[:-1])
    with pytest.raises(PsyrayError, match=r"the label ledger at .* is damaged"):
        passes(tmp_path / "two" / "run", store, Counted(), ledger=tmp_path / "two" / "labels.db")
    assert not list((tmp_path / "two").glob("*.db"))


@pytest.mark.parametrize("uri", ["runs/demo", "s3://mine:hidden@bucket/run", "s3://bucket/run?access_key=hidden"])
def test_what_is_no_plain_uri_is_refused_without_being_repeated(tmp_path: Path, uri: str) -> None:
    with pytest.raises(PsyrayError, match=r"run\.mirror is a plain URI") as told:
        Mirror(uri, tmp_path)
    assert "hidden" not in str(told.value)


def test_a_scheme_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PsyrayError, match=r"run\.mirror nowhere://x cannot be used"):
        Mirror("nowhere://x", tmp_path)


def test_which_ledger_goes_along(tmp_path: Path) -> None:
    settings = [f"run.path={tmp_path}/runs/a", f"run.mirror=file://{tmp_path}/store"]
    beside = open_mirror(load_config(None, settings), print)
    assert beside and beside.ledger == tmp_path / "runs" / "labels.db"
    database = open_mirror(load_config(None, [*settings, "ledger.url=postgresql+psycopg://u@h/d"]), print)
    assert database and database.ledger is None
    assert open_mirror(load_config(None, [settings[0]]), print) is None


def test_a_path_in_a_run_follows_its_folder(tmp_path: Path) -> None:
    (tmp_path / "new" / "stages").mkdir(parents=True)
    old, new = Path("/gone/run"), tmp_path / "new"
    assert followed(old / "stages", old, new) == new / "stages"
    assert followed(old / "other", old, new) == old / "other"  # nowhere: as it was written
    assert followed(Path("/models/m"), old, new) == Path("/models/m")


def test_a_whole_run_is_fetched_to_be_served_or_looked_at(tmp_path: Path, store: Path) -> None:
    passes(tmp_path / "one", store, Counted())
    names = fetch_run(Mirror(f"file://{store}", tmp_path / "two", say=lambda line: None))
    assert names == ["letters"] and contents(stage_in(tmp_path / "two"))["model/config.json"] == b"{}"
    with pytest.raises(PsyrayError, match=r"holds no run\.json"):
        fetch_run(Mirror(f"file://{tmp_path}/empty", tmp_path / "three"))

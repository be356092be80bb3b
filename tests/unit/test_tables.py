"""Rows in order, however many and however wide, and nothing left on disk."""

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyray import tables
from psyray.tables import batches, connect, identifier, in_order, literal, sources, view


def write(folder, listed, parts=3):
    table = pa.Table.from_pylist(listed)
    files = [folder / f"p{number}.parquet" for number in range(parts)]
    for number, file in enumerate(files):
        pq.write_table(table.take(pa.array(range(number, len(listed), parts), pa.int64())), file)
    return files


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 10**6)), min_size=1, max_size=80, unique=True))
def test_rows_come_in_the_order_of_all_keys_whatever_the_buckets(tmp_path_factory, keys):
    folder = tmp_path_factory.mktemp("rows")
    files = write(folder, [{"a": a, "b": b, "text": f"{a}{b}", "list": [{"x": b}]} for a, b in keys])
    with pytest.MonkeyPatch.context() as patch, connect(folder) as database:
        patch.setattr(tables, "ROWS_PER_BUCKET", 7)
        found = list(in_order(database, "FROM read_parquet($files)", ["a", "b"], {"files": sources(files)}, rows=5))
    rows = [row for batch in found for row in batch.to_pylist()]
    assert rows == [{"a": a, "b": b, "text": f"{a}{b}", "list": [{"x": b}]} for a, b in sorted(keys)]
    assert max(batch.num_rows for batch in found) <= 5


def test_more_rows_than_memory_are_put_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MEMORY_MIB", 64)
    draw = random.Random(0)
    listed = [{"id": f"{draw.getrandbits(64):016x}", "text": f"{number} " * 600} for number in range(40_000)]
    files = write(tmp_path, listed)  # 160 MB of text
    last, count = "", 0
    with connect(tmp_path) as database:
        for batch in in_order(database, "FROM read_parquet($files)", ["id"], {"files": sources(files)}):
            ids = batch["id"].to_pylist()
            assert [last, *ids] == sorted([last, *ids])
            last, count = ids[-1], count + len(ids)
        assert list((tmp_path / ".spill").iterdir()) == []
    assert count == len(listed) and not (tmp_path / ".spill").exists()


def test_no_rows_are_no_batches(tmp_path):
    with connect(tmp_path) as database:
        assert list(in_order(database, "SELECT 'a' AS id WHERE false", ["id"])) == []


def test_odd_names_stand_for_themselves(tmp_path):
    folder = tmp_path / "it's [1] * ?"
    folder.mkdir()
    write(folder, [{"id": "b"}, {"id": "a"}], parts=1)
    with connect(folder) as database:
        view(database, 'v "1"', folder.glob("*.parquet"))
        name, odd, text = identifier('the "id"'), identifier('v "1"'), literal("it's")
        query = f"SELECT id AS {name}, {text} AS t FROM {odd} ORDER BY 1"
        (batch,) = batches(database, query)
    assert batch.to_pylist() == [{'the "id"': "a", "t": "it's"}, {'the "id"': "b", "t": "it's"}]


def test_spill_files_of_a_killed_process_go_and_a_failure_leaves_none(tmp_path):
    (tmp_path / ".spill").mkdir()
    (tmp_path / ".spill/old.tmp").write_text("left behind")
    with pytest.raises(ZeroDivisionError), connect(tmp_path):
        assert not (tmp_path / ".spill/old.tmp").exists()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []

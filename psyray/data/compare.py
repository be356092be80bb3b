"""What differs between two exports, or any two data sets in the published layout: pairs, labels and ratings.

A pair is known by what it says: its question and its two texts, whichever was chosen (one Unicode form, single
spaces). So data sets from elsewhere compare too, whatever their ids mean. A pair that stands in one data set several
times counts once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from psyray.data.layout import SIDES
from psyray.errors import PsyrayError
from psyray.tables import connect, identifier, view

EXAMPLES = 10  # ids named for each kind of difference
DIFFERENCES = {
    "only_in_a": "FROM a ANTI JOIN b USING (question, low, high)",
    "only_in_b": "FROM b ANTI JOIN a USING (question, low, high)",
    # Which text was chosen, where a data set does not contradict itself.
    "changed_labels": "FROM met WHERE (a_always AND NOT b_ever) OR (b_always AND NOT a_ever)",
    "changed_ratings": "FROM met WHERE a_ratings IS DISTINCT FROM b_ratings",
}


def compare(a: Path, b: Path) -> dict[str, Any]:
    """Counts of what two data sets share and where they differ, with a few ids for each difference; never a text.

    PsyrayError where one of them is not in the published layout. Memory is bounded, whatever their size.
    """
    files = {"a": data_files(a), "b": data_files(b)}
    columns = {name: _columns(listed[0]) for name, listed in files.items()}
    rated = {name: principles(found) for name, found in columns.items()}
    shared = [key for key in rated["a"] if key in rated["b"]]
    with tempfile.TemporaryDirectory() as folder, connect(Path(folder)) as database:
        for name, listed in files.items():
            view(database, f"{name}_rows", listed)
            database.execute(keyed(name, shared, with_id="ID" in columns[name]))
        database.execute("CREATE TEMP TABLE met AS FROM a JOIN b USING (question, low, high)")
        return {
            "a": _size(database, "a"),
            "b": _size(database, "b"),
            "shared": _shared(database),
            **{name: _difference(database, name) for name in DIFFERENCES},
            "principles": {key: _shift(database, number) for number, key in enumerate(shared, 1)},
            "principles_of_one_only": sorted(set(rated["a"]) ^ set(rated["b"])),
        }


def data_files(path: Path) -> list[Path]:
    """The Parquet files of an export's main table, or of any other folder, or the one file."""
    if path.is_file() and path.suffix == ".parquet":
        return [path]
    found = sorted((path / "data").glob("*.parquet")) or sorted(path.rglob("*.parquet"))
    if not found:
        raise PsyrayError(f"no Parquet file at {path}; `psyray export RUN --to FOLDER` writes some")
    return found


def _columns(file: Path) -> list[str]:
    names: list[str] = pq.read_schema(file).names
    if missing := [name for name in ("question", *SIDES) if name not in names]:
        raise PsyrayError(f"{file} is not in the layout of PsychoCounsel-Preference: no column {', '.join(missing)}")
    return names


def principles(columns: Sequence[str]) -> list[str]:
    """The principles that both sides of a pair are rated on."""
    chosen, rejected = SIDES
    keys = [name.removeprefix(f"{chosen}_").removesuffix("_rating") for name in columns if name.endswith("_rating")]
    return [key for key in keys if {f"{chosen}_{key}_rating", f"{rejected}_{key}_rating"} <= set(columns)]


def keyed(name: str, keys: Sequence[str], *, with_id: bool) -> str:
    """SQL for the table `name`: one row a pair, its texts as hashes in their order, its ratings in that order too."""

    def clean(column: str) -> str:
        return f"md5_number(trim(regexp_replace(nfc_normalize({column}), '[\\s\\p{{Z}}]+', ' ', 'g')))"

    def ratings(side: str) -> str:
        return f"[{', '.join(identifier(f'{side}_{key}_rating') + '::FLOAT' for key in keys)}]::FLOAT[]"

    return f"""
    CREATE TEMP TABLE {name} AS
    WITH hashed AS (
        SELECT {clean("question")} AS question, {clean("chosen")} AS chosen, {clean("rejected")} AS rejected,
            {ratings("chosen")} AS chosen_ratings, {ratings("rejected")} AS rejected_ratings,
            {'"ID"::VARCHAR' if with_id else "''"} AS id
        FROM {name}_rows
    )
    SELECT question, least(chosen, rejected) AS low, greatest(chosen, rejected) AS high,
        count(*) AS {name}_rows, min(id) AS {name}_id,
        bool_and(chosen < rejected) AS {name}_always, bool_or(chosen < rejected) AS {name}_ever,
        min(CASE WHEN chosen < rejected THEN chosen_ratings || rejected_ratings
                 ELSE rejected_ratings || chosen_ratings END) AS {name}_ratings
    FROM hashed GROUP BY ALL
    """


def _row(database: duckdb.DuckDBPyConnection, query: str) -> dict[str, Any]:
    (row,) = database.sql(query).to_arrow_table().to_pylist()
    return dict(row)


def _size(database: duckdb.DuckDBPyConnection, name: str) -> dict[str, Any]:
    return _row(
        database,
        f"""SELECT coalesce(sum({name}_rows), 0)::BIGINT AS rows, count(*) AS pairs,
            count(DISTINCT question) AS questions, count(DISTINCT nullif({name}_id, '')) AS ids,
            count(*) FILTER (WHERE {name}_ever AND NOT {name}_always) AS labelled_both_ways FROM {name}""",
    )


def _shared(database: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    return _row(
        database,
        """SELECT (SELECT count(*) FROM met) AS pairs,
            (SELECT count(*) FROM (SELECT question FROM a INTERSECT SELECT question FROM b)) AS questions,
            (SELECT count(*) FROM (SELECT a_id FROM a WHERE a_id <> '' INTERSECT SELECT b_id FROM b)) AS ids""",
    )


def _difference(database: duckdb.DuckDBPyConnection, name: str) -> dict[str, Any]:
    """How many pairs differ so, and the first of their speeches' ids."""
    source, column = DIFFERENCES[name], "b_id" if name == "only_in_b" else "a_id"
    counted = _row(database, f"SELECT count(*) AS pairs {source}")
    first = f"SELECT DISTINCT {column} {source} ORDER BY 1 LIMIT {EXAMPLES}"
    return counted | {"examples": [value for (value,) in database.execute(first).fetchall() if value]}


def _shift(database: duckdb.DuckDBPyConnection, number: int) -> dict[str, Any]:
    """How many of both sides' ratings of one principle changed, and their mean change from A to B."""
    return _row(
        database,
        f"""SELECT count(*) FILTER (WHERE a <> b) AS changed, round(avg(b - a), 4) AS mean_change FROM (
            SELECT unnest([a_ratings[{number}], a_ratings[len(a_ratings) // 2 + {number}]]) AS a,
                unnest([b_ratings[{number}], b_ratings[len(b_ratings) // 2 + {number}]]) AS b FROM met)""",
    )


def show(found: dict[str, Any], out: Console) -> None:
    """The comparison as tables."""
    sizes = Table("", "A", "B", "both")
    for label, key in (("pairs", "pairs"), ("questions", "questions"), ("ids", "ids")):
        sizes.add_row(label, *(str(found[side][key]) for side in ("a", "b", "shared")))
    sizes.add_row("rows", str(found["a"]["rows"]), str(found["b"]["rows"]), "")
    sizes.add_row("labelled both ways", *(str(found[side]["labelled_both_ways"]) for side in ("a", "b")), "")
    out.print(sizes)
    differences = Table("difference", "pairs", "ids of the first")
    for name in DIFFERENCES:
        row = found[name]
        differences.add_row(name.replace("_", " "), str(row["pairs"]), ", ".join(row["examples"][:3]))
    out.print(differences)
    changed = {key: shift for key, shift in found["principles"].items() if shift["changed"]}
    if changed:
        shifts = Table("principle", "ratings changed", "mean change, A to B")
        for key, shift in changed.items():
            shifts.add_row(key, str(shift["changed"]), f"{shift['mean_change']:+.3f}")
        out.print(shifts)
    if found["principles_of_one_only"]:
        out.print("rated in one only:", ", ".join(found["principles_of_one_only"]))

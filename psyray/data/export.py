"""A run's preference pairs as a data set folder that `datasets.load_dataset(FOLDER)` reads.

FOLDER/README.md                             the data card
FOLDER/data/train-00000-of-00002.parquet     the published layout; with --full a few columns more
FOLDER/rounds/train-00000-of-00001.parquet   the subset `rounds`: what the online rounds labelled (--rounds)
FOLDER/psyray.json                           the card's facts as data, and which files are the export's own
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from tqdm import tqdm

from psyray.data.card import facts, render
from psyray.data.layout import ROWS_PER_GROUP, to_layout, write_batches
from psyray.errors import PsyrayError
from psyray.files import write_atomic
from psyray.records import file_sum
from psyray.rubric import Rubric, kept_rubric, load_rubric
from psyray.run import ROWS_PER_FILE, Artifact, existing_run, read_stages
from psyray.status import read_config, round_numbers
from psyray.tables import connect, cut, in_order, view

CARD, MARKER, DATA, ROUNDS, DRAFT = "README.md", "psyray.json", "data", "rounds", ".draft"
UNKNOWN = "unknown"  # as the hub calls a licence that nobody named
OWN = (CARD, DATA, ROUNDS, MARKER)
KEPT = {DRAFT, ".git", ".gitattributes", ".cache"}  # what a data set's repository holds beside the export

FULL = [f"pairs.{name}" for name in ("pair_id", "chosen_id", "rejected_id", "margin", "source", "messages")]
FULL += [f"speeches.{name}" for name in ("crisis", "topic", "subtopic")]


@dataclass(frozen=True)
class Source:
    """Where the rows come from: the run's folder, its stages by name, its settings and its rubric."""

    folder: Path
    stages: Mapping[str, Artifact]
    config: Mapping[str, Any]
    rubric: Rubric

    @property
    def rounds(self) -> dict[int, Artifact]:
        """The label stages by round."""
        labels = {n: f"round-{n}/labels" for n in round_numbers(self.stages)}
        return {n: self.stages[name] for n, name in labels.items() if name in self.stages}


@dataclass(frozen=True)
class Subset:
    """One table of the data set: the view that it comes from, and what is written of each row, in which order."""

    folder: str
    view: str
    columns: list[str]
    order: list[str]
    files: dict[str, list[str]] = field(default_factory=dict)  # by split, once written


def export_run(
    run: Path, to: Path, *, full: bool = False, rounds: bool = False, force: bool = False, licence: str | None = None
) -> dict[str, Any]:
    """Write the data set folder and return what its psyray.json says; no licence: that of an earlier export there.

    PsyrayError where the run has no finished pairs, its rubric changed since, or `to` holds anything that an earlier
    export did not write; with `force` such files stay, and only the export's own names are replaced.
    """
    source = read_source(run)
    if to.exists() and not to.is_dir():
        raise PsyrayError(f"{to} is a file; --to names a folder")
    if not force and (foreign := other_content(to)):
        raise PsyrayError(
            f"{to} holds what no export wrote or what was changed since ({', '.join(foreign[:3])}"
            f"{', ...' if len(foreign) > 3 else ''}): give another --to, or --force to replace {', '.join(OWN)} in it"
        )
    keys = to_layout(source.rubric.keys)
    subsets = [Subset(DATA, "pairs", [keys, *(FULL if full else [])], ["ID", "prefID"])]
    if rounds:
        extra = ["pairs.round", *(FULL if full else ["pairs.source"])]
        subsets.append(Subset(ROUNDS, "rounds", [keys, *extra], ["ID", "prefID", "round"]))
    earlier = json.loads((to / MARKER).read_text()) if (to / MARKER).exists() else {}
    licence = licence or earlier.get("licence", UNKNOWN)
    draft = to / DRAFT
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    with connect(draft) as database:
        open_views(database, source, rounds)
        for subset in subsets:
            write_subset(database, draft, subset)
        known = facts(database, source, {s.folder: s.files for s in subsets}, licence)
    (draft / CARD).write_text(render(known))
    write_atomic(draft / MARKER, json.dumps(known | {"own": fingerprints(draft)}, indent=1))
    put_in_place(draft, to)
    return known


def read_source(run: Path) -> Source:
    """The finished stages of the run's latest pass; PsyrayError where pairs are missing or the rubric changed."""
    run = existing_run(run, "rows")
    stages = {stage.name: stage for stage in read_stages(run)}
    if "pairs" not in stages:
        raise PsyrayError(f"{run} has no finished stage `pairs` yet; see `psyray status {run}`")
    config, made_by = read_config(run), stages["pairs"].manifest["config"]["rubric"]
    kept = kept_rubric(run, made_by)  # none in a run that is older
    rubric = load_rubric(str(kept) if kept.exists() else config["rubric"])
    if rubric.id != made_by:
        raise PsyrayError(
            f"the rubric {config['rubric']} has changed since the pairs of {run} were made; "
            "bring the old one back, or run the same command again to rate by the new one"
        )
    return Source(run, stages, config, rubric)


def open_views(database: duckdb.DuckDBPyConnection, source: Source, rounds: bool) -> None:
    """The views `pairs`, `speeches` and, where asked for, `rounds`; PsyrayError where no round is finished."""
    view(database, "pairs", source.stages["pairs"].files)
    view(database, "said", source.stages["speeches"].files)
    topics, found = "said", ""
    if "topics" in source.stages:  # picked by an engine, where no column brought them
        view(database, "topics", source.stages["topics"].files)
        topics, found = "topics", "LEFT JOIN topics USING (speech_id)"
    database.execute(
        f"""CREATE TEMP VIEW speeches AS
        SELECT speech_id, said.crisis, {topics}.topic, {topics}.subtopic FROM said {found}"""
    )
    if not rounds:
        return
    if not source.rounds:
        raise PsyrayError("the run has no finished round, so there is nothing to export for --rounds")
    for number, stage in source.rounds.items():
        view(database, f"round-{number}", stage.files)
    every = " UNION ALL ".join(f'SELECT *, {number} AS round FROM "round-{number}"' for number in source.rounds)
    database.execute(f"CREATE TEMP VIEW rounds AS {every}")


def write_subset(database: duckdb.DuckDBPyConnection, draft: Path, subset: Subset) -> None:
    """Write the subset's splits in files of ROWS_PER_FILE rows, and note them in `subset.files`."""
    (draft / subset.folder).mkdir()
    counts = f"SELECT split, count(*) FROM {subset.view} GROUP BY split ORDER BY split DESC"
    for split, rows in database.execute(counts).fetchall():
        query = f"""SELECT {", ".join(subset.columns)}
            FROM {subset.view} pairs LEFT JOIN speeches ON speeches.speech_id = pairs.speech_id
            WHERE pairs.split = $split"""
        stream = in_order(database, query, subset.order, {"split": split}, ROWS_PER_GROUP)
        subset.files[split] = write_shards(draft / subset.folder, split, rows, stream)


def write_shards(folder: Path, split: str, rows: int, stream: Iterable[pa.RecordBatch]) -> list[str]:
    """Write `rows` rows as SPLIT-i-of-n.parquet, ROWS_PER_FILE in each; the files' names."""
    count = -(-rows // ROWS_PER_FILE)
    names = [f"{split}-{number:05d}-of-{count:05d}.parquet" for number in range(count)]
    with tqdm(total=rows, desc=f"{folder.name}, {split}", unit="pairs", dynamic_ncols=True) as bar:
        for number, pieces in groupby(cut(stream, ROWS_PER_FILE), key=itemgetter(0)):
            write_batches(folder / names[number], _counted((piece for _, piece in pieces), bar))
    return names


def _counted(batches: Iterable[pa.RecordBatch], bar: tqdm[Any]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        yield batch
        bar.update(batch.num_rows)


def other_content(to: Path) -> list[str]:
    """What the folder holds that no export wrote, or that was changed since one wrote it."""
    names = {path.name for path in to.iterdir()} - KEPT if to.exists() else set()
    if MARKER not in names or names - set(OWN):
        return sorted(names - set(OWN)) or sorted(names)
    written = json.loads((to / MARKER).read_text())["own"]
    return [name for name, state in fingerprints(to).items() if written.get(name) != state]


def fingerprints(folder: Path) -> dict[str, str]:
    """What the export's files hold, by name: the card's hash, the size of the data files."""
    card = folder / CARD
    found = {CARD: file_sum(card)} if card.exists() else {}
    for file in sorted(path for name in (DATA, ROUNDS) for path in (folder / name).rglob("*") if path.is_file()):
        found[str(file.relative_to(folder))] = f"{file.stat().st_size} bytes"
    return found


def put_in_place(draft: Path, to: Path) -> None:
    """Move the finished export into its folder, in place of an earlier one."""
    for name in OWN:
        old = to / name
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
        if (draft / name).exists():
            (draft / name).rename(old)
    shutil.rmtree(draft)

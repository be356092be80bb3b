"""Data sets that bring responses along, in the layout of PsychoCounsel-Preference.

With `use: pairs` their pairs are ready: they train and test the reward model as they are. With `use: pool` their
rated responses are a pool, and the run's own gap rule makes the pairs. Either way a speech is one of the stage
`speeches`: scrubbed the same, dropped for the same reasons, on the side of the split that it got there.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from psyray.data.clean import conversation, scrubbed
from psyray.data.layout import SIDES, from_layout, rating_columns
from psyray.data.scrub import Scrub, scrubber
from psyray.data.sources import identity, layout, open_source
from psyray.files import write_parquet
from psyray.records import PAIRS, Row, Status, normalise, rows, table
from psyray.rubric import Rubric
from psyray.run import Artifact, Folder, Run
from psyray.sections.data import SourceSection, SpeechesSection
from psyray.tables import connect, view

if TYPE_CHECKING:
    import duckdb

CHUNK = 4_000
POOL = "pool"  # stands as `source` in the rows of a pool; ready pairs are of the source "data set"


@dataclass(frozen=True)
class Ready:
    """The finished stage `ready`: PAIRS rows of both uses."""

    artifact: Artifact

    def pairs(self) -> Iterator[Row]:
        """The ready pairs."""
        return (row for row in self.artifact.each() if row["source"] != POOL)

    def responses(self) -> Iterator[Row]:
        """RESPONSES rows of all its responses, each once, with `ratings` beside."""
        seen = set[str]()
        for pair in self.artifact.each():
            for row in responses_of(pair):
                if row["response_id"] not in seen:
                    seen.add(row["response_id"])
                    yield row


def responses_of(pair: Row) -> Iterator[Row]:
    """The two RESPONSES rows of a pair, with `ratings` beside."""
    for side in SIDES:
        yield {
            "response_id": pair[f"{side}_id"],
            **{key: pair[key] for key in ("speech_id", "messages", "split", "crisis")},
            "responder": pair["source"],
            "model": pair[f"{side}_model"],
            "text": pair[side],
            "ratings": pair[f"{side}_ratings"],
            "status": Status.OK,
            "attempts": 0,
        }


def ready_stage(run: Run, section: SpeechesSection, rubric: Rubric, speeches: Artifact) -> Ready | None:
    """The stage `ready`: PAIRS rows of the sources that bring responses along; None where no source does."""
    sources = [source for source in section.listed() if source.use != "speeches"]
    if not sources:
        return None
    config = {
        "sources": [s.model_dump(mode="json", exclude={"path"}) | {"content": identity(s)} for s in sources],
        "scrub": section.scrub,
        "rubric": rubric.id,
    }

    def make(folder: Folder) -> Mapping[str, Any]:
        work = folder.path / "work"
        work.mkdir(exist_ok=True)
        counts: Counter[str] = Counter()
        files = list(gather(sources, rubric, scrubber(section.scrub), counts, work))
        parts = folder.parts(PAIRS, "pair_id")
        with connect(work) as database:
            for batch in usable(database, files, speeches.files, counts):
                parts.append(batch)
        parts.finish()
        shutil.rmtree(work)
        return dict(counts)

    return Ready(run.stage("ready", config, [speeches], make))


def gather(
    sources: Sequence[SourceSection], rubric: Rubric, scrub: Scrub, counts: Counter[str], work: Path
) -> Iterator[Path]:
    """Cut the sources' pairs into files of PAIRS rows under `work`; what is no pair or no rating is counted."""
    found = (row for source in sources for row in pairs_of(source, rubric, scrub, counts))
    number = 0
    while chunk := list(islice(found, CHUNK)):
        path = work / f"ready-{number:05d}.parquet"
        write_parquet(path, table(chunk, PAIRS))
        yield path
        number += 1


def pairs_of(source: SourceSection, rubric: Rubric, scrub: Scrub, counts: Counter[str]) -> Iterator[Row]:
    """The source's PAIRS rows with the side of the split still open."""
    opened = open_source(source)
    text = layout(source, opened.columns).text
    wanted = [*SIDES, *(f"{side}_model" for side in SIDES), *rating_columns(rubric.keys)]
    for row in (row for batch in opened.read([text, *(c for c in wanted if c in opened.columns)]) for row in batch):
        counts["read"] += 1
        messages = conversation(row.get(text))
        if messages is None or not all(isinstance(row.get(side), str) and row[side].strip() for side in SIDES):
            counts["no text"] += 1
        elif normalise(row["chosen"]) == normalise(row["rejected"]):
            counts["same text"] += 1
        else:
            row |= {side: scrub(row[side])[0] for side in SIDES}
            pair = from_layout(row, scrubbed(messages, scrub)[0], rubric, counts)
            yield pair | ({"source": POOL} if source.use == "pool" else {})


# One row of each pair, by where it lies: only ids and places, since whole rows need not fit into memory.
_USABLE = """
CREATE TEMP TABLE usable AS
SELECT r.filename AS file, r.file_row_number AS row, s.split, s.crisis FROM (
    SELECT pair_id, speech_id, chosen_id, rejected_id, source, filename, file_row_number FROM ready
    QUALIFY row_number() OVER (PARTITION BY pair_id ORDER BY source, margin, filename, file_row_number) = 1
) r JOIN speech s USING (speech_id)
ANTI JOIN ready other ON r.source <> 'pool' AND other.source <> 'pool'
    AND other.chosen_id = r.rejected_id AND other.rejected_id = r.chosen_id
"""


def usable(
    database: duckdb.DuckDBPyConnection, files: Sequence[Path], speeches: Sequence[Path], counts: Counter[str]
) -> Iterator[list[Row]]:
    """Batches of PAIRS rows whose speech stayed, on its side of the split; the others are counted.

    A pair that the data set also holds the other way round is no label and is left out, both ways.
    """
    if not files:
        return
    view(database, "ready", files, places=True)
    view(database, "speech", speeches)
    database.execute(_USABLE)
    kept: Counter[str] = Counter()
    for file in files:
        query = "SELECT row, split, crisis FROM usable WHERE file = $file ORDER BY row"
        here = database.sql(query, params={"file": str(file)}).to_arrow_table()
        found = rows(pq.read_table(file).take(here["row"]))
        sides = here.select(["split", "crisis"]).to_pylist()
        yield [row | side for row, side in zip(found, sides, strict=True)]
        kept.update(side["split"] for side in sides)
    total, unique, lost = database.execute(
        "SELECT count(*), count(DISTINCT pair_id), "
        "count(DISTINCT pair_id) FILTER (speech_id NOT IN (SELECT speech_id FROM speech)) FROM ready"
    ).fetchone() or (0, 0, 0)
    counts.update({"train": kept["train"], "test": kept["test"], "duplicate": total - unique, "speech dropped": lost})
    counts["both ways round"] = unique - lost - kept.total()

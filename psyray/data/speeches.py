"""The stage `speeches`: client speeches read, scrubbed, filtered, de-duplicated and split.

    psyray run configs/demo.yaml speeches.path=questions.jsonl speeches.text_column=questionText

The driver only passes batches on: sources are cut into chunk files, workers clean them, and DuckDB decides over all
chunks what stays.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from psyray import crisis
from psyray.data.clean import RAW, clean_chunk, cleaned_path, conversation
from psyray.data.dedup import mark_near_duplicates
from psyray.data.scrub import KINDS
from psyray.data.sources import identity, layout, open_source
from psyray.errors import PsyrayError
from psyray.files import write_parquet
from psyray.records import SPEECHES, Row, content_id, table
from psyray.run import Artifact, Folder, Run
from psyray.sections.data import ASSETS, SourceSection, SpeechesSection
from psyray.stream import Progress
from psyray.tables import connect, in_order, view

if TYPE_CHECKING:
    import duckdb

SHIPPED = ASSETS / "speeches.jsonl"
CHUNK = 4_000  # speeches that a worker cleans together
TOPICS_SHOWN = 100  # of a column with more, the largest stand in the numbers


@dataclass
class Raw:
    """The chunk files of all sources, and what was counted on the way."""

    files: list[Path] = field(default_factory=list)
    read: Counter[str] = field(default_factory=Counter)  # source -> rows
    without_text: int = 0


def speeches_stage(run: Run, section: SpeechesSection) -> Artifact:
    """The stage `speeches`: rows of SPEECHES and counts of what was dropped and why."""
    sources = listed(section)
    # The text decides, not the path: a copy of the file elsewhere is the same input.
    config = section.model_dump(mode="json", exclude={"path", "sources", "exclude"}) | {
        "sources": [s.model_dump(mode="json", exclude={"path"}) | {"content": identity(s)} for s in sources],
        "crisis_rule": content_id(crisis.identity()),
    }

    def make(folder: Folder) -> Mapping[str, Any]:
        work = folder.path / "work"
        work.mkdir(exist_ok=True)
        raw = gather(sources, work)
        files = clean_all(raw, section, folder)
        parts = folder.parts(SPEECHES, "speech_id")
        with connect(work) as database:
            stats = select(database, files, section, raw)
            for batch in kept(database):
                parts.append(batch)
        parts.finish()
        shutil.rmtree(work)
        return stats

    return run.stage("speeches", config, [], make)


def preview(section: SpeechesSection, most: int | None = None) -> tuple[list[Row], dict[str, Any]]:
    """The stage's rows and numbers without a run or Ray, of the first `most` rows of each source."""
    with TemporaryDirectory(prefix="psyray-") as folder, connect(Path(folder)) as database:
        raw = gather(listed(section), Path(folder), most)
        stats = select(database, [clean_chunk(path, section) for path in raw.files], section, raw)
        return [row for batch in kept(database) for row in batch], stats


def listed(section: SpeechesSection) -> list[SourceSection]:
    """All sets to read: the configured ones, else those that ship; test sets to leave out last, named `exclude`."""
    sources = section.listed() or [SourceSection(name="shipped", path=str(SHIPPED))]
    return [*sources, *(SourceSection(name="exclude", path=path) for path in section.exclude)]


def gather(sources: Sequence[SourceSection], work: Path, most: int | None = None) -> Raw:
    """Cut all sources into files of RAW rows under `work`; rows without a text are counted and left out."""
    raw = Raw()
    rows = _raw_rows(sources, raw, most)
    with tqdm(desc="speeches: reading", unit="rows", mininterval=2, delay=2, leave=False) as bar:
        while chunk := list(islice(rows, CHUNK)):
            path = work / f"raw-{len(raw.files):05d}.parquet"
            write_parquet(path, table(chunk, RAW))
            raw.files.append(path)
            bar.update(len(chunk))
    return raw


def _raw_rows(sources: Sequence[SourceSection], raw: Raw, most: int | None) -> Iterator[Row]:
    number = 0
    for source in sources:
        opened = open_source(source)
        columns = layout(source, opened.columns)
        about = {
            "source": source.name,
            "side": source.side,
            "excluded": source.name == "exclude",
            "repeats": columns.repeats,
            "answered": source.use != "speeches",
        }
        for row in islice((row for batch in opened.read(columns.columns) for row in batch), most):
            raw.read[source.name] += 1
            messages = conversation(row.get(columns.text))
            if messages is None:
                raw.without_text += not about["excluded"]
                continue
            topic, subtopic = (str(row.get(name) or "") if name else "" for name in (columns.topic, columns.subtopic))
            yield about | {"row": number, "messages": messages, "topic": topic, "subtopic": subtopic}
            number += 1


def clean_all(raw: Raw, section: SpeechesSection, folder: Folder) -> list[Path]:
    """The cleaned chunks' files; chunks that an earlier attempt cleaned are kept. Each is one task of Ray Data."""
    todo = [path for path in raw.files if not cleaned_path(path).exists()]
    with Progress(folder, "speeches", len(raw.files), len(raw.files) - len(todo), unit="chunks") as progress:
        for _ in _cleaned(todo, section):
            progress.add(1)
    return [cleaned_path(path) for path in raw.files]


def _cleaned(todo: Sequence[Path], section: SpeechesSection) -> Iterable[object]:
    if len(todo) < 2:
        # Nothing to share out: sooner done than a worker starts.
        return map(clean_chunk, todo, [section] * len(todo))
    import ray

    def clean(row: Row) -> Row:
        return {"done": clean_chunk(Path(row["path"]), section).name}

    chunks = ray.data.from_items([{"path": str(path)} for path in todo], override_num_blocks=len(todo))
    return chunks.map(clean, num_cpus=1).iter_rows()  # type: ignore[no-any-return]


_POOL = """
CREATE TEMP TABLE pool AS SELECT row_number() OVER (ORDER BY rank, speech_id) AS n, * FROM (
    SELECT speech_id, min(rank) AS rank, any_value(place) AS place, any_value(canon) AS canon,
        bool_or(answered) AS answered, bool_and(side = 'train') AS train,
        first(row ORDER BY excluded, topic = '', source, topic, subtopic, variant, row) AS row
    FROM clean WHERE reason IS NULL GROUP BY speech_id
)
"""
_KEPT = """
CREATE TEMP TABLE kept AS
SELECT speech_id, row, answered,
    CASE WHEN bool_or(rank = 1) OVER (PARTITION BY place) OR (place < $share AND NOT train)
        THEN 'test' ELSE 'train' END AS split  -- a conversation's stretches have one place
FROM pool ANTI JOIN gone USING (n) WHERE rank > 0 ORDER BY speech_id LIMIT $limit
"""
_ROWS = """
SELECT k.speech_id, c.messages, k.split, c.topic, c.subtopic, len(c.crisis_kinds) > 0 AS crisis, c.crisis_kinds,
    c.source, k.answered
FROM kept k JOIN clean c USING (row)
"""


def select(
    database: duckdb.DuckDBPyConnection, files: Sequence[Path], section: SpeechesSection, raw: Raw
) -> dict[str, Any]:
    """Decide over all cleaned chunks what stays, as `database`'s table `kept`, and return the stage's numbers.

    PsyrayError where nothing stays, or one side of the split is empty.
    """
    if not files and not raw.read.total():
        raise PsyrayError(f"{_paths(section)}: no rows")
    if not files:
        raise _nothing_left(section, Counter({"no text": raw.without_text}))
    view(database, "clean", files)
    database.execute(_POOL)
    database.execute("CREATE TEMP TABLE gone (n BIGINT, keeper BIGINT)")
    if section.near_duplicates is not None:
        mark_near_duplicates(database, section.near_duplicates)
    database.execute(_KEPT, {"share": section.test_share, "limit": section.limit or 2**62})
    dropped = _dropped(database, raw)
    stats = _numbers(database, section, raw, dropped)
    _check(stats, section, dropped)
    return stats


def kept(database: duckdb.DuckDBPyConnection) -> Iterator[list[Row]]:
    """Batches of SPEECHES rows that `select` kept, in the order of their ids."""
    for batch in in_order(database, _ROWS, ["speech_id"]):
        yield batch.to_pylist()


def _counts(database: duckdb.DuckDBPyConnection, query: str) -> dict[str, int]:
    return {str(name): int(count) for name, count in database.execute(query).fetchall()}


def _dropped(database: duckdb.DuckDBPyConnection, raw: Raw) -> Counter[str]:
    """Why rows are no speeches of their own; with `kept` they sum to the rows read."""
    reasons = Counter({"no text": raw.without_text})
    reasons.update(_counts(database, "SELECT reason, count(*) FROM clean WHERE reason IS NOT NULL GROUP BY reason"))
    counted = """
    WITH given AS (SELECT speech_id, source, count(*) AS k, bool_or(repeats) AS repeats FROM clean
                   WHERE reason IS NULL AND NOT excluded GROUP BY ALL)
    SELECT 'another row of its speech', sum(k - 1) FILTER (repeats) FROM given
    UNION ALL SELECT 'duplicate', sum(k - 1) FILTER (NOT repeats) FROM given
    UNION ALL SELECT 'duplicate', count(*) - count(DISTINCT speech_id) FROM given
    UNION ALL SELECT 'in an excluded set', count(*) FROM pool
              WHERE rank = 0 AND speech_id IN (SELECT speech_id FROM given)
    UNION ALL SELECT CASE WHEN keeper.rank = 0 THEN 'near an excluded speech' ELSE 'near-duplicate' END, 1
              FROM gone JOIN pool keeper ON keeper.n = gone.keeper
    UNION ALL SELECT 'over speeches.limit', (SELECT count(*) FROM pool ANTI JOIN gone USING (n) WHERE rank > 0)
              - (SELECT count(*) FROM kept)
    """
    query = f"SELECT reason, sum(coalesce(count, 0)) FROM ({counted}) AS t(reason, count) GROUP BY reason"
    reasons.update(_counts(database, query))
    return +reasons


def _numbers(
    database: duckdb.DuckDBPyConnection, section: SpeechesSection, raw: Raw, dropped: Counter[str]
) -> dict[str, Any]:
    splits = _counts(database, "SELECT split, count(*) FROM kept GROUP BY split")
    about = "FROM kept JOIN clean USING (row)"
    kinds = f"SELECT kind, count(*) FROM (SELECT unnest(crisis_kinds) AS kind {about}) GROUP BY kind ORDER BY kind"
    found = f"SELECT {', '.join(f'sum({kind})' for kind in KINDS)} {about}"
    scrubbed = dict(zip(KINDS, database.execute(found).fetchone() or (), strict=False))
    crises = _counts(database, f"SELECT 'crisis', count(*) {about} WHERE len(crisis_kinds) > 0")
    return {
        "read": raw.read.total() - raw.read["exclude"],
        "kept": sum(splits.values()),
        "train": splits.get("train", 0),
        "test": splits.get("test", 0),
        "dropped": dict(dropped),
        "crisis": crises["crisis"],
        "crisis_kinds": _counts(database, kinds),
        "scrubbed": {kind: int(count or 0) for kind, count in scrubbed.items()},
        "sources": dict(raw.read),
        "kept_of": _counts(database, f"SELECT source, count(*) {about} GROUP BY source ORDER BY source"),
        "topics": _topics(database, splits),
    }


def _topics(database: duckdb.DuckDBPyConnection, splits: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Both sides of the split for each of the largest topics, and for the rest together."""
    query = """
    SELECT topic, count(*) FILTER (split = 'train'), count(*) FILTER (split = 'test')
    FROM kept JOIN clean USING (row) GROUP BY topic ORDER BY count(*) DESC, topic LIMIT $most
    """
    found = database.execute(query, {"most": TOPICS_SHOWN}).fetchall()
    topics = {topic or "none": {"train": train, "test": test} for topic, train, test in found}
    rest = {side: splits.get(side, 0) - sum(topic[side] for topic in topics.values()) for side in ("train", "test")}
    return topics | ({"others": rest} if any(rest.values()) else {})


def _nothing_left(section: SpeechesSection, dropped: Counter[str]) -> PsyrayError:
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none dropped"
    limits = f"{section.min_chars} to {section.max_chars} characters"
    roles = "; a conversation has the roles user and assistant, and ends with user" if dropped["no text"] else ""
    return PsyrayError(f"{_paths(section)}: no speech is left ({reasons}; kept are those of {limits}{roles})")


def _paths(section: SpeechesSection) -> str:
    return ", ".join(source.path for source in listed(section) if source.name != "exclude")


def _check(stats: Mapping[str, Any], section: SpeechesSection, dropped: Counter[str]) -> None:
    if not stats["kept"]:
        raise _nothing_left(section, dropped)
    for split in ("train", "test"):
        if not stats[split]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none dropped"
            raise PsyrayError(
                f"{_paths(section)}: {stats['kept']} speeches are left and none of them falls to {split} ({reasons}); "
                "give more speeches or another speeches.test_share"
            )

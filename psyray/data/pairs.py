"""Preference pairs from judged responses, one speech at a time, however many there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, groupby, islice
from typing import Any

import duckdb
import pyarrow as pa

from psyray.data.layout import layout, write_batches
from psyray.data.ready import POOL, Ready
from psyray.data.rules import LengthBalance, Rules, pairs_of_speech
from psyray.errors import PsyrayError
from psyray.records import PAIRS, Row, rows
from psyray.rubric import Rubric
from psyray.run import Artifact, Folder, Run
from psyray.sections.data import PairsSection
from psyray.stream import Progress
from psyray.tables import connect, in_order, literal, view

LAYOUT = "psychocounsel.parquet"
ROWS_PER_PART = 8192

# Of a response that stands several times, the run's own judgement comes first.
JUDGED = """
SELECT r.speech_id, r.response_id, r.messages, r.split, r.crisis, r.model, r.text, r.truncated, j.ratings, '' AS origin
FROM responses r JOIN judgements j USING (response_id)
WHERE r.status = 'ok' AND j.status = 'ok'
"""
POOLED = """
UNION ALL
SELECT speech_id, {side}_id, messages, split, crisis, {side}_model, {side}, {side}_truncated, {side}_ratings, pair_id
FROM ready WHERE source = {pool} AND list_has_all(map_keys({side}_ratings), [{keys}])
"""


def pairs_stage(
    run: Run,
    section: PairsSection,
    rubric: Rubric,
    responses: Artifact,
    judgements: Artifact,
    ready: Ready | None = None,
) -> Artifact:
    """The stage `pairs`: rows of PAIRS, the same in the published layout, and counts of what was left out.

    Pairs of a data set join those that the rules make; rated responses of one go through the rules. PsyrayError for a
    rule that the rubric cannot follow, and where no training pair is left.
    """
    rules = Rules.make(section, rubric)
    stages = {"responses": responses, "judgements": judgements} | ({"ready": ready.artifact} if ready else {})

    def make(folder: Folder) -> Mapping[str, Any]:
        splits: Counter[str] = Counter()
        dropped: Counter[str] = Counter()
        parts = folder.parts(PAIRS, "pair_id")
        total = judgements.manifest["rows"] * (2 if section.balance_length else 1)
        with connect(folder.path) as database, Progress(folder, "pairs", total, unit="responses") as progress:
            built = build_pairs(partial(judged, database, stages, rubric, progress), rules, dropped)
            found = chain(built, ready.pairs() if ready else [])
            while batch := list(islice(found, ROWS_PER_PART)):
                parts.append(batch)
                splits.update(pair["split"] for pair in batch)
        if not splits["train"]:
            raise PsyrayError(_nothing_left(section, +dropped))
        parts.finish()
        with connect(folder.path) as database:
            view(database, "pairs", sorted(folder.path.glob("data-*.parquet")))
            write_batches(folder.path / LAYOUT, layout(database, rubric.keys))
        return {"train": splits["train"], "test": splits["test"], "dropped": dict(+dropped)}

    return run.stage("pairs", section.model_dump() | {"rubric": rubric.id}, list(stages.values()), make)


def judged(
    database: duckdb.DuckDBPyConnection, stages: Mapping[str, Artifact], rubric: Rubric, progress: Progress
) -> Iterator[Row]:
    """Usable responses with their usable ratings, joined by id, each once, those of one speech together."""
    for name, artifact in stages.items():
        view(database, name, artifact.files)
    query = JUDGED
    if "ready" in stages:
        keys = ", ".join(map(literal, rubric.keys))
        query += "".join(POOLED.format(side=side, pool=literal(POOL), keys=keys) for side in ("chosen", "rejected"))
    last = ""
    for batch in in_order(database, query, ["speech_id", "response_id", "origin"]):
        for row in rows(pa.Table.from_batches([batch])):
            if row["response_id"] != last:
                yield row
            last = row["response_id"]
        progress.add(batch.num_rows)


def build_pairs(judged: Callable[[], Iterable[Row]], rules: Rules, dropped: Counter[str]) -> Iterator[Row]:
    """The pairs that the rules make; `dropped` counts why other candidates became none.

    `judged` gives the rows anew at each call, those of one speech together: balancing the lengths reads them twice.
    """
    if not rules.section.balance_length:
        yield from _by_speech(judged(), rules, dropped)
        return
    balance = LengthBalance()
    for pair in _by_speech(judged(), rules, Counter()):
        balance.add(pair)
    for pair in _by_speech(judged(), rules, dropped):
        if balance.keeps(pair):
            yield pair
        else:
            dropped["to balance the lengths"] += 1


def _by_speech(judged: Iterable[Row], rules: Rules, dropped: Counter[str]) -> Iterator[Row]:
    for _, responses in groupby(judged, key=lambda row: row["speech_id"]):
        yield from pairs_of_speech(list(responses), rules, dropped)


def _nothing_left(section: PairsSection, dropped: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "there were no responses"
    return (
        f"no training pair is left ({reasons}): lower pairs.gap (now {section.gap}), "
        "draw more responses (responses.k, at least 2) or give more speeches"
    )

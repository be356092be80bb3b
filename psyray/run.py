"""A run is a folder; a stage is a folder in it, named by the fingerprint of all it depends on.

    RUN/run.json                      the stages of the latest pass, in order, and what ended it before the last
    RUN/config.yaml                   the resolved configuration of the latest pass
    RUN/rubric-0b7f93d2.yaml          the rubric of that id as it was; two ids, alone and side by side
    RUN/stages/pairs/3fa9c1e2/        one result of the stage `pairs`
        part-00000.parquet ...        rows as they come in
        data-00000.parquet            all rows, once the stage is done
        progress.json                 how far it is
        manifest.json                 written last: the stage is done
    RUN/seen/pairs/3fa9c1e2/          of a run at a URI: manifest and rows, fetched to read; no run goes on from them

Resume is the same command again: a stage whose manifest exists is not run; one that was cut off goes on from
its rows. A changed setting gives other fingerprints to exactly the stages that depend on it, so nothing is
overwritten, and going back to the old setting finds the old results.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from psyray.addresses import redact
from psyray.errors import PsyrayError
from psyray.files import ROWS_IN_MEMORY, each, read_json, read_settings, write_atomic, write_parquet
from psyray.homes import no_run, run_path, uri_of, whereabouts
from psyray.mirror import Mirror
from psyray.records import Row, content_id, table
from psyray.stopping import Reached
from psyray.tables import connect, cut, in_order, sources

ROWS_PER_FILE = 50_000
STAGES, SEEN = "stages", "seen"
What = Literal["facts", "rows", "all"]  # of a run: the stages' manifests, their rows too, their models too


@dataclass(frozen=True)
class Artifact:
    """What a finished stage left behind."""

    name: str
    path: Path
    fingerprint: str
    manifest: Mapping[str, Any]

    @property
    def files(self) -> list[Path]:
        """The Parquet files that hold the stage's rows, in order."""
        return [self.path / name for name in self.manifest["files"]]

    def each(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """The stage's rows as dicts, one after another: for stages of any size."""
        return each(self.files, columns)

    def rows(self) -> list[Row]:
        """The stage's rows as dicts, all at once: for what fits into memory."""
        return list(self.each())

    @property
    def stats(self) -> dict[str, Any]:
        """Numbers that the stage reported."""
        return dict(self.manifest["stats"])

    @property
    def model(self) -> Path:
        """The Hugging Face folder of a stage that trained a model."""
        return self.path / "model"


@dataclass
class Folder:
    """A stage at work: where it puts rows, models and progress."""

    path: Path
    _shown: float = field(default=0.0, repr=False)

    def parts(self, schema: pa.Schema, key: str) -> Parts:
        """The stage's rows; those already there are what an earlier attempt finished."""
        return Parts(self.path, schema, key)

    def keep(self, schema: pa.Schema, key: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """All the stage's rows, where they come at once."""
        parts = self.parts(schema, key)
        parts.append(rows)
        parts.finish()

    def progress(self, done: int, total: int, unit: str = "rows") -> None:
        """Note how far the stage is, at most once a second, for `psyray status`."""
        now = time.time()
        if now - self._shown >= 1 or done >= total:
            self._shown = now
            state = {"done": done, "total": total, "unit": unit, "at": now, "pid": os.getpid()}
            write_atomic(self.path / "progress.json", json.dumps(state))


class Parts:
    """Rows of one stage, kept in small files as they arrive and in large sorted ones when all are in."""

    def __init__(self, path: Path, schema: pa.Schema, key: str) -> None:
        self.path, self.schema, self.key = path, schema, key
        self.ids: set[str] = set()
        files = self.files()
        for part in files:
            self.ids.update(pq.read_table(part, columns=[key])[key].to_pylist())
        self._number = int(files[-1].stem[5:]) + 1 if files else 0

    def files(self) -> list[Path]:
        """The part files so far, in the order in which they came."""
        return sorted(self.path.glob("part-*.parquet"))

    def each(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """The rows so far as dicts, in the order in which they came."""
        return each(self.files(), columns)

    def todo(self, candidates: Iterable[Mapping[str, Any]]) -> list[Row]:
        """The candidates, each key once, that have no row yet."""
        unique = {row[self.key]: dict(row) for row in candidates}
        return [row for key, row in unique.items() if key not in self.ids]

    def append(self, batch: Iterable[Mapping[str, Any]]) -> int:
        """Keep a batch of new rows; a row whose key is known already is dropped. Returns how many were kept."""
        fresh = self.todo(batch)
        if fresh:
            write_parquet(self.path / f"part-{self._number:06d}.parquet", table(fresh, self.schema))
            self._number += 1
            self.ids.update(row[self.key] for row in fresh)
        return len(fresh)

    def finish(self) -> None:
        """Merge the parts into data files, sorted by key, so that a resumed stage equals an undisturbed one."""
        if not (files := self.files()):
            write_parquet(self.path / "data-00000.parquet", self.schema.empty_table())
            return
        with connect(self.path) as database:
            query, given = "SELECT * FROM read_parquet($files)", {"files": sources(files)}
            found = in_order(database, query, [self.key], given, ROWS_IN_MEMORY)
            for number, pieces in groupby(cut(found, ROWS_PER_FILE), key=itemgetter(0)):
                ordered = pa.Table.from_batches([piece for _, piece in pieces])
                write_parquet(self.path / f"data-{number:05d}.parquet", ordered.cast(self.schema))

    def set_aside(self, ids: set[str]) -> Path:
        """Move rows out into a file beside the stage's, so that the next attempt makes them again."""
        aside = self.path / f"aside-{time.time_ns()}.parquet"
        out = pa.array(sorted(ids), pa.string())
        with pq.ParquetWriter(aside, self.schema) as writer:
            for part in self.files():
                held = pq.read_table(part, schema=self.schema)
                leaves = pc.is_in(held[self.key], value_set=out)
                writer.write_table(held.filter(leaves))
                write_parquet(part, held.filter(pc.invert(leaves)))
        self.ids -= ids
        return aside


Make = Callable[[Folder], Mapping[str, Any]]


class Run:
    """An open run folder; one process at a time works in it."""

    def __init__(
        self,
        path: Path,
        say: Callable[[str], None] = print,
        until: str | None = None,
        mirror: Mirror | None = None,
    ) -> None:
        self.path, self.say, self.until, self.mirror = run_path(path), say, until, mirror
        self.stages: list[dict[str, str]] = []
        self.on_stage: Callable[[Artifact], None] = lambda artifact: None

    @contextmanager
    def open(self, config: Mapping[str, Any]) -> Iterator[Run]:
        """Hold the run's lock and write down its configuration; PsyrayError if another process is at work in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read().strip()
                raise PsyrayError(f"{self.path} is in use by process {holder}; wait for it or end it") from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            self._note_changes(config)
            try:
                yield self
            except KeyboardInterrupt:
                self._write_list(stopped=_now())
                raise
            except PsyrayError as error:
                if self.stages:
                    self._write_list(error=str(error))
                raise

    def _note_changes(self, config: Mapping[str, Any]) -> None:
        kept = self.path / "config.yaml"
        if kept.exists():
            for line in _differences(read_settings(kept), config):
                self.say(f"changed since the last run: {line}")
        write_atomic(kept, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))

    def stage(self, name: str, config: Mapping[str, Any], inputs: Sequence[Artifact], make: Make) -> Artifact:
        """The finished stage: read if its manifest is there, otherwise made.

        `config` is all that the result depends on beside the inputs. `make` writes into the folder and returns
        the stage's numbers; rows that it kept with `Folder.parts` are merged afterwards. Raises Reached where the run
        was to go up to this stage.
        """
        fingerprint = _fingerprint(name, config, inputs)
        folder = Folder(self.path / STAGES / name / fingerprint)
        self._list(name, fingerprint)
        manifest = folder.path / "manifest.json"
        if not manifest.exists() and self.mirror and self.mirror.fetch(folder.path):
            self.say(f"{name}: fetched from {self.mirror.uri}")
        elif manifest.exists():
            self.say(f"{name}: done before ({json.loads(manifest.read_text())['rows']} rows)")
        else:
            self._announce(name, folder)
            self._make(name, fingerprint, config, inputs, folder, make)
        artifact = Artifact(name, folder.path, fingerprint, json.loads(manifest.read_text()))
        if self.mirror:
            self.mirror.keep(folder.path)
        self.on_stage(artifact)
        if name == self.until:
            self.say(f"{name}: the last stage that was asked for (--until)")
            self._write_list(until=name)
            raise Reached
        return artifact

    def has(self, name: str, config: Mapping[str, Any], inputs: Sequence[Artifact]) -> bool:
        """Whether that very stage is finished already."""
        folder = self.path / STAGES / name / _fingerprint(name, config, inputs)
        return (folder / "manifest.json").exists() or bool(self.mirror and self.mirror.has(folder))

    def _announce(self, name: str, folder: Folder) -> None:
        stage = folder.path.parent
        others = list(stage.glob("*/manifest.json"))
        if folder.path.exists():
            self.say(f"{name}: goes on where it was cut off")
        elif others:
            self.say(f"{name}: runs again, since something it depends on changed (the old result stays)")
        else:
            self.say(f"{name}: starts")

    def _make(
        self,
        name: str,
        fingerprint: str,
        config: Mapping[str, Any],
        inputs: Sequence[Artifact],
        folder: Folder,
        make: Make,
    ) -> None:
        folder.path.mkdir(parents=True, exist_ok=True)
        started = time.time()
        stats = make(folder)
        files = sorted(p.name for p in folder.path.glob("data-*.parquet"))
        manifest = {
            "stage": name,
            "fingerprint": fingerprint,
            "config": config,
            "inputs": {a.name: a.fingerprint for a in inputs},
            "files": files,
            "rows": sum(pq.read_metadata(folder.path / f).num_rows for f in files),
            "stats": stats,
            "seconds": round(time.time() - started, 1),
            "finished": _now(),
        }
        write_atomic(folder.path / "manifest.json", json.dumps(manifest, indent=1, default=str))
        for part in folder.path.glob("part-*.parquet"):
            part.unlink()
        self.say(f"{name}: done, {manifest['rows']} rows in {manifest['seconds']:.0f} s")

    def _list(self, name: str, fingerprint: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self.stages.append({"name": name, "fingerprint": fingerprint})
        self._write_list()

    def _write_list(self, **more: str) -> None:
        state = {"pid": os.getpid(), "host": platform.node(), "stages": self.stages, **more}
        write_atomic(self.path / "run.json", json.dumps(state, indent=1))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _fingerprint(name: str, config: Mapping[str, Any], inputs: Sequence[Artifact]) -> str:
    return content_id(name, config, [a.fingerprint for a in inputs])


def _differences(before: Any, after: Any, at: str = "") -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in {**before, **after}:
            yield from _differences(before.get(key), after.get(key), f"{at}.{key}" if at else str(key))
    elif before != after:
        # The settings before may be those of a version that took a password in a URL.
        yield f"{at}: {redact(repr(before)):.60} -> {redact(repr(after)):.60}"


def followed(path: Path, written_in: Path, run: Path) -> Path:
    """Where a path inside a run folder is, now that the folder is at `run`: it was moved or fetched, or was not."""
    moved = run / path.relative_to(written_in) if path.is_relative_to(written_in) else path
    return moved if moved.exists() else path


def find_run(path: Path, what: What = "facts") -> Path:
    """The absolute folder of a run, or of runs, that is there already; where it is nowhere, where one would be made.

    Of a run at a URI, what the folder lacks is fetched first, which stderr tells; PsyrayError where no run is there.
    """
    found = next((place for place in whereabouts(path) if place.exists()), run_path(path))
    if uri := uri_of(path):
        fetch_run(Mirror(uri, found, say=_to_stderr), what)
    return found


def existing_run(path: Path, what: What = "facts") -> Path:
    """The absolute folder of a run that was started once; PsyrayError says where it was looked for."""
    found = find_run(path, what)
    if not (found / "run.json").exists():
        raise PsyrayError(f"{no_run(path)}; start one with `psyray run configs/demo.yaml run.path={found}`")
    return found


def fetch_run(mirror: Mirror, what: What = "all") -> list[str]:
    """Fetch what a mirror has of its run's latest pass; the names of the finished stages. PsyrayError without a run.

    Less than all of a stage lies apart (RUN/seen), where it is taken for nothing that a run could go on from.
    """
    mirror.fetch_small()
    mirror.fetch_ledger()
    listed = mirror.run / "run.json"
    if not listed.exists():
        raise PsyrayError(f"no run at {mirror.uri}: it holds no run.json")
    fetched = 0
    for entry in read_json(listed, "stages")["stages"]:
        within = Path(entry["name"], entry["fingerprint"])
        folder = mirror.run / STAGES / within
        if (folder / "manifest.json").exists():
            continue
        if what != "all":
            fetched += mirror.look(folder, mirror.run / SEEN / within, rows=what == "rows")
        elif mirror.fetch(folder):
            mirror.say(f"{entry['name']}: fetched")
    if fetched:
        mirror.say(f"{mirror.uri}: {what} of {fetched} stages fetched to {mirror.run}")
    return [stage.name for stage in read_stages(mirror.run)]


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def stage_folders(run: Path, fingerprint: str) -> Iterator[Path]:
    """The folders of the finished stages of that fingerprint, or of all with that start of one where it ends in `*`."""
    found: set[Path] = set()
    for room in (run / STAGES, run / SEEN):
        for manifest in room.rglob(f"{fingerprint}/manifest.json"):
            if (within := manifest.parent.relative_to(room)) not in found:
                found.add(within)
                yield manifest.parent


def read_stages(path: Path) -> list[Artifact]:
    """The finished stages of a run's latest pass, in order; PsyrayError where there is no run."""
    path = existing_run(path)
    found = []
    for entry in read_json(path / "run.json", "stages")["stages"]:
        places = (path / room / entry["name"] / entry["fingerprint"] for room in (STAGES, SEEN))
        if folder := next((place for place in places if (place / "manifest.json").exists()), None):
            manifest = read_json(folder / "manifest.json", "stats")
            found.append(Artifact(entry["name"], folder, entry["fingerprint"], manifest))
    return found

"""A copy of a run folder on object storage, from which a machine that has nothing goes on.

`run.mirror` says where, or `run.path` where that is a URI (psyray/homes.py).

    MIRROR/run.json, config.yaml, ...                the small files of the run folder
    MIRROR/ledger.json                               which file is the latest copy of the SQLite ledger
    MIRROR/ledger-3fa9c1e2.db
    MIRROR/stages/pairs/3fa9c1e2/data-00000.parquet  the files of a finished stage
    MIRROR/stages/pairs/3fa9c1e2/contents.json       their sizes and SHA-256 sums
    MIRROR/stages/pairs/3fa9c1e2/manifest.json       written last: the stage is there as a whole

A stage is copied when it is done, and fetched when a run needs it and its folder lacks it. A copy that was cut off has
no manifest and counts for nothing; one that differs from its sums is thrown away.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import SplitResult, urlsplit

from tqdm import tqdm

from psyray.errors import PsyrayError
from psyray.records import file_sum

MANIFEST, CONTENTS, LEDGER = "manifest.json", "contents.json", "ledger.json"
CHUNK = 8 * 2**20
LEDGER_EVERY_S = 60.0  # what a machine that is lost may cost in labels of a SQLite ledger
TRIES = 8


class Mirror:
    """Copies of one run folder at a URI; `ledger` is the SQLite file that goes along, if there is one."""

    def __init__(self, uri: str, run: Path, ledger: Path | None = None, say: Callable[[str], None] = print) -> None:
        self.uri, self.run, self.ledger, self.say = uri.rstrip("/"), run, ledger, say
        self._fs, self._root = storage(self.uri)
        self._kept = ""  # the sum of the ledger's latest copy
        self._one = threading.Lock()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Fetch what a fresh machine lacks; copy the ledger every minute, and with the small files at the end."""
        self.fetch_small()
        self.fetch_ledger()
        done = threading.Event()

        def follow() -> None:
            while not done.wait(LEDGER_EVERY_S):
                try:
                    self.keep_ledger()
                except PsyrayError as error:  # the next minute tries again, and the end of a stage does not go past it
                    self.say(str(error))

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.keep_small()
            self.keep_ledger()

    def has(self, stage: Path) -> bool:
        """Whether the stage of that folder is there as a whole."""
        return self._there(f"{self._at(stage)}/{MANIFEST}")

    def keep(self, stage: Path) -> None:
        """Copy a finished stage, unless it is there, and what is small beside it."""
        if not self.has(stage):
            files = [path for path in sorted(stage.rglob("*")) if path.is_file() and not _passing(path)]
            sums: dict[str, list[Any]] = {}
            with self._bar(f"{stage.parent.name} to {self.uri}", sum(path.stat().st_size for path in files)) as bar:
                for path in files:
                    name = path.relative_to(stage).as_posix()
                    if name != MANIFEST:
                        sums[name] = self._put(path, f"{self._at(stage)}/{name}", bar)
            self._write(f"{self._at(stage)}/{CONTENTS}", json.dumps(sums, indent=1))
            self._write(f"{self._at(stage)}/{MANIFEST}", (stage / MANIFEST).read_text())
        self.keep_small()
        self.keep_ledger()

    def fetch(self, stage: Path) -> bool:
        """Fetch a finished stage into its folder, all or nothing; False where there is no whole copy of it."""
        if not self.has(stage):
            return False
        sums = json.loads(self._read(f"{self._at(stage)}/{CONTENTS}"))
        draft = self.run / ".fetched"
        shutil.rmtree(draft, ignore_errors=True)
        with self._bar(f"{stage.parent.name} from {self.uri}", sum(size for size, _ in sums.values())) as bar:
            for name, expected in sums.items():
                if self._get(f"{self._at(stage)}/{name}", draft / name, bar) != expected:
                    self.say(f"{stage.parent.name}: {name} at {self.uri} is damaged; the stage is made anew")
                    self._delete(f"{self._at(stage)}/{MANIFEST}")
                    shutil.rmtree(draft)
                    return False
        draft.mkdir(parents=True, exist_ok=True)  # a stage may have no file but its manifest
        (draft / MANIFEST).write_text(self._read(f"{self._at(stage)}/{MANIFEST}"))
        shutil.rmtree(stage, ignore_errors=True)
        stage.parent.mkdir(parents=True, exist_ok=True)
        draft.rename(stage)
        return True

    def keep_small(self) -> None:
        """Copy the files that lie in the run folder itself."""
        for path in sorted(self.run.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                self._put(path, path.name)

    def look(self, stage: Path, at: Path, *, rows: bool) -> bool:
        """Fetch what lacks at `at` of a finished stage's manifest and, with `rows`, of its rows; whether any did.

        PsyrayError where a file there is damaged.
        """
        manifest = at / MANIFEST
        if not manifest.exists() and not self.has(stage):
            return False
        text = manifest.read_text() if manifest.exists() else self._read(f"{self._at(stage)}/{MANIFEST}")
        wanted = [name for name in json.loads(text)["files"] if rows and not (at / name).exists()]
        if manifest.exists() and not wanted:
            return False
        sums = json.loads(self._read(f"{self._at(stage)}/{CONTENTS}")) if wanted else {}
        with self._bar(f"{stage.parent.name} from {self.uri}", sum(sums[name][0] for name in wanted)) as bar:
            for name in wanted:
                if self._get_whole(f"{self._at(stage)}/{name}", at / name, bar) != sums[name]:
                    (at / name).unlink()
                    raise PsyrayError(
                        f"{name} of {stage.parent.name} at {self.uri} is damaged; the run's command, given again, "
                        "makes the stage anew"
                    )
        at.mkdir(parents=True, exist_ok=True)
        manifest.write_text(text)
        return True

    def fetch_small(self) -> None:
        """Fetch those files where they lack, or where another machine has copied newer ones since.

        A folder that a process of this machine is at work in has the newest.
        """
        if _at_work(self.run):
            return
        self.run.mkdir(parents=True, exist_ok=True)
        for info in self._listed():
            here = self.run / info.base_name
            if info.base_name.startswith("ledger") or (here.exists() and here.stat().st_mtime_ns >= info.mtime_ns):
                continue
            self._get_whole(info.base_name, here)

    def keep_ledger(self) -> None:
        """Copy the SQLite ledger as it is at this moment, if it changed."""
        if self.ledger is None or not self.ledger.exists():
            return
        with self._one:
            copy = self.run / ".ledger"
            with closing(sqlite3.connect(self.ledger)) as source, closing(sqlite3.connect(copy)) as target:
                source.backup(target)
            total = file_sum(copy)
            if total != self._kept:
                name = f"ledger-{total[:12]}.db"
                size, found = self._put(copy, name)
                self._write(LEDGER, json.dumps({"file": name, "size": size, "sha256": found}))
                for old in (info.base_name for info in self._listed()):
                    if old.startswith("ledger-") and old != name:
                        self._delete(old)
                self._kept = total
            copy.unlink()

    def fetch_ledger(self) -> None:
        """Fetch the ledger where this machine has none; one that is there stays as it is."""
        if self.ledger is None or not self._there(LEDGER) or self.ledger.exists():
            return
        latest = json.loads(self._read(LEDGER))
        draft = self.ledger.with_name(f".{self.ledger.name}.{os.getpid()}")
        if self._get(latest["file"], draft) != [latest["size"], latest["sha256"]]:
            draft.unlink()
            raise PsyrayError(
                f"the label ledger at {self.uri}/{latest['file']} is damaged; to buy its labels again, delete {LEDGER} "
                "there"
            )
        draft.replace(self.ledger)
        self.say(f"the label ledger was fetched from {self.uri}")

    def _at(self, stage: Path) -> str:
        return stage.relative_to(self.run).as_posix()

    def _bar(self, title: str, size: int) -> Any:
        return tqdm(total=size, desc=title, unit="B", unit_scale=True, disable=size < CHUNK, dynamic_ncols=True)

    def _put(self, path: Path, name: str, bar: Any = None) -> list[Any]:
        """Copy a file there; [size, SHA-256] of what was copied."""
        with path.open("rb") as source, self._out(name) as target:
            return _copy(source, target, bar)

    def _get(self, name: str, path: Path, bar: Any = None) -> list[Any]:
        """Copy a file here; [size, SHA-256] of what was copied."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._plainly(), self._fs.open_input_stream(self._path(name)) as source, path.open("wb") as target:
            return _copy(source, target, bar)

    def _get_whole(self, name: str, path: Path, bar: Any = None) -> list[Any]:
        """The same for a file that others may read meanwhile: it is there as a whole or not at all."""
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        copied = self._get(name, draft, bar)
        draft.replace(path)
        return copied

    def _write(self, name: str, text: str) -> None:
        with self._out(name) as target:
            target.write(text.encode())

    @contextmanager
    def _out(self, name: str) -> Iterator[Any]:
        if self._fs.type_name == "local":  # object storage has no folders
            Path(self._path(name)).parent.mkdir(parents=True, exist_ok=True)
        with self._plainly(), self._fs.open_output_stream(self._path(name)) as target:
            yield target

    def _read(self, name: str) -> str:
        with self._plainly(), self._fs.open_input_stream(self._path(name)) as source:
            return str(source.read().decode())

    def _delete(self, name: str) -> None:
        with self._plainly():
            self._fs.delete_file(self._path(name))

    def _there(self, name: str) -> bool:
        with self._plainly():
            return bool(self._fs.get_file_info(self._path(name)).is_file)

    def _listed(self) -> list[Any]:
        """The files that lie in the mirror itself."""
        from pyarrow.fs import FileSelector

        with self._plainly():
            listed = self._fs.get_file_info(FileSelector(self._root, allow_not_found=True))
        return sorted((info for info in listed if info.is_file), key=lambda info: str(info.base_name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _plainly(self) -> AbstractContextManager[None]:
        return _plainly(self.uri)


@contextmanager
def _plainly(uri: str) -> Iterator[None]:
    """Tell what the storage says as a PsyrayError."""
    from pyarrow import ArrowInvalid

    try:
        yield
    except (OSError, ArrowInvalid) as error:
        raise PsyrayError(
            f"run.mirror {uri} cannot be used: {str(error).splitlines()[0][:300]}; check the address, the credentials "
            "in the environment and the network, and run the same command again: nothing is lost"
        ) from error


def address(uri: str, setting: str = "run.mirror") -> SplitResult:
    """The parts of a mirror's URI; PsyrayError for what is no URI, or one that holds a secret."""
    parts = urlsplit(uri)
    if not parts.scheme or parts.query or "@" in parts.netloc:
        raise PsyrayError(
            f"{setting} is a plain URI, for example s3://bucket/prefix: credentials come from the environment "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), another endpoint from AWS_ENDPOINT_URL"
        )
    return parts


def storage(uri: str) -> tuple[Any, str]:
    """The file system of a URI and the path in it.

    For s3:// the credentials come from the environment as AWS's own tools read it, with AWS_ENDPOINT_URL for storage
    that is not Amazon's.
    """
    from pyarrow import fs

    parts = address(uri)
    with _plainly(uri):
        if parts.scheme != "s3":
            system, root = fs.FileSystem.from_uri(uri)
            return system, root.rstrip("/")
        endpoint = urlsplit(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        system = fs.S3FileSystem(
            region=region or ("us-east-1" if endpoint.netloc else fs.resolve_s3_region(parts.netloc)),
            endpoint_override=endpoint.netloc or None,
            scheme=endpoint.scheme or "https",
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=TRIES),
        )
        return system, f"{parts.netloc}{parts.path}".rstrip("/")


def chunks(source: IO[bytes]) -> Iterator[bytes]:
    """What a file holds, piece by piece."""
    while piece := source.read(CHUNK):
        yield piece


def _copy(source: Any, target: Any, bar: Any) -> list[Any]:
    size, total = 0, hashlib.sha256()
    for piece in chunks(source):
        target.write(piece)
        total.update(piece)
        size += len(piece)
        if bar is not None:
            bar.update(len(piece))
    return [size, total.hexdigest()]


def _at_work(run: Path) -> bool:
    """Whether a process of this machine holds the run's lock."""
    if not (run / ".lock").exists():
        return False
    with (run / ".lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _passing(path: Path) -> bool:
    """Whether a file is of use only while its stage is at work."""
    return path.name.startswith(".") or path.name == "progress.json" or path.name.startswith("part-")

"""The journal of an engine's calls: what was sent and what came back, so that a kill loses neither money nor count.

    journal = Journal(folder)         # reads what earlier processes left; one process at a time works in a folder
    journal.answers(key)              # the answers that are there already, also from a process that was killed
    journal.sent(key, 1)              # written before the request goes out
    journal.got(Call(key, 1, ...))    # written before the answer is used
    read_totals(folder)               # calls, tokens and money of all processes so far

A folder holds one append-only file of JSON lines for each process that worked there. What is written survives the
death of the process. A last line that is torn is left out: a request goes out only after its line is whole, and an
answer whose line is torn counts as lost. Nobody knows what a lost answer cost, so it is counted and not priced.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from psyray.errors import PsyrayError

FILES = "calls-*.jsonl"
OFFSET_BITS = 40  # of a place: the number of the file, then the offset in it
RECENT = 100_000
_as_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True)
class Call:
    """What came back of one request; `text` is None where there was no answer, a count None where nobody told it."""

    key: str
    attempt: int
    status: str  # "200", "503", "timeout", ...
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost: float | None = None  # None: unknown
    latency_s: float = 0.0
    text: str | None = None
    finish: str = ""


@dataclass
class Totals:
    """Sums over calls; `lost` and `unpriced` calls may have cost something that `cost` does not hold."""

    calls: int = 0
    retries: int = 0
    lost: int = 0  # sent, and nothing is known of what came back
    unpriced: int = 0  # came back without a price: a time-out, a cut connection, an answer without usage
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    def add(self, line: dict[str, Any]) -> None:
        """Count one line of a journal."""
        if "sent" in line:
            self.calls += 1
            self.retries += line["attempt"] > 1
            self.lost += 1
            return
        self.lost -= 1
        self.unpriced += line["cost"] is None
        self.prompt_tokens += line["prompt_tokens"] or 0
        self.completion_tokens += line["completion_tokens"] or 0
        self.cost += line["cost"] or 0.0


def read_totals(folder: Path) -> Totals:
    """The sums of all journals in and under a folder; requests that are under way at this moment count as lost."""
    totals = Totals()
    for path in sorted(folder.rglob(FILES)):
        for _, line in _lines(path):
            totals.add(line)
    return totals


def stats(folder: Path) -> dict[str, Any]:
    """The sums as `calls` for a stage's manifest; empty where no engine kept a journal."""
    return {"calls": asdict(read_totals(folder))} if any(folder.rglob(FILES)) else {}


class Journal:
    """The journal of this process in `folder`, and what earlier processes left there.

    Waits up to `wait_s` seconds for a process that still works there; PsyrayError if it goes on longer.
    """

    def __init__(self, folder: Path, wait_s: float = 60.0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(folder / ".lock", wait_s)
        self.totals, self._index = Totals(), _Index()
        self._files = [path.open("rb") for path in sorted(folder.glob(FILES))]
        for number, file in enumerate(self._files):
            for offset, line in _lines(Path(file.name)):
                self._note(line, number, offset)
        self._number = len(self._files)
        last = int(Path(self._files[-1].name).stem[6:]) if self._files else -1
        path = folder / f"calls-{last + 1:06d}.jsonl"
        self._out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        self._files.append(path.open("rb"))
        self._size = 0

    def sent(self, key: str, attempt: int) -> None:
        """Note that a request goes out now."""
        self._write({"sent": key, "attempt": attempt, "at": round(time.time(), 3)})

    def got(self, call: Call) -> None:
        """Note what came back."""
        line = dict(vars(call))  # asdict copies deeply, which costs as much as the rest
        self._write({"got": line.pop("key"), **line})

    def answers(self, key: str) -> list[Call]:
        """The answers to a key in the order in which they came."""
        found = []
        for place in self._index.find(hash(key)):
            file = self._files[place >> OFFSET_BITS]
            file.seek(place & ((1 << OFFSET_BITS) - 1))
            line = json.loads(file.readline())
            if (whose := line.pop("got")) == key:
                found.append(Call(key=whose, **line))
        return found

    def close(self) -> None:
        """Let go of the folder; once more does nothing."""
        if not self._lock.closed:
            os.close(self._out)
        for file in (*self._files, self._lock):
            file.close()

    def _write(self, line: dict[str, Any]) -> None:
        raw = _as_json(line).encode("utf-8", "replace") + b"\n"
        if os.write(self._out, raw) < len(raw):
            os.ftruncate(self._out, self._size)  # no torn line may stand before a whole one
            raise PsyrayError(f"no room for the journal of calls {self._files[-1].name}; make room and run again")
        self._note(line, self._number, self._size)
        self._size += len(raw)

    def _note(self, line: dict[str, Any], number: int, offset: int) -> None:
        self.totals.add(line)
        if line.get("text") is not None:
            self._index.add(hash(line["got"]), number << OFFSET_BITS | offset)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Offset and content of each whole line."""
    with path.open("rb") as file:
        offset = 0
        for raw in file:
            if not raw.endswith(b"\n"):
                return
            try:
                line = json.loads(raw)
            except ValueError:
                raise PsyrayError(f"{path}, byte {offset}: this is no line of a journal of calls") from None
            yield offset, line
            offset += len(raw)


class _Index:
    """Where the answers to a key are: 16 bytes each, since a stage has millions and memory is for the work."""

    def __init__(self) -> None:
        self._hashes: NDArray[np.int64] = np.empty(0, np.int64)
        self._places: NDArray[np.int64] = np.empty(0, np.int64)
        self._recent: dict[int, list[int]] = {}

    def add(self, hashed: int, place: int) -> None:
        self._recent.setdefault(hashed, []).append(place)
        if len(self._recent) >= RECENT:
            pairs = [(h, p) for h, places in self._recent.items() for p in places]
            added = np.array(pairs, np.int64)
            hashes = np.concatenate([self._hashes, added[:, 0]])
            order = np.argsort(hashes, kind="stable")  # the answers to a key stay in the order in which they came
            self._hashes, self._places = hashes[order], np.concatenate([self._places, added[:, 1]])[order]
            self._recent = {}

    def find(self, hashed: int) -> list[int]:
        low, high = (int(np.searchsorted(self._hashes, hashed, side)) for side in ("left", "right"))
        return [int(place) for place in self._places[low:high]] + self._recent.get(hashed, [])


def _locked(path: Path, wait_s: float) -> BinaryIO:
    """The lock file, held; a process that was orphaned by a kill ends within seconds."""
    lock, deadline = path.open("a+b"), time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                lock.seek(0)
                holder = lock.read().decode().strip()
                raise PsyrayError(f"{path.parent} is in use by process {holder}; wait for it or end it") from None
            time.sleep(0.2)
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {socket.gethostname()}".encode())
    lock.flush()
    return lock

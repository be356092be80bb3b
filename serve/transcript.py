"""What clients said and were answered, written down where the operator asked for it, and nowhere else.

    serve run serve.app:build run=RUN log_text=FOLDER

Each replica of the port appends to a file of its own in FOLDER, readable by its account alone, one JSON object for each
request that was answered: `time`, `key` (its name), `id` (the completion's), `route`, `model`, `messages` and
`answers`, or `items` and `scores`, and `flagged` where the words speak of a crisis, with who says so. A stream is
written down at its end; `whole` is false where it broke off. No logger knows of these lines, so none comes into Ray's
logs. A line that cannot be written costs no answer.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any
from uuid import uuid4

from psyray.errors import PsyrayError

FILE_BYTES, FILES_BEFORE = 100_000_000, 9  # of one replica; the oldest file goes when a tenth is full
_PROBE = 65_536  # bytes that must fit on the disk at the start


class _Private(RotatingFileHandler):
    """A rotating file of mode 0600; what goes wrong with it is raised, where logging would print the line."""

    def _open(self) -> TextIOWrapper:
        return TextIOWrapper(open(self.baseFilename, "ab", opener=_privately), encoding=self.encoding)

    def handleError(self, record: logging.LogRecord) -> None:
        raise  # called from where the error is being handled


def _privately(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class Transcript:
    """The file of one replica."""

    def __init__(self, folder: Path, name: str, file_bytes: int = FILE_BYTES) -> None:
        ready(folder)
        self.file = folder / f"{name}.jsonl"
        self._handler = _Private(self.file, maxBytes=file_bytes, backupCount=FILES_BEFORE, encoding="ascii")
        self._torn = False  # whether the last line may be there in part

    def keep(self, row: Mapping[str, Any]) -> None:
        """Append the row; where that fails the log says so, without a word of it."""
        line = "\n" * self._torn + json.dumps({"time": time.time(), **row})
        try:
            self._handler.handle(logging.makeLogRecord({"msg": line}))
            self._torn = False
        except OSError as error:
            self._torn = True
            logging.getLogger("ray.serve").error("an answer is not in %s: %s", self.file, error.strerror)
            if stream := self._handler.stream:  # what it still holds would be tried again with each later line
                self._handler.stream = None  # it is opened anew
                with suppress(OSError):
                    stream.close()

    async def keep_stream(self, events: AsyncIterable[Any], row: Mapping[str, Any]) -> AsyncIterator[str]:
        """The server-sent events of a chat as they come, written down when they end or break off."""
        heard = Heard()
        try:
            async for piece in events:
                heard.hear(piece)
                yield piece
        finally:
            self.keep({**row, **heard.said()})
            if isinstance(events, AsyncGenerator):  # its reader went away: the engine's work ends now
                await events.aclose()


@dataclass
class Heard:
    """A stream's answers as far as they have come."""

    id: str = ""
    model: str = ""
    texts: dict[int, list[str]] = field(default_factory=dict)  # by the choice's index
    whole: bool = False

    def hear(self, piece: str) -> None:
        """Take in one piece, of whole events."""
        for line in piece.split("\n"):
            data = line.removeprefix("data: ").strip()
            if data == "[DONE]":
                self.whole = True
            elif line.startswith("data: {"):
                chunk = json.loads(data)
                self.id, self.model = chunk.get("id", self.id), chunk.get("model", self.model)
                for choice in chunk.get("choices", ()):
                    self.texts.setdefault(choice["index"], []).append(choice["delta"].get("content") or "")

    def said(self) -> dict[str, Any]:
        """The fields of a line."""
        answers = ["".join(self.texts[index]) for index in sorted(self.texts)]
        return {"id": self.id, "model": self.model, "answers": answers, "whole": self.whole}


def said(completion: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a line for a completion that came whole."""
    answers = [choice["message"]["content"] for choice in completion["choices"]]
    more = {"best_of": completion["best_of"]} if "best_of" in completion else {}
    return {"id": completion.get("id", ""), "model": completion["model"], "answers": answers, "whole": True, **more}


def ready(folder: Path) -> None:
    """See that files can be written into the folder, which is made if need be; PsyrayError says why not."""
    probe = folder / f".probe-{uuid4().hex}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(probe, "wb", opener=_privately) as file:
            file.write(b"\0" * _PROBE)
            os.fsync(file.fileno())
    except OSError as error:
        raise PsyrayError(f"log_text={folder} cannot be written: {error.strerror}; name another folder") from error
    finally:
        with suppress(OSError):
            probe.unlink()

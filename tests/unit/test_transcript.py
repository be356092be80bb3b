"""Where client text is kept: the file's mode, its turns, and a folder that will not do."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from psyray.errors import PsyrayError
from serve.champion import Args
from serve.transcript import FILES_BEFORE, Transcript, ready


def test_nothing_is_kept_unless_a_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Args.read({}).log_text is None and Args.read({}).settled().log_text is None
    assert Args.read({"log_text": "said"}).settled().log_text == tmp_path / "said"


def test_files_are_their_accounts_alone_and_make_room_for_later_ones(tmp_path: Path) -> None:
    before = os.umask(0)
    transcript = Transcript(tmp_path / "said", "replica", file_bytes=1_000)
    for number in range(400):
        transcript.keep({"key": "ann", "number": number, "words": "\u00fc\u2028"})
    os.umask(before)
    files = list((tmp_path / "said").iterdir())
    assert len(files) == FILES_BEFORE + 1 and {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE((tmp_path / "said").stat().st_mode) == 0o700
    assert all(file.stat().st_size <= 1_000 for file in files)
    last = [json.loads(line) for line in transcript.file.read_text().splitlines()][-1]
    assert (last["number"], last["words"]) == (399, "\u00fc\u2028") and last["time"] > 0


def test_a_folder_that_cannot_be_written_is_told_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PsyrayError, match=r"log_text=.*file/said cannot be written: Not a directory"):
        ready(tmp_path / "file/said")

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PsyrayError, match="No space left on device"):
        Transcript(tmp_path, "replica")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_reader_who_goes_away_ends_the_stream_and_what_was_said_is_kept(tmp_path: Path) -> None:
    ended, transcript = [], Transcript(tmp_path, "replica")

    async def events() -> AsyncGenerator[str]:
        try:
            for word in ("You ", "are ", "here."):
                yield f"data: {json.dumps({'id': '1', 'choices': [{'index': 0, 'delta': {'content': word}}]})}\n\n"
        finally:
            ended.append(True)

    async def read_one() -> list[bool]:
        stream = transcript.keep_stream(events(), {"key": "ann"})
        assert isinstance(stream, AsyncGenerator)
        await anext(stream)
        await stream.aclose()
        return list(ended)

    assert asyncio.run(read_one()) == [True]
    [row] = [json.loads(line) for line in transcript.file.read_text().splitlines()]
    assert (row["key"], row["answers"], row["whole"]) == ("ann", ["You "], False)

"""A run of one stage with a copy in a folder that stands for object storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from psyray.mirror import Mirror
from psyray.run import Folder, Run

SCHEMA = pa.schema([("key", pa.string())])


class Counted:
    """A stage's work that counts how often it is done: rows and a model of two files."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, folder: Folder) -> dict[str, int]:
        self.times += 1
        folder.keep(SCHEMA, "key", [{"key": key} for key in "cab"])
        (folder.path / "model").mkdir()
        (folder.path / "model" / "weights.bin").write_bytes(bytes(range(256)) * 64)
        (folder.path / "model" / "config.json").write_text("{}")
        folder.progress(3, 3)
        return {"rows": 3}


def passes(path: Path, store: Path, work: Counted, said: list[str] | None = None, **more: Any) -> Run:
    """One pass of a run of one stage in a folder with a copy in `store`."""
    say = (said if said is not None else []).append
    mirror = Mirror(f"file://{store}", path, say=say, **more)
    run = Run(path, say, mirror=mirror)
    with mirror.open(), run.open({"a": 1}):
        run.stage("letters", {}, [], work)
    return run

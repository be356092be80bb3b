"""A finished stage of made-up rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from psyray.records import Row
from psyray.run import Artifact, Folder, Run


def made_stage(
    run: Run, name: str, schema: pa.Schema, key: str, rows: Iterable[Row], *,
    settings: Mapping[str, Any] | None = None, inputs: Sequence[Artifact] = (), stats: Mapping[str, Any] | None = None,
) -> Artifact:  # fmt: skip
    def make(folder: Folder) -> Mapping[str, Any]:
        folder.keep(schema, key, rows)
        return stats or {}

    return run.stage(name, settings or {}, inputs, make)

"""Which stage of a run a folder of a model or an adapter came from, also where it lies beside no run."""

from __future__ import annotations

import json
from pathlib import Path

from psyray.files import write_atomic

ORIGIN = "origin.json"
KEYS = ("run", "stage", "fingerprint")


def origin(folder: Path) -> dict[str, str]:
    """{run, stage, fingerprint} of the stage whose files these are; empty where no run made them."""
    folder = folder.absolute()
    if (folder / ORIGIN).is_file():
        return _read(folder / ORIGIN)
    run = next((parent.parent for parent in folder.parents if parent.name == "stages"), None)
    manifest = folder.parent / "manifest.json"
    return {**_read(manifest), "run": str(run)} if run and manifest.is_file() else {}


def note_origin(made_of: Path, folder: Path) -> None:
    """Write where `made_of` came from beside what was made of it, for `origin`."""
    if known := origin(made_of):
        write_atomic(folder / ORIGIN, json.dumps(known, indent=1))


def called(model: str, folder: Path) -> str:
    """The id of the stage that made a model, else its hub id or its folder's name, in letters that headers may hold."""
    local = Path(model).expanduser()
    name = local.name if local.is_absolute() or local.is_dir() else model
    return origin(folder).get("fingerprint") or name.encode("ascii", "replace").decode()


def _read(file: Path) -> dict[str, str]:
    known = json.loads(file.read_text())
    return {key: str(known.get(key, "")) for key in KEYS}

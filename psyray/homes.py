"""Where a run lies: a folder of this machine, or a URI on object storage and the folder here that it is worked on in.

    runs/demo           that folder, under $PSYRAY_HOME or here
    s3://bucket/demo    the run's mirror; the folder is runs/s3-bucket-demo-3fa9c1e2/demo, under $PSYRAY_HOME or here

A run at a URI has a parent folder of its own, since a SQLite ledger and MLflow's lie beside the run: what a machine
has of them is then never another run's.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from psyray.mirror import address

_URI = re.compile(r"(?:([A-Za-z][\w+.-]+):/+|(s3|gs):)(.*)")
_NOT_IN_NAMES = re.compile(r"[^\w.-]+")


def uri_of(path: str | Path) -> str | None:
    """The URI that a run's path is, None for a folder; `Path` writes s3://bucket as s3:/bucket.

    PsyrayError for a URI that is not plain, without repeating it.
    """
    found = _URI.fullmatch(str(path))
    if not found:
        return None
    scheme, rest = (found[1] or found[2]).lower(), found[3].strip("/")
    uri = f"{scheme}://{'/' if scheme == 'file' else ''}{rest}"
    address(uri, "run.path")
    return uri


def folder_of(uri: str) -> Path:
    """The folder that a run at a URI is worked on in: readable, and no other URI's."""
    words, last = (_NOT_IN_NAMES.sub("-", text).strip("-.") for text in (uri, uri.rpartition("/")[2]))
    return Path("runs") / f"{words[:80]}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}" / (last[:80] or "run")


def runs_home() -> Path:
    """The folder that relative run paths start from.

    $PSYRAY_HOME where it is set; inside a Ray job ~/.psyray, since a job's working directory is a copy that is
    thrown away; else the current folder.
    """
    if home := os.environ.get("PSYRAY_HOME"):
        return Path(home).expanduser().absolute()
    if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        return Path.home() / ".psyray"
    return Path.cwd()


def run_path(path: Path) -> Path:
    """The absolute run folder."""
    folder = _folder(path)
    return folder if folder.is_absolute() else runs_home() / folder


def whereabouts(path: Path) -> list[Path]:
    """Where a run that is there already may be: where a run of that path would be written from here, the current
    folder, and $PSYRAY_HOME, or without it ~/.psyray, where jobs write.
    """
    folder = _folder(path)
    jobs = Path(os.environ.get("PSYRAY_HOME") or "~/.psyray").expanduser().absolute()
    return list(dict.fromkeys((run_path(path), Path.cwd() / folder, jobs / folder)))


def no_run(path: Path) -> str:
    """Where a run was looked for and is not, in words."""
    return f"no run at {' or '.join(map(str, whereabouts(path)))}"


def _folder(path: Path) -> Path:
    return folder_of(uri) if (uri := uri_of(path)) else path

"""Work in a process and a folder of its own, and what is said of it at the end. No benchmark by itself."""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
PSYRAY = [sys.executable, "-m", "psyray.cli", "run"]


def with_parent() -> None:
    """As `preexec_fn`: the process gets SIGTERM once this one has ended, however it ended. Linux only."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def last_line(script: str, *words: object) -> str:
    """The last line that a Python script prints; SystemExit with its last words where it fails."""
    command = [sys.executable, script, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=with_parent)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}:\n{done.stderr[-3000:]}")
    return done.stdout.splitlines()[-1]


def psyray_run(tree: Mapping[str, Any], place: Path, name: str, *words: str) -> None:
    """`psyray run` by the settings to its end, its output in PLACE/NAME.log; SystemExit with its last words."""
    config, log = place / f"{name}.yaml", place / f"{name}.log"
    config.write_text(yaml.safe_dump(dict(tree)))
    with log.open("ab") as out:
        done = subprocess.run(
            [*PSYRAY, str(config), *words], cwd=ROOT, stdout=out, stderr=out, check=False, preexec_fn=with_parent
        )
    if done.returncode:
        sys.exit(f"{name} ended with {done.returncode}:\n{log.read_text()[-3000:]}")


@contextmanager
def folder(path: Path | None) -> Iterator[Path]:
    """The folder, made where it lacks and kept; none: a temporary one."""
    with tempfile.TemporaryDirectory() as temporary:
        place = (path or Path(temporary)).absolute()
        place.mkdir(parents=True, exist_ok=True)
        yield place


def verdict(figures: Mapping[str, Any], wrong: Sequence[str], well: str) -> int:
    """Print the figures, what is `wrong` or else that all is `well`, and both as JSON; the exit status."""
    for what, value in figures.items():
        print(f"{what:36} {value:>14,}" if isinstance(value, int | float) else f"{what:36} {value}")
    print("\n".join(f"WRONG: {one}" for one in wrong) or well)
    print(json.dumps({**figures, "wrong": wrong}))
    return 1 if wrong else 0

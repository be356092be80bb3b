"""Where a run's labels are: its ledger, and the names that it goes by there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from psyray.active.database import lacking
from psyray.active.ledger import ledger_url
from psyray.config import Config, checked
from psyray.errors import PsyrayError
from psyray.homes import no_run, run_path, uri_of
from psyray.run import find_run
from psyray.status import read_config


@dataclass(frozen=True)
class Place:
    """A run's folder and settings, its ledger's database, and what the ledger may call it."""

    folder: Path
    config: Config
    ledger: str
    runs: frozenset[str]


def place_of(run: Path, mend: str = "start one with `psyray run CONFIG run.path={folder}`") -> Place:
    """The place of a run that was started once; PsyrayError with the way to mend it where there is none."""
    folder = find_run(run)
    if not (tree := read_config(folder)):
        raise PsyrayError(f"{no_run(run)}; {mend.format(folder=folder)}")
    config = checked(tree, f"{folder / 'config.yaml'}: ")
    # By the name of its latest pass, or by the path that it was started with.
    runs = frozenset(map(str, filter(None, (folder, folder.resolve(), run_path(config.run.path), config.run.mirror))))
    ledger = ledger_url(config.ledger.url, folder)
    if (uri := uri_of(run)) and lacking(ledger):
        raise PsyrayError(
            f"the label ledger of {uri} is a SQLite file on the machine that works on the run: ask there, or, where "
            f"none works on it any more, `psyray fetch {uri}` gets the latest copy; several machines share a "
            "PostgreSQL (ledger.url)"
        )
    return Place(folder, config, ledger, runs)


def ledger_name(config: Config, folder: Path) -> str:
    """What the ledger calls a run: its mirror, since a mirrored run may go on in any folder, else its folder."""
    return config.run.mirror or str(folder)

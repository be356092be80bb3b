"""MLflow's client: at which server or database, opened so that it answers or fails soon, and its registry read.

Every trouble that MLflow or a database makes is one PsyrayError, without the password.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from psyray.active.database import lacking
from psyray.addresses import redact
from psyray.errors import PsyrayError
from psyray.files import read_settings
from psyray.sections.place import TrackSection

# MLflow reads these when it is imported, which is why that happens later; a user's own setting stays.
for _name, _value in (
    ("MLFLOW_DISABLE_TELEMETRY", "true"),
    ("DO_NOT_TRACK", "true"),
    ("MLFLOW_LOGGING_LEVEL", "WARNING"),
    ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),  # it would print the password in the URL
):
    os.environ.setdefault(_name, _value)

PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def tracking_uri(section: TrackSection, run_folder: Path) -> str:
    """The configured tracking server, else MLFLOW_TRACKING_URI, else SQLite beside the run folder."""
    beside = f"sqlite:///{run_folder.absolute().parent / 'mlflow.db'}"
    return section.uri or os.environ.get("MLFLOW_TRACKING_URI") or beside


def registry_of(run_folder: Path) -> str:
    """Where a run registers its models, by the settings that its folder keeps."""
    kept = run_folder / "config.yaml"
    section = (read_settings(kept) if kept.exists() else {}).get("track") or {}
    return tracking_uri(TrackSection(uri=section.get("uri")), run_folder)


def registry_beside(runs: Path) -> str:
    """MLFLOW_TRACKING_URI, else SQLite in a folder of run folders: where a model given by its name is looked for."""
    return tracking_uri(TrackSection(), runs / "any")


@contextmanager
def registry(uri: str) -> Iterator[Any]:
    """MLflow's client, for short work on the registry; PsyrayError where it does not answer."""
    with plainly(uri), answers_soon(uri), alone(uri):
        yield client_at(uri)


def registered(uri: str, model: str) -> dict[str, str]:
    """The tags of a registered model, by `NAME`, `NAME@ALIAS` or `NAME/VERSION`; a bare name means its champion.

    PsyrayError where MLflow has no such model.
    """
    from mlflow.exceptions import MlflowException

    name, at, alias = model.partition("@")
    name, slash, version = name.partition("/")
    unknown = PsyrayError(
        f"MLflow at {redact(uri)} has no model {model}, and no folder has that name; "
        "--tracking-uri names another MLflow"
    )
    if uri.startswith("sqlite:") and lacking(uri):
        raise unknown  # asked, MLflow would make the database
    with registry(uri) as client:
        try:
            if slash:
                found = client.get_model_version(name, version)
            else:
                found = client.get_model_version_by_alias(name, alias if at else "champion")
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise unknown from None
    return dict(found.tags)


def is_server(uri: str) -> bool:
    """Whether it keeps artifacts itself, as no database does."""
    return urlsplit(uri).scheme in ("http", "https") or uri.startswith("databricks")


def client_at(uri: str) -> Any:
    """MLflow's own client."""
    import mlflow
    from mlflow.telemetry import set_telemetry_client

    set_telemetry_client()  # who imported MLflow before this module did may have switched it on
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


def _troubles() -> tuple[type[Exception], ...]:
    """What a tracking server or database that cannot be used raises."""
    from alembic.util.exc import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, CommandError, OSError, ImportError


@contextmanager
def plainly(uri: str) -> Iterator[None]:
    """Turn MLflow's and the database's errors into one PsyrayError without the password."""
    try:
        yield
    except _troubles() as error:
        text = redact(str(error)).replace(urlsplit(uri).password or "\0", "***")
        raise PsyrayError(
            f"MLflow at {redact(uri)} cannot be used; check that it runs, track.uri and MLFLOW_TRACKING_URI "
            "(without both, SQLite beside the run folder is used), then run the same command again. "
            f"{type(error).__name__}: {text:.300}"
        ) from None


@contextmanager
def answers_soon(uri: str) -> Iterator[None]:
    """Let a tracking server that does not answer fail within seconds; MLflow alone tries for minutes."""
    quick = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
    before = {name: os.environ.get(name) for name in quick}
    os.environ.update(quick)
    try:
        _knock(uri)
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@contextmanager
def alone(uri: str) -> Iterator[None]:
    """One process at a time opens an SQLite file: two that make its tables together break it."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    database = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(f".{database.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _knock(uri: str) -> None:
    """Connect once to a database's port, since MLflow repeats a failed connection for minutes."""
    parts = urlsplit(uri)
    kind = parts.scheme.partition("+")[0]
    if kind in PORTS and parts.hostname:
        socket.create_connection((parts.hostname, parts.port or PORTS[kind]), timeout=5).close()

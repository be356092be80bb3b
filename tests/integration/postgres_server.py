"""A PostgreSQL server for a test: Debian's programs, a free port of loopback, data that is thrown away."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DATABASE_USER = "psyray"


def missing() -> str:
    """What keeps the test from running; empty where nothing does."""
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "no PostgreSQL driver is installed (the extra `postgres`: psycopg)"
    return "" if programs() else "no PostgreSQL is installed (Debian: apt-get install postgresql)"


def promised() -> bool:
    """Whether this is a CI machine whose script installs PostgreSQL: then a missing one is a failure."""
    script = ROOT / ".ci" / "run"
    return os.environ.get("CI") == "true" and script.is_file() and "postgresql" in script.read_text()


def programs() -> Path | None:
    """The folder of initdb and pg_ctl, the newest version's where Debian keeps several."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name), reverse=True)
    on_path = [Path(found).resolve().parent for name in ("initdb", "pg_ctl") if (found := shutil.which(name))]
    return next((p for p in (*debian, *on_path) if (p / "initdb").exists() and (p / "pg_ctl").exists()), None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of an empty database. PostgreSQL refuses to run as root: then it runs as `postgres`, else `nobody`."""
    found = programs()
    assert found is not None
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="psyray-postgres-") as folder:
        options: dict[str, Any] = {"cwd": folder, "check": True, "stdout": subprocess.DEVNULL, "timeout": 120}
        if os.geteuid() == 0:  # pytest's own folders are closed to others
            names = {entry.pw_name for entry in pwd.getpwall()}
            user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
            os.chown(folder, user.pw_uid, user.pw_gid)
            options |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        data, control = f"{folder}/data", [str(found / "pg_ctl"), "-D", f"{folder}/data", "-w"]
        # No password: only this test's loopback port reaches it. fsync off: a power cut is not what is tested.
        subprocess.run([str(found / "initdb"), "-D", data, "-A", "trust", "-U", DATABASE_USER, "-N"], **options)
        settings = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        subprocess.run([*control, "-l", f"{folder}/log", "-o", settings, "start"], **options)
        try:
            yield f"postgresql+psycopg://{DATABASE_USER}@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], **options)

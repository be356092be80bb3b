"""A run folder's copy on an S3-compatible server: killed in the middle of a copy, gone on with on another machine."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from endpoint import served

from psyray.active.ledger import Ledger
from psyray.cli import app as main
from psyray.config import Config, load_config
from psyray.errors import PsyrayError
from psyray.homes import run_path
from psyray.mirror import Mirror
from psyray.pipeline import run_pipeline
from psyray.run import Run, read_stages

ROOT = Path(__file__).parents[2]
FILES, SIZE = 3, 6 * 2**20  # a part of an S3 upload has 5 MiB at least
# A run of one stage; with a number it is killed at that piece of its copy, with -1 once only the manifest lacks.
SCRIPT = f"""
import os, signal, sys
from pathlib import Path
from psyray import mirror
from psyray.run import Run

home, uri, at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
mirror.CHUNK = 2**20
seen = 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def counted(source):
    global seen
    while piece := source.read(mirror.CHUNK):
        seen += 1
        if seen == at:
            die()
        yield piece

mirror.chunks = counted
write = mirror.Mirror._write

def last(self, name, text):
    if at == -1 and name.endswith("/manifest.json"):
        die()
    write(self, name, text)

mirror.Mirror._write = last

def make(folder):
    for number in range({FILES}):
        (folder.path / f"weights-{{number}}.bin").write_bytes(bytes([number]) * {SIZE})
    print("made", flush=True)
    return {{}}

copy = mirror.Mirror(uri, home / "run")
run = Run(home / "run", print, mirror=copy)
with copy.open(), run.open({{}}):
    run.stage("weights", {{}}, [], make)
"""


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URI of a bucket on a server of this test's own."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ENDPOINT_URL", endpoint)
    patch.setenv("AWS_ACCESS_KEY_ID", "for-this-test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "only")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    try:
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="runs")
        yield "s3://runs"
    finally:
        patch.undo()
        server.stop()


def attempt(home: Path, uri: str, at: int = 0) -> tuple[int, str]:
    """One pass on a machine whose disk is `home`: (exit status, what it said)."""
    command = [sys.executable, "-c", SCRIPT, str(home), uri, str(at)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("at", [1, 8, FILES * SIZE // 2**20, -1])
def test_a_copy_that_was_cut_off_is_never_taken_for_a_stage(bucket: str, tmp_path: Path, at: int) -> None:
    uri = f"{bucket}/cut-{at}"
    killed, said = attempt(tmp_path / "one", uri, at)
    assert killed == -signal.SIGKILL and "made\n" in said
    assert not Run(tmp_path / "look", mirror=Mirror(uri, tmp_path / "look")).has("weights", {}, [])

    # A fresh machine makes it again; the first one, where it is done, only ends the copy.
    status, said = attempt(tmp_path / ("two" if at == 8 else "one"), uri)
    assert status == 0 and ("made\n" in said) == (at == 8), said
    status, said = attempt(tmp_path / "three", uri)
    assert status == 0 and "made\n" not in said and f"weights: fetched from {uri}" in said, said
    (stage,) = read_stages(tmp_path / "three" / "run")
    for number in range(FILES):
        assert (stage.path / f"weights-{number}.bin").read_bytes() == bytes([number]) * SIZE


def test_a_bucket_that_is_not_there_is_one_clear_error(bucket: str, tmp_path: Path) -> None:
    mirror = Mirror("s3://no-such-bucket/run", tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(PsyrayError, match=r"run\.mirror s3://no-such-bucket/run cannot be used") as told:
        mirror.keep_small()
    assert "for-this-test" not in str(told.value) and "only" not in str(told.value)


@pytest.mark.usefixtures("ray_cluster")
def test_a_fresh_machine_goes_on_with_a_run_and_asks_nobody_twice(
    bucket: str, tmp_path: Path, tiny_model: Path
) -> None:
    uri = f"{bucket}/whole"

    def config(home: Path, url: str) -> Config:
        responders = [{"name": name, "model": "any", "endpoint": {"url": url}} for name in ("a", "b")]
        return load_config(
            ROOT / "configs/demo.yaml",
            [
                f"run.path={home}/run", f"run.mirror={uri}", f"responses.responders={json.dumps(responders)}",
                "responses.k=2", "speeches.limit=12", f"reward.model={tiny_model}", f"policy.model={tiny_model}",
                "reward.train.freeze_layers=0", "dpo.train.freeze_layers=0",
            ],
        )  # fmt: skip

    said: list[str] = []
    with served(lambda model, prompt: "I hear you.") as endpoint:
        run_pipeline(config(tmp_path / "one", endpoint.url), until="judgements", say=said.append)
        asked = endpoint.calls["any"].total()
        bought = Ledger(f"sqlite:///{tmp_path}/one/labels.db").summary(uri)
        shutil.rmtree(tmp_path / "one")  # that machine is gone
        run_pipeline(config(tmp_path / "two", endpoint.url), until="judgements", say=said.append)
        assert endpoint.calls["any"].total() == asked == 24
    assert [line for line in said if line.startswith("judgements: fetched")] == [f"judgements: fetched from {uri}"]
    names = [stage.name for stage in read_stages(tmp_path / "two" / "run")]
    assert names == ["speeches", "responses", "judgements"]
    assert sum(row["bought"] for row in bought) > 0
    assert Ledger(f"sqlite:///{tmp_path}/two/labels.db").summary(uri) == bought


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_at_a_uri_is_told_of_and_gone_on_with_where_nothing_is(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"{bucket}/at-a-uri"
    monkeypatch.setenv("PSYRAY_HOME", str(tmp_path / "one"))
    words = [str(ROOT / "configs/demo.yaml"), f"run.path={uri}", "speeches.limit=12", "--until", "speeches"]
    main(["run", *words], standalone_mode=False)
    assert "speeches: done" in capsys.readouterr().out and run_path(Path(uri)).is_dir()
    shutil.rmtree(tmp_path / "one")  # that machine is gone
    monkeypatch.setenv("PSYRAY_HOME", str(tmp_path / "two"))
    folder = run_path(Path(uri))

    main(["status", uri], standalone_mode=False)
    told = capsys.readouterr()
    assert f"{uri}: facts of 1 stages fetched to {folder}" in told.err
    assert "speeches" in told.out and "done" in told.out
    assert [stage.files[0].exists() for stage in read_stages(folder)] == [False]

    main(["report", uri], standalone_mode=False)
    assert f"report: {folder}/report.html" in capsys.readouterr().out
    assert [stage.files[0].exists() for stage in read_stages(folder)] == [True]

    main(["run", *words], standalone_mode=False)
    assert f"speeches: fetched from {uri}" in capsys.readouterr().out

"""Champions in MLflow's registry: which one is served, and making another one champion."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from psyray.cli import app
from psyray.errors import PsyrayError
from psyray.mlflow_client import registered, registry
from psyray.registry import promote
from serve.champion import Args, find_champion


def export(home: Path, run: str, fingerprint: str, number: int) -> Path:
    """A run with an export, its models empty folders that look right."""
    folder = home / run / "stages/export" / fingerprint
    folder.mkdir(parents=True)
    for name in ("policy", "reward"):
        (home / run / name).mkdir()
        (home / run / name / "config.json").write_text("{}")
    champion = {
        "policy": {"name": f"psyray-round-{number}", "path": str(home / run / "policy"), "round": number},
        "reward": {"name": "psyray-reward", "path": str(home / run / "reward")},
        "run": str(home / run),
        "id": fingerprint,
    }
    (folder / "champion.json").write_text(json.dumps(champion))
    manifest = {"stage": "export", "fingerprint": fingerprint, "stats": champion, "config": {}, "inputs": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (home / run / "run.json").write_text(json.dumps({"stages": [{"name": "export", "fingerprint": fingerprint}]}))
    return home / run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs with exports, the first two registered, the first as champion."""
    home = tmp_path_factory.mktemp("runs")
    names = (("a", "a" * 16), ("b", "b" * 16), ("c", "c" * 16))
    runs = [export(home, name, fingerprint, n) for n, (name, fingerprint) in enumerate(names, 1)]
    with registry(uri(home)) as client:
        for name in ("psyray-policy", "psyray-reward"):
            client.create_registered_model(name)
            for run, fingerprint in zip(runs[:2], ("a" * 16, "b" * 16), strict=True):
                tags = {"run": str(run), "psyray.fingerprint": fingerprint}
                client.create_model_version(name, (run / name[7:]).as_uri(), tags=tags)
            client.set_registered_model_alias(name, "champion", "1")
    return home


def uri(home: Path) -> str:
    return f"sqlite:///{home / 'mlflow.db'}"


def test_the_champion_is_the_one_that_the_alias_names(home: Path) -> None:
    asked = Args.read({"runs": str(home)})
    first = find_champion(asked, uri(home))
    assert (first.policy.name, first.id, first.reward_id, first.run) == (
        "psyray-round-1",
        "a" * 16,
        "a" * 16,
        home / "a",
    )
    assert promote(str(home / "b"), home, uri(home)) == {"psyray-policy": "2", "psyray-reward": "2"}
    second = find_champion(asked, uri(home))
    assert (second.policy.name, second.reward.path) == ("psyray-round-2", str(home / "b/reward"))
    # An alias of the policy alone moves the policy alone.
    with registry(uri(home)) as client:
        client.set_registered_model_alias("psyray-policy", "champion", "1")
    mixed = find_champion(asked, uri(home))
    assert (mixed.id, mixed.reward_id, mixed.reward.path) == ("a" * 16, "b" * 16, str(home / "b/reward"))
    assert promote("psyray-policy/1", home, uri(home)) == {"psyray-policy": "1", "psyray-reward": "1"}
    assert registered(uri(home), "psyray-reward")["run"] == str(home / "a")


def test_asking_for_a_model_makes_no_registry(tmp_path: Path) -> None:
    with pytest.raises(PsyrayError, match=r"has no model runs/dmo, and no folder has that name"):
        registered(uri(tmp_path / "runs"), "runs/dmo")
    assert not list(tmp_path.iterdir())


def test_a_version_is_served_as_it_was_exported(home: Path) -> None:
    pinned = find_champion(Args.read({"runs": str(home), "model": "psyray-policy/2"}), uri(home))
    assert (pinned.id, pinned.reward_id) == ("b" * 16, "b" * 16)


def test_what_cannot_be_champion_says_why(home: Path) -> None:
    with pytest.raises(PsyrayError, match=r"has not registered its psyray-policy at sqlite.*psyray run CONFIG"):
        promote("c" * 16, home, uri(home))
    with pytest.raises(PsyrayError, match="has no model psyray-policy/9"):
        promote("psyray-policy/9", home, uri(home))
    with pytest.raises(PsyrayError, match="no stage"):
        promote("abcdef12", home, uri(home))
    with pytest.raises(PsyrayError, match="has no model psyray-policy@none"):
        find_champion(Args.read({"runs": str(home), "model": "psyray-policy@none"}), uri(home))


def test_a_run_is_promoted_where_its_own_settings_register(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    kept = home / "b" / "config.yaml"
    kept.write_text(yaml.safe_dump({"track": {"uri": uri(home)}}))
    assert promote(str(home / "b"), tmp_path)["psyray-policy"] == "2"
    assert promote("a" * 16, home, uri(home))["psyray-policy"] == "1"  # as asked
    for tracking, run in ((None, "a"), (f"sqlite:///{tmp_path}/other.db", "b")):
        with pytest.raises(PsyrayError, match=r"has not registered .* at sqlite.*other\.db"):
            promote(str(home / run), home, tracking)
    kept.write_text(yaml.safe_dump({"track": {"uri": None}}))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert promote(str(home / "b"), tmp_path)["psyray-policy"] == "2"  # SQLite beside the run, not beside --runs
    kept.unlink()


def test_a_name_is_looked_for_at_the_registry_that_is_said(home: Path, tmp_path: Path) -> None:
    there = ["--tracking-uri", uri(home), "--runs", str(tmp_path)]
    done = CliRunner().invoke(app, ["promote", "psyray-policy/2", *there], env={"COLUMNS": "200"})
    assert done.exit_code == 0 and "psyray-policy: version 2 is champion" in done.output
    told = CliRunner().invoke(app, ["lineage", "psyray-policy@none", *there])
    assert "has no model psyray-policy@none" in str(told.exception)


def test_a_server_is_not_given_a_password_in_its_words() -> None:
    assert Args.read({"tracking": "http://mlflow.internal:5000"}).tracking == "http://mlflow.internal:5000"
    with pytest.raises(PsyrayError, match=r"^tracking holds .* MLFLOW_TRACKING_PASSWORD") as told:
        Args.read({"tracking": "https://me:hunter2@mlflow.internal"})
    assert "hunter2" not in str(told.value)

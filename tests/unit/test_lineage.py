"""`psyray lineage`: from a run, a folder, an id or a registered name back to the speeches, by manifests alone."""

import json
from pathlib import Path

import pytest
from made_run import MadeRun
from typer.testing import CliRunner

from psyray import lineage
from psyray.cli import app
from psyray.errors import PsyrayError
from psyray.run import Run, read_stages
from psyray.sections.place import TrackSection
from psyray.track import Tracker


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a finished made-up run, and one that was cut off."""
    folder = tmp_path_factory.mktemp("runs")
    MadeRun(folder / "demo").make()
    MadeRun(folder / "short", until="round-1/policy").make()
    return folder


def found(model: str, runs: Path) -> dict:
    return lineage.facts(lineage.find(model, runs, f"sqlite:///{runs}/none.db"))


def stage(runs: Path, name: str):
    return next(artifact for artifact in read_stages(runs / "demo") if artifact.name == name)


def test_everything_behind_the_champion_is_there_once_and_after_what_it_is_made_from(runs):
    known = found(str(runs / "demo"), runs)
    listed = [entry["fingerprint"] for entry in known["stages"]]
    assert known["stage"] == "export" and set(listed) == {a.fingerprint for a in read_stages(runs / "demo")}
    assert len(listed) == len(set(listed)) and known["rounds"] == [0, 1, 2] and known["labels_bought"] == 12
    for place, entry in enumerate(known["stages"]):
        assert set(entry["made_from"]) <= set(listed[:place])


def test_a_model_folder_knows_only_what_came_before_it(runs):
    policy = stage(runs, "round-1/policy")
    for model in (str(policy.path / "model"), policy.fingerprint, policy.fingerprint[:10]):
        known = found(model, runs)
        names = [entry["stage"] for entry in known["stages"]]
        assert known["fingerprint"] == policy.fingerprint and names[0] == "speeches" and names[-1] == "round-1/policy"
        assert "round-1/gate" not in names and known["labels_bought"] == 6


def test_policies_that_a_policy_went_on_from_are_behind_it(tmp_path):
    run = Run(tmp_path / "runs/demo", lambda line: None)
    first = run.stage("round-1/policy", {"policy": "org/start", "reference": "org/start"}, [], lambda folder: {})
    second = run.stage(
        "round-2/policy", {"policy": first.fingerprint, "reference": first.fingerprint}, [], lambda folder: {}
    )
    export = run.stage("export", {"champion": second.fingerprint}, [], lambda folder: {})
    names = [entry["stage"] for entry in found(export.fingerprint, tmp_path / "runs")["stages"]]
    assert names == ["round-1/policy", "round-2/policy", "export"]


def test_a_registered_name_leads_to_its_run(tmp_path):
    MadeRun(tmp_path / "demo").make()
    export = next(artifact for artifact in read_stages(tmp_path / "demo") if artifact.name == "export")
    tags = {"run": str(tmp_path / "demo"), "fingerprint": export.fingerprint}
    with Tracker(TrackSection(), tmp_path / "demo", {}, lambda line: None) as tracker:
        version = tracker.register("psyray-policy", export.path, alias="champion", tags=tags)
    for name in ("psyray-policy", "psyray-policy@champion", f"psyray-policy/{version}"):
        assert lineage.find(name, tmp_path, tracker.uri).stage.fingerprint == export.fingerprint
    with pytest.raises(PsyrayError, match="has no model psyray-policy@other"):
        lineage.find("psyray-policy@other", tmp_path, tracker.uri)


def test_what_leads_nowhere_is_a_clear_error(runs):
    (runs / "foreign").mkdir()
    (runs / "foreign" / "manifest.json").write_text('{"name": "an app"}')
    for model, words in (
        (str(runs / "short"), "is not finished .no export.; see `psyray status"),
        (str(runs), "neither a run folder nor in the folder of a finished stage"),
        (str(runs / "foreign"), "foreign/manifest.json is none of psyray's"),
        ("abcdef0123", "no stage abcdef0123 in the runs in"),
    ):
        with pytest.raises(PsyrayError, match=words):
            found(model, runs)


def test_a_run_is_looked_for_where_runs_are_and_then_here(runs, tmp_path, monkeypatch):
    export = stage(runs, "export").fingerprint
    (tmp_path / "demo").mkdir()  # a folder of the same name that is no run
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PSYRAY_HOME", str(runs))
    assert found("demo", runs)["fingerprint"] == export
    policy = stage(runs, "round-1/policy")
    monkeypatch.chdir(policy.path)
    assert found("model", runs)["fingerprint"] == policy.fingerprint
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PSYRAY_HOME", str(runs.parent))
    shown = CliRunner().invoke(app, ["lineage", export, "--runs", runs.name])
    assert shown.exit_code == 0 and export[:12] in shown.output


def test_the_command_tells_people_and_programs(runs):
    shown = CliRunner().invoke(app, ["lineage", str(runs / "demo")])
    told = shown.output
    assert shown.exit_code == 0 and "rounds:     0, 1, 2" in told and "labels:     12 bought in the rounds" in told
    assert stage(runs, "speeches").fingerprint[:12] in told and "as above" not in told.splitlines()[6]
    as_json = CliRunner().invoke(app, ["lineage", str(runs / "demo"), "--json"])
    assert json.loads(as_json.output)["fingerprint"] == stage(runs, "export").fingerprint


def test_who_labelled_each_round_is_told_by_kind_and_of_people_how_many(tmp_path):
    run = Run(tmp_path / "runs/demo", lambda line: None)
    people = {"experts": {"people": 3, "agree": 0.8}, "by_judge": {"asked": 4}, "who": "anna"}
    made = []
    for number, settings, stats in (
        (1, {"rubric": "r", "experts": {"overlap": 2, "fall_back": "judge"}, "judge": "rule"}, people),
        (2, {"rubric": "r", "replay": "0f2e", "noise": {"flip": 0.1}}, {}),
        (3, {"rubric": "r", "judge": "rule"}, {}),
        (4, {"rubric": "r", "experts": {"overlap": 1}}, {"experts": {"people": 1}}),
    ):
        made += [run.stage(f"round-{number}/labels", settings, made[-1:], lambda folder, stats=stats: stats)]
    known = found(made[-1].fingerprint, tmp_path / "runs")
    assert known["oracles"] == [
        {"round": 1, "kind": "experts", "noisy": False, "people": 3, "by_judge": 4},
        {"round": 2, "kind": "replay", "noisy": True},
        {"round": 3, "kind": "judge", "noisy": False},
        {"round": 4, "kind": "experts", "noisy": False, "people": 1, "by_judge": 0},
    ]
    shown = CliRunner().invoke(app, ["lineage", made[-1].fingerprint, "--runs", str(tmp_path / "runs")])
    told = "experts (3 people, 4 by the judge) in round 1, noisy replay in round 2, judge in round 3, "
    told += "experts (1 person) in round 4"
    assert told in " ".join(shown.output.split()) and "anna" not in shown.output

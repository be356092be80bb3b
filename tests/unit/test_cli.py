"""The command: plans, help, and one clear error for each mistake. Commands in the docs are read by the same parser."""

import errno
import os
import re
import shlex
from pathlib import Path

import pytest
import typer
from doc_lines import JOB, PAGES, commands, lines
from typer.testing import CliRunner

from psyray import docs
from psyray.cli import app, main
from psyray.config import load_config
from psyray.status import expected_stages
from psyray.stopping import last_stage

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.yaml") if p.name != "serve.yaml")


def test_help_teaches():
    text = CliRunner().invoke(app, ["run", "--help"]).output
    assert "psyray run configs/demo.yaml" in text and "--dry-run" in text


def test_help_shows_what_stands_in_brackets():
    text = CliRunner().invoke(app, ["lineage", "--help"], env={"COLUMNS": "200"}).output
    assert "NAME@ALIAS" in text.partition("Arguments")[2]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.name)
def test_a_dry_run_prints_the_plan_of_every_configuration(config, tmp_path):
    from psyray.data.speeches import SHIPPED

    settings = [f"run.path={tmp_path}/run", f"speeches.path={SHIPPED}"]
    result = CliRunner().invoke(app, ["run", str(config), *settings, "--dry-run"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for word in ("responses", "judgements", "reward", "round 1", "labels:", "every setting is valid"):
        assert word in result.output
    assert "dropped: " in result.output and "personal details taken out: " in result.output and "{" not in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["configs/demo.yaml", "loop.rouns=1"], "did you mean 'rounds'"),
        (["configs/nothing.yaml"], "no configuration file at configs/nothing.yaml"),
        (["configs/demo.yaml", "speeches.path=nothing.csv"], "no file of client speeches at nothing.csv"),
        (["configs/demo.yaml", "responses.k=1"], "a pair needs two responses"),
        (["configs/demo.yaml", "loop.k=1"], "a pair needs two responses"),
        (["configs/demo.yaml", "loop.budget=0", "loop.reward_pairs=0"], "no round would have a pair"),
        (
            [
                "configs/demo.yaml",
                "loop.budget=[8, 0]",
                "loop.reward_pairs=0",
                "loop.replay=0",
                "loop.replay_balance=0",
            ],
            "loop.budget gives round 2 nothing",
        ),
        (["configs/demo.yaml", "dpo.train.freeze_layers=31"], "dpo.train.freeze_layers is 31; its model has 30 layers"),
        (
            ["configs/demo.yaml", "dpo.train={lora: {targets: [v_proj, q_prj]}, freeze_layers: 0}"],
            "dpo.train.lora.targets: its model has no layer 'q_prj'; did you mean 'q_proj'",
        ),
        (["configs/demo.yaml", "policy.temperature=0"], "all loop.k answers to a speech would be the same one"),
        (["configs/demo.yaml", "policy.model=/no/such/model", "cluster.address="], "no model at /no/such/model"),
        (["configs/demo.yaml", "policy.max_tokens=2000"], "no room for a prompt"),
        (["configs/demo.yaml", "rubric=counseling"], "no rubric 'counseling'"),
        (["configs/demo.yaml", "pairs.veto=[humour]"], "pairs.veto: the rubric counselling has no principle humour"),
        (["configs/demo.yaml", "run.path=s3://bucket/x", "run.mirror=s3://bucket/y"], "leave run.mirror out"),
        (["configs/demo.yaml", "run.path=s3://me:hidden@bucket/x"], "run.path is a plain URI"),
        (["configs/demo.yaml", "run.mirror=bucket/x"], "run.mirror is a plain URI"),
        (["configs/demo.yaml", "--until", "judgement"], "did you mean 'judgements'"),
        (["configs/demo.yaml", "--until", "judgement", "--dry-run"], "did you mean 'judgements'"),
        (["configs/demo.yaml", "ledger.url=nonsense"], "the label ledger's URL cannot be read"),
        (["configs/demo.yaml", "ledger.url=postgresql+psycopg://u:p@h/d"], "ledger.url holds a password"),
        (["configs/demo.yaml", "track.uri=https://me:hunter2@h/mlflow"], "track.uri holds a user name, a password"),
        (
            ["configs/demo.yaml", "oracle.kind=replay", "oracle.path=no.jsonl"],
            "no labelled set at no.jsonl (oracle.path)",
        ),
    ],
)
def test_a_mistake_is_one_clear_line_and_not_a_traceback(words, expected, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PSYRAY_HOME", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        main(["run", *words])
    error = capsys.readouterr().err
    assert ended.value.code == 1 and error.startswith("error: ") and expected in error
    assert "Traceback" not in error


@pytest.mark.parametrize("setting", ["speeches.path=gone.csv", "speeches.exclude=[gone.csv]"])
def test_a_missing_file_is_told_before_anything_starts(setting, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PSYRAY_HOME", str(tmp_path))
    with pytest.raises(SystemExit):
        main(["run", "configs/demo.yaml", setting])
    assert f"no file of client speeches at gone.csv ({setting.partition('=')[0]})" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_clear_line(capsys, monkeypatch, tmp_path):
    def full(run):
        raise OSError(errno.ENOSPC, "No space left on device", str(run / "report.html"))

    monkeypatch.setattr("psyray.report.write_report", full)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path)])
    error = capsys.readouterr().err
    assert ended.value.code == 1 and error.startswith("error: ") and f"'{tmp_path}/report.html'; make room" in error


@pytest.mark.parametrize("words", [["status"], ["report"], ["export", "--to", "pairs"], ["conversations"]])
def test_where_there_is_no_run_it_says_where_it_looked(words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PSYRAY_HOME", str(tmp_path / "home"))
    with pytest.raises(SystemExit):
        main([*words, "runs/demo"])
    assert f"no run at {tmp_path}/home/runs/demo or {tmp_path}/runs/demo; start one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "file", "text"),
    [
        ("status", "run.json", '{"stages": ['),
        ("status", "run.json", "[]"),
        ("status", "run.json", '{"pid": 1}'),
        ("report", "config.yaml", "loop: ["),
        ("conversations", "config.yaml", "loop: ["),
        ("conversations", "config.yaml", "- loop"),
        ("lineage", "manifest.json", '{"name": "an app"}'),
        ("lineage", "manifest.json", "{"),
    ],
)
def test_a_broken_file_in_a_run_is_one_clear_line_that_names_it(command, file, text, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    if command == "report":
        (tmp_path / "run" / "run.json").write_text('{"stages": [], "pid": 1}')
    (tmp_path / "run" / file).write_text(text)
    with pytest.raises(SystemExit) as ended:
        main([command, str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert ended.value.code == 1 and error.count("\n") == 1
    assert error.startswith(f"error: {tmp_path}/run/{file} ") and "put a copy of it back" in error


def test_the_settings_page_is_what_the_code_says():
    assert (ROOT / "docs/configuration.md").read_text() == docs.page()


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_psyray_command_in_the_docs_is_one(words, monkeypatch):
    monkeypatch.setenv("PSYRAY_JUDGE_URL", "https://host/v1")
    command, *arguments = map(os.path.expandvars, words)
    given = typer.main.get_command(app).commands[command].make_context(command, list(arguments)).params
    if command == "run":
        config = load_config(ROOT / given["config"], given["settings"])
        if given["until"]:
            last_stage(given["until"], expected_stages(config.model_dump(mode="json")))
    if command in ("label-efficiency", "layers"):
        load_config(None, given["settings"])


def test_the_docs_submit_jobs():
    assert len([line for line in lines("ray") if JOB.match(line)]) > 5


@pytest.mark.parametrize("line", lines("ray"))
def test_every_ray_command_in_the_docs_is_one(line):
    import click
    from ray.scripts.scripts import cli

    command, words = cli, shlex.split(line, comments=True)[1:]
    while isinstance(command, click.Group):
        command, words = command.commands[words[0]], words[1:]
    given = command.make_context("ray", words).params
    if given.get("runtime_env"):
        assert (ROOT / given["runtime_env"]).is_file()


def served() -> list[str]:
    """The `serve run` lines of the docs, without what stands before them and after."""
    lines = (re.findall(r"^(?:\w+=\S+ )*(serve run serve\.\S+ [^#`\n]*)", p.read_text(), re.MULTILINE) for p in PAGES)
    return sorted({line.strip() for found in lines for line in found})


@pytest.mark.parametrize("line", served())
def test_every_served_application_in_the_docs_takes_these_words(line):
    from importlib import import_module

    target, *words = shlex.split(line)[2:]
    module, name = target.split(":")
    application = import_module(module)
    assert callable(getattr(application, name))
    asked = application.Args.read(dict(word.split("=", 1) for word in words if not word.startswith("[")))
    # `serve run` listens there itself: a page cannot ask itself, nor two commands have one port.
    assert getattr(asked, "url", "") != "http://127.0.0.1:8000"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_that_the_docs_name_are_there(page):
    for name in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / name).exists(), name
    for name in re.findall(r"\b((?:configs|jobs|docs|benchmarks)/[\w./-]+\.(?:yaml|py|md))", page.read_text()):
        assert (ROOT / name).exists(), name

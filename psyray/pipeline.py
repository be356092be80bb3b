"""The main job: from client speeches to an exported policy and reward model, stage by stage."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from psyray.active.labelled_set import labelled_source
from psyray.active.ledger import Ledger, ledger_url
from psyray.active.place import ledger_name
from psyray.addresses import refuse_secrets
from psyray.chat_models import check_models
from psyray.cluster import ray_session, require, use_gpu
from psyray.config import Config
from psyray.data.generate import responses_stage
from psyray.data.judge import Desk, judgements_stage
from psyray.data.pairs import pairs_stage
from psyray.data.ready import Ready, ready_stage
from psyray.data.rules import Rules
from psyray.data.sources import HUB, existing
from psyray.data.speeches import listed, speeches_stage
from psyray.data.topics import topic_judge, topics_stage
from psyray.engines.judges import answerer, make_judge, make_panel
from psyray.errors import PsyrayError, hint
from psyray.evaluate.probe import load_probe
from psyray.files import write_atomic
from psyray.homes import run_path
from psyray.loop import Outcome, Seen, online_loop
from psyray.mirror import Mirror, address
from psyray.models import layer_count, part_names, resolve_model
from psyray.needs import TASK, serving
from psyray.records import Row
from psyray.report import page, write_report
from psyray.reward.adapters import adapters_stage
from psyray.reward.body import reading_of
from psyray.reward.by_topic import by_topic_stage
from psyray.reward.ensemble import features_stage, heads_stage
from psyray.reward.train import reward_stage
from psyray.rubric import Rubric, kept_rubric, load_rubric, rubric_file
from psyray.run import Artifact, Folder, Run, followed
from psyray.sections.data import JudgeSection, Sampling
from psyray.sections.learning import LoopSection
from psyray.status import expected_stages
from psyray.stopping import Reached, last_stage
from psyray.track import Tracker

CHAMPION = "champion.json"


def run_pipeline(
    config: Config, *, serve: bool = False, until: str | None = None, say: Callable[[str], None] = print
) -> Path:
    """Run every stage that is not done yet and return the report's path.

    With `serve`, the run ends with one request to the served policy, scored by the served reward model; with `until`,
    after the stage of that name.
    """
    check(config)
    settings = config.model_dump(mode="json")
    last = last_stage(until, expected_stages(settings)) if until else None
    mirror = open_mirror(config, say)
    run = Run(config.run.path, say, last, mirror)
    with (
        mirror.open() if mirror else nullcontext(),
        run.open(settings),
        Tracker(config.track, run.path, settings) as tracker,
    ):
        run.on_stage = tracker.stage
        desk = open_desk(config, run)
        keep_rubric(config, run, desk.rubric)
        with ray_session(config):
            require([TASK], config.cluster.wait_s, "the tasks of a run")
            with suppress(Reached):
                export = run_stages(run, config, desk, second_desk(config, desk))
                register(tracker, export, run)
                if serve:
                    served_stage(run, export, config)
        return keep_report(tracker, run.path)


def run_stages(run: Run, config: Config, desk: Desk, second: Desk | None = None) -> Artifact:
    """All stages in order, up to the exported champion."""
    speeches = speeches_stage(run, config.speeches)
    topics = topics_stage(run, config, speeches) or speeches
    ready = ready_stage(run, config.speeches, desk.rubric, speeches)
    responses = responses_stage(run, config, speeches)
    judgements = judgements_stage(run, desk, responses)
    pairs = pairs_stage(run, config.pairs, desk.rubric, responses, judgements, ready)
    reward = adapters_stage(run, config, reward_stage(run, config, pairs), pairs)
    features = features_stage(run, "reward-features", config, reward, in_pairs(responses, pairs, ready), pairs)
    heads = heads_stage(run, "reward-heads", config, reward, [features], [pairs])
    outcome = online_loop(run, config, desk, speeches, reward, heads, Seen((features,), (pairs,)), second)
    by_topic_stage(run, outcome.heads, outcome.seen.features, outcome.seen.pairs, topics)
    return export_stage(run, config, reward, outcome)


def in_pairs(responses: Artifact, pairs: Artifact, ready: Ready | None) -> list[Row]:
    """The responses that stand in a pair: only they need features."""
    sides = ["chosen_id", "rejected_id"]
    wanted = {row[side] for row in pairs.each(sides) for side in sides}
    known = chain(responses.each(), ready.responses() if ready else [])
    return [row for row in known if row["response_id"] in wanted]


def export_stage(run: Run, config: Config, reward: Artifact, outcome: Outcome) -> Artifact:
    """The stage `export`: what serving reads, in RUN/champion.json."""
    champion = outcome.champion(config.loop)

    def make(folder: Folder) -> Mapping[str, Any]:
        policy = config.policy.model_dump(exclude={"model"})
        exported = {
            "policy": {
                "name": f"psyray-round-{champion.round}",
                "path": champion.path,
                "round": champion.round,
                **policy,
            },
            "reward": {
                "name": "psyray-reward",
                "path": str(reward.model),
                "heads": str(outcome.heads.path / "heads.npz"),
                "max_length": config.reward.train.max_length,
            },
            "run": str(run.path),
            "id": folder.path.name,
        }
        write_atomic(folder.path / CHAMPION, json.dumps(exported, indent=1))
        return {"champion_round": champion.round, **exported}

    settings = {"policy": config.policy.model_dump(), "champion": champion.identity}
    export = run.stage("export", settings, [reward, outcome.heads, *outcome.gates], make)
    # Beside the stages too, for serving; an export that was done before is current again.
    write_atomic(run.path / CHAMPION, (export.path / CHAMPION).read_text())
    return export


def open_mirror(config: Config, say: Callable[[str], None]) -> Mirror | None:
    """The copies that `run.mirror` asks for, with the ledger where it is a file."""
    if config.run.mirror is None:
        return None
    path = run_path(config.run.path)
    _, sqlite, file = ledger_url(config.ledger.url, path).partition("sqlite:///")
    return Mirror(config.run.mirror, path, Path(file) if sqlite else None, say)


def register(tracker: Tracker, export: Artifact, run: Run) -> None:
    """The champion and its reward model in MLflow's registry."""
    stats = export.stats

    def model(name: str) -> Path:
        return followed(Path(stats[name]["path"]), Path(stats["run"]), run.path)

    tags = {"run": stats["run"], "round": str(stats["champion_round"]), "fingerprint": export.fingerprint}
    tracker.register("psyray-policy", model("policy"), alias="champion", tags=tags)
    tracker.register("psyray-reward", model("reward"), alias="champion", tags=tags)


def keep_report(tracker: Tracker, run: Path) -> Path:
    """RUN/report.html, and among MLflow's artifacts a copy without a client's words: those stay in the run folder."""
    report = write_report(run)
    tracker.text(page(run, quotes=False), report.name)
    return report


def served_stage(run: Run, export: Artifact, config: Config) -> Artifact:
    """The stage `served`: one real request to the served champion, scored over HTTP."""
    from serve.request import serve_once

    def make(folder: Folder) -> Mapping[str, Any]:
        require(serving(config.engine, use_gpu(config.engine.device)), config.cluster.wait_s, "the served result")
        return serve_once(run.path)

    return run.stage("served", {}, [export], make)


def open_desk(config: Config, run: Run) -> Desk:
    """The judge or the panel, its rubric and the ledger that the run buys labels with."""
    rubric = load_rubric(config.rubric)
    ledger = Ledger(ledger_url(config.ledger.url, run.path))
    run_id = ledger_name(config, run.path)

    def desk(section: JudgeSection, setting: str) -> Desk:
        judge = make_judge(section, rubric, config.engine, config.cluster.wait_s)
        return Desk(judge, rubric, ledger, run_id, section, setting=setting)

    if not config.panel.judges:
        return desk(config.judge, "judge")
    members = tuple(desk(section, f"panel.judges.{place}") for place, section in enumerate(config.labelling))
    panel = make_panel([member.judge for member in members], config.panel, rubric)
    section = config.judge.model_copy(update={"form": config.panel.judges[0].form})
    return Desk(panel, rubric, ledger, run_id, section, members, config.panel)


def keep_rubric(config: Config, run: Run, rubric: Rubric) -> None:
    """Leave in RUN/rubric-ID.yaml what was asked, by the ids that manifests name: the rubric's own file may change."""
    for key in (rubric.id, rubric.pairwise_id):
        if not (kept := kept_rubric(run.path, key)).exists():
            write_atomic(kept, rubric_file(config.rubric).read_text())


def second_desk(config: Config, desk: Desk) -> Desk | None:
    """The judge of `evaluate.second`, with the rubric, the ledger and the run of the first."""
    if not (section := config.evaluate.second):
        return None
    judge = make_judge(section, desk.rubric, config.engine, config.cluster.wait_s)
    return Desk(judge, desk.rubric, desk.ledger, desk.run_id, section, setting="evaluate.second")


def check(config: Config) -> None:
    """All that can be known to be wrong before anything starts; PsyrayError names the setting."""
    check_settings(config)
    for source in listed(config.speeches):
        if not source.path.startswith(HUB):
            existing(source)
    check_models(config)
    reading_of(config.reward, resolve_model(config.reward.model))
    check_layers(config)


def check_layers(config: Config) -> None:
    """PsyrayError where a job is to freeze or to adapt layers that its model does not have."""
    jobs = {"reward": (config.reward.train, config.reward.model), "dpo": (config.dpo.train, config.policy.model)}
    for setting, (train, model) in jobs.items():
        if train.freeze_layers and train.freeze_layers > (total := layer_count(resolve_model(model))):
            raise PsyrayError(f"{setting}.train.freeze_layers is {train.freeze_layers}; its model has {total} layers")
        if not train.lora or not train.lora.targets:
            continue
        names = part_names(resolve_model(model))
        for target in train.lora.targets:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                layers = sorted({end for name in names if not (end := name.rpartition(".")[2]).isdecimal()})
                at = f"{setting}.train.lora.targets"
                raise PsyrayError(f"{at}: its model has no layer {target!r}; {hint(target, layers)}")


def check_settings(config: Config) -> None:
    """Settings that cannot work together; PsyrayError names them."""
    refuse_secrets(config)
    ledger_url(config.ledger.url, run_path(config.run.path))
    if config.run.mirror is not None:
        address(config.run.mirror)
    if config.oracle.path:
        labelled_source(config.oracle)
    rubric = load_rubric(config.rubric)
    topic_judge(config)
    check_systems(config, rubric)
    judges = [make_judge(section, rubric, config.engine, config.cluster.wait_s) for section in config.labelling]
    make_panel(judges, config.panel, rubric)
    check_evaluation(config, rubric)
    Rules.make(config.pairs, rubric)
    if config.responses.k < 2:
        raise PsyrayError("responses.k is 1: a pair needs two responses to one speech; set responses.k to 2 or more")
    if config.loop.rounds and config.loop.k < 2:
        raise PsyrayError("loop.k is 1: a pair needs two responses to one speech; set loop.k to 2 or more")
    if config.loop.rounds and not config.policy.temperature:
        raise PsyrayError(
            "policy.temperature is 0: all loop.k answers to a speech would be the same one, and make no pair; set it "
            "above 0"
        )
    longest = max(r.max_tokens for r in (*config.responses.responders, config.policy))
    if longest >= (room := config.engine.max_model_len):
        raise PsyrayError(f"max_tokens {longest} leaves no room for a prompt in engine.max_model_len {room}")
    check_pairs_of_rounds(config.loop)


def check_pairs_of_rounds(loop: LoopSection) -> None:
    """PsyrayError where a round could have no pair to train on."""
    budgets = [loop.budget_of(number) for number in range(1, loop.rounds + 1)]
    if loop.reward_pairs or not budgets:
        return
    if not any(budgets):
        raise PsyrayError("loop.budget and loop.reward_pairs are both 0: no round would have a pair to train on")
    if 0 in budgets and not loop.replay:
        raise PsyrayError(
            f"loop.budget gives round {budgets.index(0) + 1} nothing, and loop.reward_pairs and loop.replay are 0: it "
            "would have no pair to train on"
        )


def check_systems(config: Config, rubric: Rubric) -> None:
    """PsyrayError where the rubric is not the default one and a model would still be told that it is a counsellor."""
    told: dict[str, Sampling] = {f"responses.responders: {r.name}": r for r in config.responses.responders}
    told |= {"policy": config.policy}
    unsaid = [name for name, section in told.items() if "system" not in section.model_fields_set]
    if unsaid and config.rubric != Config.model_fields["rubric"].default:
        raise PsyrayError(
            f"no `system` for {', '.join(unsaid)}: the default tells a model that it is a counsellor; with the rubric "
            f"{rubric.name} say what the models are in its field"
        )


def check_evaluation(config: Config, rubric: Rubric) -> None:
    """The probe and the second judge; PsyrayError where the second is one of those that label, however it is asked."""
    if config.evaluate.probe is not None:
        load_probe(config.evaluate.probe)
    if section := config.evaluate.second:
        make_judge(section, rubric, config.engine, config.cluster.wait_s)
        if answerer(section) in map(answerer, config.labelling):
            who = " ".join(answerer(section))
            raise PsyrayError(f"evaluate.second is the judge that labels ({who}): it would grade its own lesson")

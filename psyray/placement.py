"""Where each stage of a run is placed: what it asks the cluster for, and whether the one at hand has room for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from psyray.cluster import at_hand
from psyray.config import Config
from psyray.data.generate import own_engine
from psyray.errors import PsyrayError
from psyray.needs import LIGHT, TASK, Bundle, engine, forward, missing, scoring, serving, spelt, training
from psyray.sections.data import JudgeSection
from psyray.sections.learning import TrainSection

DRIVER = "the driver"


@dataclass(frozen=True)
class Place:
    """A stage, who works in it, and the bundles that have to be free at once; a round's stages are `round-N/...`."""

    stage: str
    who: str
    bundles: tuple[Bundle, ...] = ()


def places(config: Config, gpu: bool) -> Iterator[Place]:
    """Every stage that a run with these settings goes through, in order; several lines where it asks several times."""

    def put(stage: str, who: str, bundles: Sequence[Bundle]) -> Place:
        return Place(stage, who, tuple(bundles))

    def trained(stage: str, section: TrainSection) -> Place:
        return put(stage, times(section.workers, "training worker"), training(section, gpu))

    def judged(stage: str, judges: Sequence[JudgeSection]) -> Iterator[Place]:
        yield from distinct(judge_place(stage, judge, config, gpu) for judge in judges)

    judges = config.panel.judges or [config.judge]
    second, rounds = config.evaluate.second, config.loop.rounds
    scorers = times(config.engine.replicas, "reward model")
    yield put("speeches", "tasks, one after another at least", [TASK])
    yield from judged("topics", [config.topics] if config.topics else [])
    if any(source.use != "speeches" for source in config.speeches.sources):
        yield Place("ready", DRIVER)
    yield from distinct(responders(config, gpu))
    yield from judged("judgements", judges)
    yield Place("pairs", DRIVER)
    yield trained("reward", config.reward.train)
    if config.reward.adapters.count:
        yield trained("reward-adapters", config.reward.adapters.train)
    yield put("reward-features", scorers, scoring(config.engine, gpu))
    yield Place("reward-heads", DRIVER)
    yield put("round-N/samples", times(config.engine.replicas, "engine"), engine(config.engine, gpu))
    yield put("round-N/features", scorers, scoring(config.engine, gpu))
    yield Place("round-N/scores", DRIVER)
    if rounds:
        yield from labelled(config, list(judged("round-N/labels", judges)))
        yield Place("round-N/heads", DRIVER)
        yield trained("round-N/policy", config.dpo.train)
        if config.evaluate.probe:
            yield put("round-N/probe", "1 task", forward(gpu))
        yield from judged("round-N/second", [second] if second else [])
    yield from judged("round-N/gate", judges)
    yield Place("reward-topics", DRIVER)
    yield Place("export", DRIVER)
    yield put("served", "with --serve: engine and reward model", serving(config.engine, gpu))


def times(count: int, what: str) -> str:
    """How many of a thing, in words."""
    return f"{count} {what}{'s' if count > 1 else ''}"


def distinct(found: Iterable[Place]) -> list[Place]:
    """The places, each once."""
    return list({(place.who, str(place.bundles)): place for place in found}.values())


def judge_place(stage: str, judge: JudgeSection, config: Config, gpu: bool) -> Place:
    """Where a judge works."""
    if judge.engine == "vllm":
        return Place(
            stage, f"{times(config.engine.replicas, 'engine')} of {judge.model}", tuple(engine(config.engine, gpu))
        )
    return Place(stage, "the rule" if judge.engine == "rule" else f"one that asks {judge.url}", (LIGHT,))


def responders(config: Config, gpu: bool) -> Iterator[Place]:
    """The engines and endpoints of the pool, started one after another."""
    for responder in config.responses.responders:
        if responder.endpoint:
            yield Place("responses", f"one that asks {responder.endpoint.url}", (LIGHT,))
        else:
            own = own_engine(config.engine, responder.engine)
            yield Place("responses", f"{times(own.replicas, 'engine')} of {responder.model}", tuple(engine(own, gpu)))


def labelled(config: Config, judges: Sequence[Place]) -> Iterator[Place]:
    """Who answers a round's questions."""
    oracle = config.oracle
    kind = oracle.answering
    if kind == "experts":
        yield Place("round-N/labels", "experts, at their page")
    if kind == "replay":
        yield Place("round-N/labels", f"{DRIVER}, which reads {oracle.path}")
    if kind == "judge" or (kind == "experts" and oracle.fall_back == "judge"):
        yield from judges


def show_places(config: Config, out: Console) -> None:
    """Print each stage's place and what the cluster at hand lacks for it."""
    try:
        nodes, where = at_hand(config)
    except PsyrayError as error:
        nodes, where = [], f"not known: {error}"
    known = bool(nodes)
    gpu = config.engine.device == "gpu" or (config.engine.device == "auto" and any(n.get("GPU") for n in nodes))
    table = Table(title="placement", title_justify="left")
    for column in ("stage", "who", "asks for", "room"):
        table.add_column(column, overflow="fold")
    short = False
    for place in places(config, gpu):
        lacking = missing(place.bundles, nodes) if known and place.bundles else ""
        short |= bool(lacking)
        room = f"lacks {lacking}" if lacking else "yes" if known or not place.bundles else "?"
        table.add_row(place.stage, place.who, spelt(place.bundles) or "nothing", room)
    out.print(table)
    out.print(f"cluster: {where}", markup=False)
    if short:
        out.print(
            "a stage that finds no room asks an autoscaler for it, if the cluster has one, waits "
            f"{config.cluster.wait_s:g} s (cluster.wait_s) and stops with what is missing"
        )

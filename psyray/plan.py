"""What a run would do: stages, rows, models, hardware and label budget, worked out without the hardware."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from psyray.chat_models import unseen_models
from psyray.config import Config
from psyray.data.speeches import preview
from psyray.homes import run_path
from psyray.placement import show_places
from psyray.rubric import load_rubric
from psyray.sections.learning import OracleSection, TrainSection

LOOKED_AT = 20_000  # rows of each source that a plan reads
Line = tuple[str, str, str]  # stage, work, model


def show_plan(config: Config, out: Console) -> None:
    """Check all that needs no hardware and print the plan; PsyrayError as `psyray run` would raise it."""
    from psyray.pipeline import check_settings

    check_settings(config)
    _, speeches = preview(config.speeches, LOOKED_AT)
    table = Table(title=f"plan of {run_path(config.run.path)}", title_justify="left")
    for column in ("stage", "work", "model"):
        table.add_column(column, overflow="fold")
    for line in lines(config, speeches["kept"], speeches["train"]):
        table.add_row(*line)
    out.print(table)
    show_places(config, out)
    for words in speech_lines(speeches):
        out.print(words)
    if config.run.mirror:
        out.print(f"mirror: {config.run.mirror}")
    out.print(f"labels: {labels(config)}")
    out.print(f"ledger: {'SQLite beside the run folder' if config.ledger.url is None else 'as configured'}")
    for why in unseen_models(config):
        out.print(f"not checked here: {why}")
    out.print("every setting is valid; nothing was started")


def speech_lines(speeches: Mapping[str, Any]) -> Iterator[str]:
    """What the speeches would be, in words."""
    sources = ", ".join(f"{name} ({count} rows)" for name, count in speeches["sources"].items())
    yield f"speeches: {sources}"
    if any(count == LOOKED_AT for count in speeches["sources"].values()):
        yield f"of each source only the first {LOOKED_AT} rows were looked at; a run reads all"
    yield "{kept} kept ({train} train, {test} held out)".format(**speeches)
    yield f"dropped: {counted(speeches['dropped'])}"
    yield f"speak of a crisis: {counted(speeches['crisis_kinds'])}"
    yield f"personal details taken out: {counted(speeches['scrubbed'])}"


def counted(counts: Mapping[str, int]) -> str:
    """Counts by name in words; those that are none are left out."""
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none"


def lines(config: Config, speeches: int, train: int) -> Iterator[Line]:
    """The plan's table."""
    k, loop = config.responses.k, config.loop
    test = speeches - train
    held_out = min(test, config.evaluate.speeches or test)
    prompts = min(loop.prompts, train)
    judges = config.panel.judges or [config.judge]
    judge = ", ".join(dict.fromkeys(one.model or f"judge {one.engine}" for one in judges))
    models = ", ".join(dict.fromkeys(r.model for r in config.responses.responders))
    yield "speeches", f"{speeches} speeches", ""
    yield "responses", f"{speeches} x {k} = {speeches * k} responses", models
    ratings = f"up to {speeches * k} ratings" + (f" by each of {len(judges)} judges" if len(judges) > 1 else "")
    yield "judgements", ratings, judge
    yield "pairs", f"rule {config.pairs.rule}, gap {config.pairs.gap} on the {config.pairs.gap_on}", ""
    yield "reward", training(config.reward.train), config.reward.model
    if count := config.reward.adapters.count:
        yield "reward-adapters", f"{count} adapters, each: {training(config.reward.adapters.train)}", ""
    yield "reward-heads", f"{config.reward.heads.count} heads ({config.reward.heads.kind})", ""
    sampled = prompts * loop.k + held_out
    yield "round 0", f"{sampled} samples ({held_out} held out)", config.policy.model
    for number in range(1, loop.rounds + 1):
        more = prompts * loop.k if number < loop.rounds else 0
        pairs = f"{min(loop.budget_of(number), prompts)} asked by {loop.acquisition}, the rest by the reward model"
        yield f"round {number}", f"{pairs}; DPO: {training(config.dpo.train)}", config.policy.model
        yield f"round {number} gate", f"{more + held_out} samples ({held_out} held out){graded(config)}", ""


def graded(config: Config) -> str:
    """What else looks at the held-out answers, in words."""
    second, probe = config.evaluate.second, config.evaluate.probe
    others = [f"probe {probe}"] if probe else []
    others += [f"graded again by {second.model or f'judge {second.engine}'}"] if second else []
    return "".join(f", {other}" for other in others)


def training(train: TrainSection) -> str:
    """A training section in words."""
    words = "epochs {epochs}, batch {batch_size}, learning rate {learning_rate}, ZeRO-{zero_stage}"
    lora = f", LoRA of rank {train.lora.rank}" if train.lora else ""
    dev = f", the best step by {train.dev.share:.0%} of the speeches" if train.dev else ""
    return words.format(**vars(train)) + lora + dev


def labels(config: Config) -> str:
    """The label budget in words."""
    first = rated_first(config)
    each = [config.loop.budget_of(number) for number in range(1, config.loop.rounds + 1)]
    summed = " + ".join(map(str, each)) if len(set(each)) > 1 else f"{len(each)} x {config.loop.budget_of(1)}"
    rounds = f"{summed} = {sum(each)} comparisons"
    who = "" if config.oracle.kind == "judge" else f" by {answering(config.oracle)}"
    return f"{first} rated first, then {rounds}{who}; rubric {load_rubric(config.rubric).name}"


def rated_first(config: Config) -> str:
    """What is rated before the rounds, in words."""
    each = dict.fromkeys("all" if judge.budget is None else f"at most {judge.budget}" for judge in config.labelling)
    return f"{' or '.join(each)} responses"


def answering(oracle: OracleSection) -> str:
    """Who answers a round's questions, in words."""
    names = {"judge": "the judge", "experts": f"{oracle.overlap} experts each", "replay": f"the pairs in {oracle.path}"}
    return names[oracle.answering] + (f", {oracle.flip:.0%} of the verdicts flipped" if oracle.kind == "noisy" else "")

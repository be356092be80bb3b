"""How far a run is, read from its folder alone: while it goes on, after a crash, and when it is done.

Whom a round waits for that asks experts is read from the label ledger.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from psyray.errors import PsyrayError
from psyray.files import read_json, read_settings
from psyray.in_words import duration, gate_note, key_numbers, number
from psyray.run import Artifact, existing_run, find_run, read_stages
from psyray.times import by_round, round_of

STYLES = {
    "done": "green",
    "running": "bold cyan",
    "stopped": "yellow",
    "cut off": "bold red",
    "failed": "bold red",
    "elsewhere": "cyan",
    "waiting": "dim",
}


def read_config(path: Path) -> dict[str, Any]:
    """The resolved settings of the run's latest pass; empty where none were written, PsyrayError where broken."""
    kept = find_run(path) / "config.yaml"
    return read_settings(kept) if kept.exists() else {}


def expected_stages(config: Mapping[str, Any]) -> list[str]:
    """The stages that a whole run with these settings goes through, in order."""
    speeches = config.get("speeches") or {}
    brings = any(source.get("use", "speeches") != "speeches" for source in speeches.get("sources") or [])
    names = ["speeches", *(["topics"] if config.get("topics") else []), *(["ready"] if brings else [])]
    adapted = ((config.get("reward") or {}).get("adapters") or {}).get("count")
    names += ["responses", "judgements", "pairs", "reward", *(["reward-adapters"] if adapted else [])]
    names += ["reward-features", "reward-heads"]
    evaluate = config.get("evaluate") or {}
    measured = [name for name in ("probe", "second") if evaluate.get(name)]
    names += [f"round-0/{step}" for step in ("samples", "features", "scores", "gate")]
    for round_ in range(1, int((config.get("loop") or {}).get("rounds", 0)) + 1):
        steps = ["labels", "heads", "policy", "samples", "features", "scores", *measured, "gate"]
        names += [f"round-{round_}/{step}" for step in steps]
    return [*names, "reward-topics", "export"]


def stages_by_name(path: Path) -> dict[str, Artifact]:
    """The finished stages of the run's latest pass."""
    return {artifact.name: artifact for artifact in read_stages(path)}


def round_numbers(stages: Iterable[str]) -> list[int]:
    """The rounds that stages are of, by their names, in order."""
    return sorted({number for name in stages if (number := round_of(name)) is not None})


def stats_of(stages: Mapping[str, Artifact], name: str) -> dict[str, Any]:
    """The stage's numbers; empty where it is not finished."""
    return stages[name].stats if name in stages else {}


def champion_round(stages: Mapping[str, Artifact]) -> int:
    """The round whose policy was exported, else the last that passed its gate; 0 is the start policy."""
    if "champion_round" in (export := stats_of(stages, "export")):
        return int(export["champion_round"])
    return max((n for n in round_numbers(stages) if n and stats_of(stages, f"round-{n}/gate").get("passed")), default=0)


def label_spend(stages: Mapping[str, Artifact]) -> dict[str, int]:
    """Labels over all rounds: asked, answered, bought, reused, ties, invalid, reward_labelled."""
    keys = ("asked", "answered", "bought", "reused", "ties", "invalid", "reward_labelled")
    per_round = [stats_of(stages, f"round-{n}/labels") for n in round_numbers(stages)]
    return {key: sum(int(stats.get(key) or 0) for stats in per_round) for key in keys}


@dataclass(frozen=True)
class Line:
    """One stage in the table."""

    name: str
    state: str  # "done" | "running" | "stopped" on purpose | "failed" | "cut off" | "elsewhere" | "waiting"
    rows: str = ""
    seconds: float | None = None
    note: str = ""


def latest_pass(path: Path) -> tuple[Path, dict[str, Any]]:
    """The file that tells of the run's latest pass, and what it says; nothing where there was none."""
    listed = find_run(path) / "run.json"
    return listed, read_json(listed) if listed.exists() else {}


def ended(path: Path, how: str) -> str:
    """When the latest pass was `stopped`, the `error` that ended it, the stage `until` which it went; else empty."""
    return str(latest_pass(path)[1].get(how, ""))


def driver(path: Path) -> tuple[int | None, bool]:
    """The process id of the run's latest pass and whether that process is alive on this machine."""
    listed, told = latest_pass(path)
    pid = told.get("pid")
    return pid, pid is not None and not elsewhere(path) and _alive(int(pid), listed.stat().st_mtime)


def elsewhere(path: Path) -> str:
    """The machine of the run's latest pass; empty where that is this one."""
    host = latest_pass(path)[1].get("host")
    return str(host) if host not in (None, platform.node()) else ""


def _alive(pid: int, seen: float) -> bool:
    """Whether the process lives and is not a younger one that got the same number."""
    try:
        process = psutil.Process(pid)
        return process.create_time() <= seen + 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # tolerated: it has ended
        return False


def stage_lines(path: Path) -> list[Line]:
    """The state of every stage, in the order of the run; PsyrayError where there is no run."""
    path = find_run(path)
    done = stages_by_name(path)
    state = "stopped" if ended(path, "stopped") else "failed" if ended(path, "error") else "cut off"
    state = "running" if state == "cut off" and driver(path)[1] else state
    state = "elsewhere" if state == "cut off" and elsewhere(path) else state
    listed = read_json(path / "run.json", "stages")["stages"]
    lines = []
    for entry in listed:
        if artifact := done.get(entry["name"]):
            rows = number(artifact.manifest["rows"]) if artifact.manifest["files"] else ""
            note = key_numbers(artifact.name, artifact.stats)
            lines.append(Line(artifact.name, "done", rows, artifact.manifest["seconds"], note))
        else:
            folder = path / "stages" / entry["name"] / entry["fingerprint"]
            lines.append(_unfinished(entry["name"], folder, state, (path / "run.json").stat().st_mtime))
    if "export" not in done:  # after it nothing more comes, also where the gate ended the rounds early
        known = {line.name for line in lines}
        lines += [Line(name, "waiting") for name in expected_stages(read_config(path)) if name not in known]
    return lines


def _unfinished(name: str, folder: Path, state: str, started: float) -> Line:
    alive = state == "running"
    progress = folder / "progress.json"
    if not progress.exists():
        return Line(name, state, "", time.time() - started if alive else None)
    at = json.loads(progress.read_text())
    done, total = int(at["done"]), int(at["total"])
    counted = f"{done:,}/{total:,} {at.get('unit', 'rows')}" + (f" ({100 * done // total} %)" if total else "")
    fresh = done - _rows_before(folder, started)
    elapsed = float(at["at"]) - started
    if not alive:
        return Line(name, state, counted)
    if fresh <= 0 or elapsed <= 0:
        return Line(name, state, counted, time.time() - started, "rate not known yet")
    rate = fresh / elapsed
    note = f"{rate:.1f}/s" if rate >= 1 else f"{60 * rate:.1f}/min"
    return Line(name, state, counted, time.time() - started, f"{note}, about {duration((total - done) / rate)} left")


def _rows_before(folder: Path, started: float) -> int:
    """Rows that an earlier attempt left behind: they say nothing of today's speed."""
    parts = [part for part in folder.glob("part-*.parquet") if part.stat().st_mtime < started]
    return sum(pq.read_metadata(part).num_rows for part in parts)


def show_status(run: Path, console: Console) -> None:
    """Print the run's stages, driver, label spend, latest gate and report; PsyrayError where there is no run."""
    path = existing_run(run)
    lines = stage_lines(path)
    table = Table(title=Text(f"Run {path}"), title_justify="left")
    for heading, justify in (("Stage", "left"), ("State", "left"), ("Rows", "right"), ("Time", "right")):
        table.add_column(heading, justify=justify, no_wrap=heading != "Rows")  # type: ignore[arg-type]
    table.add_column("Numbers", overflow="fold")
    for line in lines:
        seconds = duration(line.seconds) if line.seconds is not None else ""
        table.add_row(line.name, Text(line.state, STYLES[line.state]), line.rows, seconds, Text(line.note))
    console.print(table)
    for fact in _facts(path, lines):
        console.print(Text(fact), soft_wrap=True)


def _facts(path: Path, lines: list[Line]) -> list[str]:
    stages = stages_by_name(path)
    facts = [_driver_fact(path, lines)]
    if any(name.endswith("/labels") for name in stages):
        spend = label_spend(stages)
        facts.append("Labels: " + ", ".join(f"{count:,} {key.replace('_', '-')}" for key, count in spend.items()))
    if any(line.name.endswith("/labels") and line.state not in ("done", "waiting") for line in lines):
        facts += _waits(path)
    gates = [n for n in round_numbers(stages) if n and f"round-{n}/gate" in stages]
    if gates:
        facts.append(f"Latest gate, round {gates[-1]}: {gate_note(stats_of(stages, f'round-{gates[-1]}/gate'))}")
        facts.append(time_fact(stages, gates[-1]))
        facts.append(f"Champion: {f'round {best}' if (best := champion_round(stages)) else 'the start policy'}")
    report = path / "report.html"
    facts.append(f"Report: {report}" if report.exists() else f"Report: none yet; `psyray report {path}` writes one")
    return facts


def _waits(path: Path) -> list[str]:
    from psyray.active.waiting import wait_of  # which reads runs with what is here

    try:
        told = wait_of(path)
    except PsyrayError as error:  # tolerated: a ledger out of reach hides nothing else of the run
        told = str(error)
    return [f"Experts: {told}"] if told else []


def time_fact(stages: Mapping[str, Artifact], round_: int) -> str:
    """Where the time of a round went."""
    parts = by_round(stages.values())[round_]
    shown = ", ".join(f"{part} {duration(seconds)}" for part, seconds in parts.items())
    return f"Time of round {round_}: {duration(sum(parts.values()))} ({shown})"


def _driver_fact(path: Path, lines: list[Line]) -> str:
    pid, alive = driver(path)
    unfinished = [line.name for line in lines if line.state != "done"]
    if not unfinished:
        return "Driver: the run is complete"
    if at := ended(path, "stopped"):
        return f"Driver: stopped at {at}; run the same command again to go on"
    if error := ended(path, "error"):
        return f"Driver: ended with an error: {error}"
    if stage := ended(path, "until"):
        return f"Driver: ended after {stage}, as --until said; the same command without it goes on"
    if alive:
        return f"Driver: process {pid} is alive"
    if host := elsewhere(path):
        return f"Driver: process {pid} on {host}; whether it is at work cannot be seen from here"
    return f"Driver: process {pid} is not alive on this machine; {_cut(lines)}run the same command again to go on"


def _cut(lines: list[Line]) -> str:
    names = [line.name for line in lines if line.state == "cut off"]
    return f"{names[0]} was cut off; " if names else ""

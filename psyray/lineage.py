"""Where a model comes from: every stage behind it, from the export back to the client speeches.

    psyray lineage runs/demo                     the champion of a run
    psyray lineage 3f2a9c0e1b77 --runs runs      an id that a served answer carries in `X-Psyray-Id`
    psyray lineage psyray-policy@champion        a name in MLflow's registry

Read from the stages' manifests alone: each names its inputs by fingerprint, and a policy those that it went on from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from psyray.errors import PsyrayError
from psyray.files import read_json
from psyray.in_words import key_numbers, number, people
from psyray.mlflow_client import registered
from psyray.origin import ORIGIN, origin
from psyray.run import Artifact, find_run, read_stages, stage_folders
from psyray.status import round_numbers
from psyray.times import round_of

SHOWN = 12  # characters of a fingerprint
NAMES = ("champion", "policy", "reference")  # settings that may name a policy's stage


@dataclass(frozen=True)
class Place:
    """A stage and the run that it stands in."""

    run: Path
    stage: Artifact


def find(model: str, runs: Path, tracking: str) -> Place:
    """The stage that a run folder, a model folder, an id or a registered name means; PsyrayError if there is none."""
    return in_runs(model, runs) or in_registry(model, tracking)


def in_runs(model: str, runs: Path) -> Place | None:
    """The stage that a run folder, a model folder or an id means; None for a registered name."""
    given = Path(model).expanduser()
    for path in (find_run(given), given.absolute()):  # a run lies under $PSYRAY_HOME, a model's folder may lie here
        if path.exists():
            return _at(path)
    if re.fullmatch(r"[0-9a-f]{6,}", model):
        return _by_fingerprint(model, sorted(file.parent for file in runs.glob("*/run.json")), f"the runs in {runs}")
    return None


def in_registry(model: str, tracking: str) -> Place:
    """The stage that a registered name means; PsyrayError if there is none."""
    tags = registered(tracking, model)
    if not {"run", "psyray.fingerprint"} <= set(tags):
        raise PsyrayError(f"{model} was not registered by psyray: it names no run")
    return _by_fingerprint(tags["psyray.fingerprint"], [Path(tags["run"])], f"{tags['run']}, where {model} was made")


def _at(path: Path) -> Place:
    """The stage that a path lies in, or the export of the run that it is."""
    if (path / "run.json").exists():
        stages = {stage.name: stage for stage in read_stages(path)}
        if "export" not in stages:
            raise PsyrayError(f"the run at {path} is not finished (no export); see `psyray status {path}`")
        return Place(path, stages["export"])
    if (path / ORIGIN).exists():
        known = origin(path)
        return _by_fingerprint(known["fingerprint"], [Path(known["run"])], f"{known['run']}, where {path} was made")
    for folder in (path, *path.parents):
        if (folder / "manifest.json").exists():
            stage = _read(folder)
            if run := next((parent.parent for parent in folder.parents if parent.name == "stages"), None):
                return Place(run, stage)
    raise PsyrayError(f"{path} is neither a run folder nor in the folder of a finished stage")


def _by_fingerprint(prefix: str, runs: list[Path], where: str) -> Place:
    found = [(run, folder) for run in runs for folder in stage_folders(run, f"{prefix}*")]
    if not found:
        raise PsyrayError(f"no stage {prefix} in {where}; --runs names the folder that holds the run folders")
    if len({folder.name for _, folder in found}) > 1:
        raise PsyrayError(f"{prefix} is the start of {len(found)} fingerprints in {where}; give more of it")
    run, folder = found[0]
    return Place(run, _read(folder))


def _read(folder: Path) -> Artifact:
    manifest = read_json(folder / "manifest.json", "stage", "fingerprint", "config", "inputs", "stats")
    return Artifact(manifest["stage"], folder, manifest["fingerprint"], manifest)


def parents(place: Place) -> list[Place]:
    """The stages that a stage was made from: its inputs, and the policies that its settings name."""
    manifest = place.stage.manifest
    named = [str(manifest["config"].get(key)) for key in NAMES]
    wanted = dict.fromkeys([*named, *manifest["inputs"].values()])
    made = [name for name in wanted if re.fullmatch(r"[0-9a-f]+", name)]  # a start policy is named by folder or hub id
    return [Place(place.run, _read(folder)) for name in made for folder in stage_folders(place.run, name)]


def ancestry(place: Place) -> dict[str, Place]:
    """The stage and all that it was made from, by fingerprint, each after what it was made from."""
    found: dict[str, Place] = {}

    def walk(here: Place) -> None:
        if here.stage.fingerprint in found:
            return
        for parent in parents(here):
            walk(parent)
        found[here.stage.fingerprint] = here

    walk(place)
    return found


def facts(place: Place) -> dict[str, Any]:
    """The stage, what it comes down to, and every stage behind it, as plain data."""
    behind = ancestry(place)
    listed = [
        {
            "stage": here.stage.name,
            "fingerprint": here.stage.fingerprint,
            "finished": here.stage.manifest["finished"],
            "rows": here.stage.manifest["rows"],
            "numbers": key_numbers(here.stage.name, here.stage.stats),
            "made_from": [parent.stage.fingerprint for parent in parents(here)],
        }
        for here in behind.values()
    ]
    settings = [here.stage.manifest["config"] for here in behind.values()]
    return {
        "run": str(place.run),
        "stage": place.stage.name,
        "fingerprint": place.stage.fingerprint,
        "rounds": round_numbers(here.stage.name for here in behind.values()),
        "judges": sorted({str(config["judge"]) for config in settings if config.get("judge")}),
        "rubrics": sorted({str(config["rubric"]) for config in settings if config.get("rubric")}),
        "responders": sorted({name for config in settings for name in config.get("responders") or ()}),
        "oracles": [oracle(here.stage) for here in behind.values() if here.stage.name.endswith("/labels")],
        "labels_bought": sum(
            int(h.stage.stats.get("bought") or 0) for h in behind.values() if "/labels" in h.stage.name
        ),
        "stages": listed,
    }


def oracle(labels: Artifact) -> dict[str, Any]:
    """Who labelled a round's pairs: the kind, and of experts how many people; their names are nobody's business."""
    config, stats = labels.manifest["config"], labels.stats
    kind = next((kind for kind in ("experts", "replay") if kind in config), "judge")
    told = {"round": round_of(labels.name), "kind": kind, "noisy": "noise" in config}
    if kind == "experts":
        by_judge = (stats.get("by_judge") or {}).get("asked", 0)
        told |= {"people": (stats.get("experts") or {}).get("people", 0), "by_judge": by_judge}
    return told


def oracle_words(told: dict[str, Any]) -> str:
    """The same for people."""
    words = f"noisy {told['kind']}" if told["noisy"] else str(told["kind"])
    if told["kind"] == "experts":
        by_judge = f", {told['by_judge']} by the judge" if told["by_judge"] else ""
        words += f" ({people(told['people'])}{by_judge})"
    return f"{words} in round {told['round']}"


def show(known: dict[str, Any], console: Console) -> None:
    """The facts for people: what matters in lines, then each stage over those it was made from, told once."""
    console.print(Text(f"{known['stage']} {known['fingerprint'][:SHOWN]} of {known['run']}"))
    for key in ("rounds", "judges", "rubrics", "responders"):
        console.print(Text(f"{key + ':':12}{', '.join(map(str, known[key])) or 'none'}"))
    console.print(Text(f"{'oracles:':12}{', '.join(map(oracle_words, known['oracles'])) or 'none'}"))
    console.print(Text(f"{'labels:':12}{number(known['labels_bought'])} bought in the rounds"))
    by_fingerprint = {entry["fingerprint"]: entry for entry in known["stages"]}
    seen: set[str] = set()

    def grow(fingerprint: str, depth: int) -> None:
        entry = by_fingerprint[fingerprint]
        again = fingerprint in seen
        seen.add(fingerprint)
        words = "as above" if again else ", ".join(filter(None, [entry["numbers"], entry["finished"]]))
        console.print(Text(f"{'   ' * depth}{entry['stage']} {fingerprint[:SHOWN]}  {words}"))
        for parent in () if again else entry["made_from"]:
            grow(parent, depth + 1)

    console.print()
    grow(known["fingerprint"], 0)

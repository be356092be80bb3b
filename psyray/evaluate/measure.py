"""`psyray agreement`: one judge or reward model against one human-labelled set, in a run folder of its own.

The folder lies beside the other runs and shares their ledger and MLflow. The same command again reads what is done.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from psyray.cluster import ray_session
from psyray.config import Config
from psyray.errors import PsyrayError
from psyray.evaluate.agreement import Pair, Ruling, figures
from psyray.evaluate.agreement_report import plot
from psyray.evaluate.labelled import Labelled, load_labelled
from psyray.evaluate.rulings import PURPOSE, Again, judge_rulings, reward_rulings
from psyray.files import write_atomic
from psyray.models import model_identity, resolve_model
from psyray.records import Row, content_id
from psyray.reward.metrics import ALIKE
from psyray.run import Artifact, Folder, Run
from psyray.track import Tracker

RULINGS = pa.schema(
    [
        ("comparison_id", pa.string()),
        ("speech_id", pa.string()),
        ("stratum", pa.string()),
        ("a", pa.string()),
        ("b", pa.string()),
        ("human", pa.string()),
        ("annotators", pa.map_(pa.string(), pa.string())),
        ("verdict", pa.string()),  # null: not asked
        ("margin", pa.float64()),
        ("orders", pa.list_(pa.string())),  # of a judge that compares: with A shown first, with B shown first
        ("again", pa.list_(pa.string())),
        ("error", pa.string()),
    ]
)


@dataclass(frozen=True)
class Request:
    """What is measured against what, and how far it may cost."""

    labelled: Path
    data: Path | None = None
    reward: Path | None = None  # a reward model's folder; none: the configured judge
    heads: Path | None = None
    budget: int | None = None
    again: Again = field(default_factory=Again)
    length_tolerance: float = ALIKE


def measure(config: Config, request: Request, say: Callable[[str], None] = print) -> tuple[dict[str, Any], Path]:
    """The figures, and the folder with agreement.json, agreement.png and the rulings."""
    declared, items, dropped = load_labelled(request.labelled, request.data)
    subject = Reward(config, request) if request.reward else Judged(config, request)
    run = Run(config.run.path.parent / f"agreement-{declared.name}-{subject.id}", say)
    settings = config.model_dump(mode="json") | {"agreement": {"set": declared.name} | subject.identity}

    def make(folder: Folder) -> Mapping[str, Any]:
        pairs = list(zip(items, subject.rulings(run, folder, items), strict=True))
        folder.keep(RULINGS, "comparison_id", map(ruling_row, pairs))
        found = figures(pairs, length_tolerance=request.length_tolerance)
        return {"set": declared.name, "judge_id": subject.id, "dropped": dropped} | found | subject.spent(run)

    with ExitStack() as opened:
        opened.enter_context(run.open(settings))
        tracker = opened.enter_context(Tracker(config.track, run.path, settings, say))
        opened.enter_context(ray_session(config))
        run.on_stage = tracker.stage
        told = subject.identity | {"set": identity(items), "length_tolerance": request.length_tolerance}
        stage = run.stage("agreement", told, [], make)
        for written in write(stage, run.path):
            tracker.artifact(written)
    return stage.stats, run.path


def write(stage: Artifact, folder: Path) -> list[Path]:
    """agreement.json and agreement.png of a finished stage."""
    kept, picture = folder / "agreement.json", folder / "agreement.png"
    write_atomic(kept, json.dumps(stage.stats, indent=1))
    plot(stage.stats, picture)
    return [kept, picture]


def identity(items: list[Labelled]) -> str:
    """Changes with any text or any label of the set."""
    return content_id("labelled set", [(i.comparison_id, i.a, i.human, dict(i.annotators)) for i in items])


def ruling_row(pair: Pair) -> Row:
    """A RULINGS row."""
    item, ruling = pair
    return {
        "comparison_id": item.comparison_id,
        **{name: getattr(item, name) for name in ("speech_id", "stratum", "a", "b", "human", "annotators")},
        **{name: getattr(ruling, name) for name in ("verdict", "margin", "orders", "again", "error")},
    }


class Judged:
    """The configured judge or panel as what is measured."""

    def __init__(self, config: Config, request: Request) -> None:
        from psyray.pipeline import open_desk

        self.request, self._desk = request, open_desk(config, Run(config.run.path))

    @property
    def id(self) -> str:
        """The judge's id in the ledger, and whether it compares."""
        return self._desk.judge.id + ("-pairwise" if self._desk.section.form == "pairwise" else "")

    @property
    def identity(self) -> dict[str, Any]:
        """What the rulings depend on beside the set."""
        again = self.request.again
        asked = {"budget": self.request.budget, "repeats": again.times, "of": again.comparisons if again.times else 0}
        return self._desk.labels_identity | asked

    def rulings(self, run: Run, folder: Folder, items: list[Labelled]) -> list[Ruling]:
        """Bought within the budget."""
        desk = replace(self._desk, run_id=str(run.path))
        return judge_rulings(folder, desk, items, budget=self.request.budget, again=self.request.again)

    def spent(self, run: Run) -> dict[str, Any]:
        """What the ledger says of this set and judge."""
        summary = self._desk.ledger.summary(str(run.path))
        return {"ledger": next((dict(row) for row in summary if row["purpose"] == PURPOSE), {})}


class Reward:
    """A reward model's folder, with or without an ensemble of heads, as what is measured."""

    def __init__(self, config: Config, request: Request) -> None:
        self.config, self.request = config, request
        self.model = Path(resolve_model(str(request.reward)))
        if request.heads and not request.heads.is_file():
            raise PsyrayError(f"no heads at {request.heads}; a run's are in RUN/stages/.../heads.npz")

    @property
    def id(self) -> str:
        """Names the model's files and the heads'."""
        return f"reward-{content_id(self._model)}"

    @property
    def identity(self) -> dict[str, Any]:
        """What the rulings depend on beside the set."""
        again = self.request.again
        return self._model | {"repeats": again.times, "of": again.comparisons if again.times else 0}

    @property
    def _model(self) -> dict[str, Any]:
        heads = self.request.heads
        state = (str(heads.absolute()), heads.stat().st_size, heads.stat().st_mtime_ns) if heads else None
        max_length = self.config.reward.train.max_length
        return {"reward": model_identity(str(self.model)), "heads": state, "max_length": max_length}

    def rulings(self, run: Run, folder: Folder, items: list[Labelled]) -> list[Ruling]:
        """Computed; nothing is bought."""
        return reward_rulings(
            folder, self.config, items, model=self.model, heads=self.request.heads, again=self.request.again
        )

    def spent(self, run: Run) -> dict[str, Any]:
        """Nothing."""
        return {}

"""MLflow behind one small interface: what ran, with which settings, and what came out.

    with Tracker(config.track, run.path, config.model_dump(mode="json")) as tracker:
        run.on_stage = tracker.stage
        ...
        tracker.register("psyray-policy", policy.model, alias="champion", tags={"fingerprint": policy.fingerprint})

One MLflow run per psyray run, one nested run per stage. RUN/mlflow.json remembers their ids, so that the same
command again goes on in the same MLflow runs. Numbers, settings, ids and model files go there; no row ever does.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self

from psyray.addresses import redact
from psyray.errors import PsyrayError
from psyray.files import write_atomic
from psyray.mlflow_client import alone, answers_soon, client_at, is_server, plainly, tracking_uri
from psyray.models import model_identity
from psyray.run import Artifact
from psyray.sections.place import TrackSection
from psyray.times import by_round, round_of, spent

Point = tuple[str, float, int]  # name, value, step
_SECRET = re.compile(r"(api|access|private)_?key|passw|secret|credential|authorization|bearer|(^|[_-])token$", re.I)
_METRIC_NAME = re.compile(r"[^\w\-. /]")


def public(tree: Any) -> Any:
    """The settings without the keys that look like secrets."""
    if isinstance(tree, Mapping):
        return {str(k): public(v) for k, v in tree.items() if not _SECRET.search(str(k))}
    if isinstance(tree, list | tuple):
        return [public(v) for v in tree]
    return redact(str(tree)) if isinstance(tree, str | Path) else tree


def parameters(tree: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, str]]:
    """The settings as flat (dotted name, value) pairs, values cut to 500 characters."""
    for key, value in tree.items():
        name = f"{at}{key}"
        if isinstance(value, Mapping):
            yield from parameters(value, f"{name}.")
        elif name and value is not None:
            yield _METRIC_NAME.sub("_", name)[:250], str(value)[:500]


def numbers(stats: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers in the stats as flat (name/with/slashes, value) pairs; texts and lists are left out."""
    for key, value in stats.items():
        name = _METRIC_NAME.sub("_", f"{at}{key}")[:250]
        if isinstance(value, Mapping):
            yield from numbers(value, f"{name}/")
        elif isinstance(value, bool | int | float) and math.isfinite(value):
            yield name, float(value)


def series(stats: Mapping[str, Any]) -> Iterator[Point]:
    """The training curves in `stats["steps"]` as (name, value, step)."""
    for place, entry in enumerate(stats.get("steps") or []):
        step = int(entry.get("step", place))
        for name, value in numbers({k: v for k, v in entry.items() if k != "step"}):
            yield name, value, step


class Tracker:
    """The MLflow run of one psyray run; a context manager whose exit says how the run ended."""

    def __init__(
        self, section: TrackSection, run_folder: Path, config: Mapping[str, Any], say: Callable[[str], None] = print
    ) -> None:
        self.section, self.folder, self.config, self.say = section, run_folder.absolute(), config, say
        self.uri = tracking_uri(section, run_folder)
        self.run_id = self._experiment_id = ""
        self._nested: dict[str, str] = {}  # stage fingerprint -> id of its finished nested run
        self._passed: list[Artifact] = []  # the rounds' stages of this pass
        self._client: Any = None

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        with plainly(self.uri), answers_soon(self.uri), alone(self.uri):
            self._client = client_at(self.uri)
            self._experiment_id = self._experiment()
        with plainly(self.uri):
            self._open()
        self.say(f"MLflow: run {self.run_id} at {redact(self.uri)}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            with plainly(self.uri):
                self._client.set_terminated(self.run_id, "FINISHED")
            return
        # The run's own error matters more than a tracking server that is gone as well.
        with suppress(Exception), answers_soon(self.uri):
            self._client.set_terminated(self.run_id, "FAILED" if issubclass(kind, Exception) else "KILLED")

    def _experiment(self) -> str:
        name = self.section.experiment
        found = self._client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage == "deleted":
            raise PsyrayError(f"the MLflow experiment {name!r} was deleted; restore it or set track.experiment")
        if found is not None:
            return str(found.experiment_id)
        # A server keeps its own artifacts; with a database alone they would land in the current folder.
        here = None if is_server(self.uri) else (self.folder.parent / "mlartifacts").as_uri()
        self._unless_there(lambda: self._client.create_experiment(name, artifact_location=here))
        return str(self._client.get_experiment_by_name(name).experiment_id)

    def _open(self) -> None:
        kept = self.folder / "mlflow.json"
        state = json.loads(kept.read_text()) if kept.exists() else {}
        if state and self._exists(state["run_id"]):
            self.run_id, self._nested = state["run_id"], state["stages"]
            self._client.update_run(self.run_id, status="RUNNING")
        else:
            if state:
                self.say(f"MLflow run {state['run_id']} is not at {redact(self.uri)} any more: a new one is opened")
            tags = {"psyray.run": self.folder.name}
            self.run_id = self._client.create_run(self._experiment_id, tags=tags, run_name=self.folder.name).info.run_id
            self._remember()
        self._log(self._client.get_run(self.run_id), self.config)
        self._client.log_dict(self.run_id, public(self.config), "config.yaml")

    def _exists(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:  # tolerated: the id belongs to another server, or was removed from this one
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _remember(self) -> None:
        state = {"uri": redact(self.uri), "run_id": self.run_id, "stages": self._nested}
        write_atomic(self.folder / "mlflow.json", json.dumps(state, indent=1))

    def stage(self, artifact: Artifact) -> None:
        """Note a finished stage in a nested run; the same fingerprint again does nothing."""
        if spent(artifact):
            self._passed.append(artifact)
        if artifact.fingerprint in self._nested:
            return
        # The manifest's own time makes a point that is sent twice the same point.
        end = _milliseconds(artifact.manifest["finished"])
        points = [(name, value, 0) for name, value in numbers(artifact.stats)]
        points += [*series(artifact.stats), ("rows", float(artifact.manifest["rows"]), 0)]
        with plainly(self.uri):
            run = self._cut_off(artifact) or self._nest(artifact, end)
            self._log(run, artifact.manifest["config"], points, end)
            if artifact.manifest["files"]:
                self._data_set(run.info.run_id, artifact)
            self._overview(artifact, end)
            self._client.set_terminated(run.info.run_id, "FINISHED", end_time=end)
        self._nested[artifact.fingerprint] = run.info.run_id
        self._remember()

    def _cut_off(self, artifact: Artifact) -> Any:
        """The nested run that an interrupted call for the same stage began, or None."""
        query = f"tags.`mlflow.parentRunId` = '{self.run_id}' and tags.`psyray.fingerprint` = '{artifact.fingerprint}'"
        return next(iter(self._client.search_runs([self._experiment_id], query, max_results=1)), None)

    def _nest(self, artifact: Artifact, end: int) -> Any:
        tags = {
            "mlflow.parentRunId": self.run_id,
            "psyray.stage": artifact.name,
            "psyray.fingerprint": artifact.fingerprint,
        }
        if (number := round_of(artifact.name)) is not None:
            tags["psyray.round"] = str(number)
        start = end - int(1000 * float(artifact.manifest["seconds"]))
        return self._client.create_run(self._experiment_id, start_time=start, tags=tags, run_name=artifact.name)

    def _log(self, run: Any, config: Mapping[str, Any], points: Sequence[Point] = (), at: int = 0) -> None:
        """Settings and numbers, in as few requests as MLflow's limits allow.

        A setting that differs from what the run holds already (MLflow's params are final) becomes a tag.
        """
        from mlflow.entities import Metric, Param, RunTag

        known, wanted = run.data.params, dict(parameters(public(config)))
        params = [Param(k, v) for k, v in wanted.items() if k not in known]
        tags = [RunTag(f"changed.{k}", v) for k, v in wanted.items() if known.get(k, v) != v]
        metrics = [Metric(name, value, at, step) for name, value, step in points]
        for m, p, t in zip_longest(_cut(metrics, 800), _cut(params, 100), _cut(tags, 100), fillvalue=()):
            self._client.log_batch(run.info.run_id, metrics=m, params=p, tags=t)

    def _data_set(self, run_id: str, artifact: Artifact) -> None:
        """Name the stage's rows as an input data set: name, fingerprint, place and count, never content."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        place, count = json.dumps({"uri": str(artifact.path)}), json.dumps({"num_rows": artifact.manifest["rows"]})
        entity = Dataset(artifact.name, artifact.fingerprint, "local", place, profile=count)
        self._client.log_inputs(run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", "result")])])

    def _overview(self, artifact: Artifact, at: int) -> None:
        """The rounds' own numbers and seconds in the parent run, with the round as step: a curve over the rounds."""
        if not (known := spent(artifact)):
            return
        from mlflow.entities import Metric

        found = re.fullmatch(r"round-\d+/(gate|labels|heads)", artifact.name)
        named = [(f"{found[1]}/{name}", value) for name, value in numbers(artifact.stats)] if found else []
        so_far = by_round(self._passed)[known[0]]  # a round's later stages raise the same point
        named += [(f"seconds/{part.replace(' ', '_')}", so_far[part]) for part in known[1]]
        self._client.log_batch(self.run_id, metrics=[Metric(name, value, at, known[0]) for name, value in named])

    def points(self, points: Sequence[Point], at: int) -> None:
        """Note numbers of the run itself; `at` is their time in milliseconds."""
        with plainly(self.uri):
            self._log(self._client.get_run(self.run_id), {}, points, at)

    def artifact(self, path: Path) -> None:
        """Keep a copy of one file, such as a figure, in the run's artifacts."""
        with plainly(self.uri):
            self._client.log_artifact(self.run_id, str(path))

    def text(self, text: str, name: str) -> None:
        """Keep a text, such as the report without quotations, as a file in the run's artifacts."""
        with plainly(self.uri):
            self._client.log_text(self.run_id, text, name)

    def register(
        self, name: str, model_dir: Path, alias: str | None = None, tags: Mapping[str, str] | None = None
    ) -> str:
        """Put a model folder into the registry and return its version; the same model again keeps its version.

        `tags["fingerprint"]` says what the same model is; without it the folder's path, file sizes and times do.
        Beside a database the version points at the folder and nothing is copied, so `models:/NAME@ALIAS` is that
        folder; a tracking server takes no outside folders, so there the files are uploaded, once.

        `alias` goes to a new version, or to one of a model that has none under it yet: where it was moved on purpose,
        the same command again leaves it there.
        """
        if not model_dir.is_dir():
            raise PsyrayError(f"cannot register {name}: there is no model folder {model_dir}")
        identity = (tags or {}).get("fingerprint") or model_identity(str(model_dir)).rpartition("#")[2]
        with plainly(self.uri):
            self._unless_there(lambda: self._client.create_registered_model(name))
            known = self._version(name, identity, model_dir)
            version = known or self._add_version(name, identity, model_dir, tags or {})
            if alias:
                self._point(alias, name, version, new=not known)
        return version

    def _point(self, alias: str, name: str, version: str, *, new: bool) -> None:
        held = self._client.get_registered_model(name).aliases.get(alias)
        if new or held is None:
            self._client.set_registered_model_alias(name, alias, version)
        elif str(held) != version:
            where = f"--tracking-uri {self.section.uri}" if self.section.uri else f"--runs {self.folder.parent}"
            self.say(
                f"{name}: version {held} stays {alias}, since this run's version {version} was registered before; to "
                f"change that: psyray promote {name}/{version} {where}"
            )

    def _unless_there(self, create: Callable[[], object]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            create()
        except MlflowException as error:  # tolerated: an earlier call, or another run at the same time, made it
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _version(self, name: str, identity: str, model_dir: Path) -> str | None:
        found = self._client.search_model_versions(f"name = '{name}' and tags.`psyray.fingerprint` = '{identity}'")
        # Another run's folder with the same model may be gone, so a version that points at a folder must be ours.
        same = [v for v in found if is_server(self.uri) or v.source == model_dir.absolute().as_uri()]
        return str(same[0].version) if same else None

    def _add_version(self, name: str, identity: str, model_dir: Path, tags: Mapping[str, str]) -> str:
        run_id = self._nested.get(identity, self.run_id)
        source = model_dir.absolute().as_uri()
        if is_server(self.uri):
            self.say(f"{name}: uploading {model_dir} to {redact(self.uri)}")
            self._client.log_artifacts(run_id, str(model_dir), f"models/{identity}")
            source = f"{self._client.get_run(run_id).info.artifact_uri}/models/{identity}"
        labels = {"psyray.run": self.folder.name, **tags, "psyray.fingerprint": identity}
        made = self._client.create_model_version(name, source, run_id, tags=labels)
        return str(made.version)


def _cut(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _milliseconds(moment: str) -> int:
    return int(datetime.fromisoformat(moment).timestamp() * 1000)

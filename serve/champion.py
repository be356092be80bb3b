"""What to serve: the words given to `serve run`, and the champion of MLflow's registry or of a finished run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from psyray.addresses import refuse_registry_secret
from psyray.errors import PsyrayError, hint
from psyray.homes import no_run
from psyray.models import resolve_model
from psyray.run import find_run, followed
from psyray.sections.data import EngineSection
from serve.access import Bounds, Limits
from serve.direct import Address
from serve.ear import Ask

Model = TypeVar("Model", bound=BaseModel)
CHAMPION = "champion.json"
_NAME = re.compile(r"[\w.-]{1,64}")
REGISTRY_S = 30.0  # between two looks at the registry


class Words(BaseModel):
    """The key=value words after `serve run APPLICATION`, or `args:` in a Serve configuration file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    usage: ClassVar[str]

    @classmethod
    def read(cls, words: Mapping[str, Any]) -> Self:
        """PsyrayError names an unknown word and the nearest known one, a missing run, or a value that cannot be."""
        known = list(dict.fromkeys((*cls.__annotations__, *cls.model_fields)))  # its own before what it shares
        for word in words:
            if word not in known:
                raise PsyrayError(f"unknown argument {word!r}; {hint(word, known)}")
        if cls.model_fields["run"].is_required() and not words.get("run"):
            raise PsyrayError(f"no run given; say which one: {cls.usage}")
        return checked(cls, dict(words), "serve")


@dataclass(frozen=True)
class Replicas:
    """How many of a deployment: a number, or the least and the most."""

    least: int = 1
    most: int = 1

    @classmethod
    def parse(cls, words: Any) -> Any:
        """From `2` or `1-4`; ValueError for what is neither."""
        if isinstance(words, Replicas):
            return words
        least, _, most = str(words).partition("-")
        if not least.isdigit() or not (most or least).isdigit() or not 1 <= int(least) <= int(most or least):
            raise ValueError("a number of replicas is 2, or 1-4 for the least and the most")
        return cls(int(least), int(most or least))

    def options(self, ongoing: int, up_after_s: float, down_after_s: float) -> dict[str, Any]:
        """Ray Serve's options; `ongoing` is how many requests a replica should have under way."""
        if self.least == self.most:
            return {"num_replicas": self.least}
        scaling = {"min_replicas": self.least, "max_replicas": self.most, "target_ongoing_requests": ongoing}
        return {"autoscaling_config": scaling | {"upscale_delay_s": up_after_s, "downscale_delay_s": down_after_s}}


class Args(Words, Bounds):
    """The words of `serve.app:build`."""

    usage = "serve run serve.app:build [run=RUN]"

    run: Path | None = Field(None, description="a finished run, its folder or URI; none: the registry's `model`")
    model: str = Field("psyray-policy@champion", description="in MLflow's registry: NAME@ALIAS or NAME/VERSION")
    runs: Path = Field(Path("runs"), description="the folder of run folders, beside which the registry lies")
    tracking: str | None = Field(
        None, description="MLflow's URI, without a password; none: MLFLOW_TRACKING_URI, else SQLite in `runs`"
    )
    follow_s: float | None = Field(
        None, ge=1, description="seconds between looks for a new champion; none: 30 for the registry, never for a run"
    )
    rounds: str = Field("", description="further policies of the champion's run: all, or their numbers: 0,1")
    beside: dict[str, str] = Field(
        default_factory=dict, description="further policies: NAME=FOLDER[,NAME=FOLDER], models or LoRA adapters"
    )
    replicas: Replicas = Field(Replicas(), description="of an engine: 1, or for autoscaling 1-4")
    ongoing: int = Field(32, ge=1, description="requests that an engine's replica should have when scaling")
    reward_replicas: Replicas = Field(Replicas(), description="of the reward model, as `replicas`")
    reward_ongoing: int = Field(32, ge=1, description="as `ongoing`, of the reward model")
    up_after_s: float = Field(30, ge=0, description="seconds of more to do before a replica is added")
    down_after_s: float = Field(600, ge=0, description="seconds of less to do before a replica is taken away")
    reward: bool = Field(True, description="false: only the policy")
    device: Literal["auto", "cpu", "gpu"] = "auto"
    reward_gpus: float = Field(0, ge=0, le=1, description="GPU share of the reward model; 0: it runs on CPU")
    keys: Path | None = Field(None, description="file of keys (serve/access.py); none: PSYRAY_KEYS, else an open port")
    guard: Literal["reply", "mark"] = Field("reply", description="what a client in a crisis gets (serve/guard.py)")
    replies: Path | None = Field(None, description="file of those replies by locale; none: the shipped ones")
    ask: str | None = Field(None, description="URL ending in /v1: who else is asked about a crisis (serve/ear.py)")
    ask_model: str = Field("", description="the model's name there")
    ask_key_env: str = Field("", description="the environment variable with that endpoint's key; none: it needs none")
    ask_timeout_s: float = Field(5, gt=0, description="how long its answer may take")
    ask_failed: Literal["flag", "pass"] = Field("pass", description="what becomes of words that it did not answer on")
    timeout_s: float = Field(300, gt=0, description="how long an answer, or each piece of a stream, may take")
    direct: Address | None = Field(None, description="PORT or HOST:PORT that is answered without Serve's proxy")
    log_text: Path | None = Field(None, description="folder that words and answers are written into; none: nowhere")

    @field_validator("replicas", "reward_replicas", mode="before")
    @classmethod
    def _count(cls, words: Any) -> Any:
        return Replicas.parse(words)

    @field_validator("direct", mode="before")
    @classmethod
    def _address(cls, words: Any) -> Any:
        return Address.parse(words) if isinstance(words, (str, int)) else words

    @field_validator("tracking")
    @classmethod
    def _no_secret(cls, uri: str | None) -> str | None:
        if uri:
            refuse_registry_secret("tracking", uri)
        return uri

    @field_validator("beside", mode="before")
    @classmethod
    def _by_name(cls, words: Any) -> Any:
        if not isinstance(words, str):
            return words
        pairs = [word.strip().partition("=") for word in words.split(",") if word.strip()]
        if wrong := [name for name, _, place in pairs if not place or not _NAME.fullmatch(name)]:
            raise ValueError(f"expected NAME=FOLDER[,NAME=FOLDER], names of letters, digits and . _ -; {wrong[0]!r}")
        return {name: place for name, _, place in pairs}

    def settled(self) -> Self:
        """The words with every folder absolute, so that they mean the same in another process."""
        places = {name: Path(place).expanduser() for name, place in self.beside.items()}
        beside = {name: str(p.absolute()) if p.exists() else self.beside[name] for name, p in places.items()}
        run = find_run(self.run, "all") if self.run else None
        if self.run and run and not run.is_dir():
            raise PsyrayError(f"{no_run(self.run)}; give the folder of a finished run")
        log_text = self.log_text.expanduser().absolute() if self.log_text else None
        settled = {"run": run, "runs": find_run(self.runs), "beside": beside, "log_text": log_text}
        return self.model_copy(update=settled)

    @property
    def limits(self) -> Limits:
        """What the port takes."""
        return Limits.model_validate(self.model_dump(include=set(Bounds.model_fields)))

    @property
    def ear(self) -> Ask | None:
        """Whom to ask about a crisis beside the phrases; PsyrayError where that is not said well."""
        if self.ask is None and self.ask_model:
            raise PsyrayError(f"ask_model={self.ask_model} without ask: say at which URL the model is asked")
        more = {"timeout_s": self.ask_timeout_s, "failed": self.ask_failed}
        return None if self.ask is None else Ask.of(self.ask, self.ask_model, self.ask_key_env, **more)

    @property
    def looks_every_s(self) -> float | None:
        """Seconds between two looks for a new champion; None: never."""
        return self.follow_s if self.follow_s or self.run else REGISTRY_S


class Policy(BaseModel):
    """The language model that answers, and the sampling for a client that names none."""

    name: str
    path: str
    round: int
    system: str = ""
    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int = 96
    stop: list[str] = Field(default_factory=list)


class Reward(BaseModel):
    """The model that scores an answer; `heads` is none for a single head."""

    name: str
    path: str
    heads: Path | None = None
    max_length: int = 512


class Champion(BaseModel):
    """RUN/champion.json: the best policy of a finished run and the reward model that ranked it."""

    policy: Policy
    reward: Reward
    run: Path
    id: str = ""  # of the export that it came from; `psyray lineage` knows it
    reward_id: str = ""  # of the reward model's, where the registry names another


def find_champion(asked: Args, tracking: str) -> Champion:
    """What the words ask for: the run's champion, or the one that the registry at `tracking` names now."""
    if asked.run:
        return read_champion(asked.run, reward=asked.reward)
    champion = _registered(asked.model, asked, tracking)
    alias = asked.model.partition("@")[2]
    if asked.reward and alias:  # who changes the policy's alias alone keeps the reward model that there is
        other = _registered(f"psyray-reward@{alias}", asked, tracking)
        champion.reward, champion.reward_id = other.reward, other.id
    return champion


def _registered(model: str, asked: Args, tracking: str) -> Champion:
    from psyray.lineage import find

    place = find(model, asked.runs, tracking)
    if place.stage.name != "export":
        raise PsyrayError(f"{model} is the stage {place.stage.name} of {place.run}, not a champion that a run exported")
    return _read(place.stage.path / CHAMPION, place.run, reward=asked.reward)


def read_champion(run: Path, *, reward: bool = True) -> Champion:
    """The champion of a run, its files checked; PsyrayError names what is missing and the command that mends it.

    A run folder that was moved as a whole is still found: paths inside it follow the folder. Without `reward` the
    reward model's files need not be there.
    """
    folder = find_run(run)
    mend = f"finish it with `psyray run CONFIG run.path={folder}`"
    if not folder.is_dir():
        raise PsyrayError(f"no run folder at {folder}; give the folder of a finished run, or {mend}")
    if not (folder / CHAMPION).is_file():
        raise PsyrayError(f"the run at {folder} is not finished (no {CHAMPION}); {mend}")
    return _read(folder / CHAMPION, folder, reward=reward)


def _read(file: Path, folder: Path, *, reward: bool) -> Champion:
    try:
        tree = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        mend = f"finish it with `psyray run CONFIG run.path={folder}`"
        raise PsyrayError(f"{file} is no JSON ({error}); {mend}") from error
    champion = checked(Champion, tree, str(file))
    models: list[Policy | Reward] = [champion.policy, *([champion.reward] if reward else [])]
    for model in models:
        # A policy that no round improved is the one that the run began with: a hub id or the embedded model.
        absolute = Path(model.path).is_absolute()
        model.path = resolve_model(str(_follow(Path(model.path), champion.run, folder)) if absolute else model.path)
    if reward and champion.reward.heads:
        champion.reward.heads = _follow(champion.reward.heads, champion.run, folder)
    champion.run, champion.reward_id = folder, champion.id
    return champion


def read_engine(run: Path) -> EngineSection:
    """The engine settings that the run worked with; the defaults where it kept none."""
    file = run / "config.yaml"
    tree = yaml.safe_load(file.read_text()) if file.is_file() else {}
    return checked(EngineSection, (tree or {}).get("engine") or {}, f"{file}: engine")


def checked(model: type[Model], tree: Any, where: str) -> Model:
    """The tree as the model; PsyrayError with every field that is wrong."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise PsyrayError(f"{where}: {wrong}") from error


def _follow(path: Path, written_in: Path, folder: Path) -> Path:
    found = followed(path, written_in, folder)
    if not found.exists():
        raise PsyrayError(f"{found} is gone, but {folder / 'champion.json'} names it; put it back or run again")
    return found

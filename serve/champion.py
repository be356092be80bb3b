"""What to serve: the words given to `serve run`, and the champion that a finished run left behind."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from psyray.errors import PsyrayError
from psyray.models import resolve_model
from psyray.run import followed, run_path
from psyray.sections.data import EngineSection

Model = TypeVar("Model", bound=BaseModel)


class Words(BaseModel):
    """The key=value words after `serve run APPLICATION`, or `args:` in a Serve configuration file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    usage: ClassVar[str]

    @classmethod
    def read(cls, words: Mapping[str, str]) -> Self:
        """PsyrayError names an unknown word and the nearest known one, a missing run, or a value that cannot be."""
        known = list(cls.model_fields)
        for word in words:
            if word not in known:
                near = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                raise PsyrayError(f"unknown argument {word!r}; {hint}")
        if not words.get("run"):
            raise PsyrayError(f"no run given; say which one: {cls.usage}")
        return _checked(cls, dict(words), "serve")


class Args(Words):
    """The words of `serve.app:build`."""

    usage = "serve run serve.app:build run=RUN"

    run: Path = Field(description="the folder of a finished run")
    reward: bool = Field(True, description="false: only the policy")
    device: Literal["auto", "cpu", "gpu"] = "auto"
    reward_gpus: float = Field(0, ge=0, le=1, description="GPU share of the reward model; 0: it runs on CPU")
    keys: Path | None = Field(None, description="file of keys (serve/access.py); none: PSYRAY_KEYS, else an open port")
    per_minute: int = Field(120, ge=1, description="requests a minute of one key")
    in_flight: int = Field(256, ge=1, description="requests under way at once; one more gets 503")
    guard: Literal["reply", "mark"] = Field("reply", description="what a client in a crisis gets (serve/guard.py)")
    replies: Path | None = Field(None, description="file of those replies by locale; none: the shipped ones")
    timeout_s: float = Field(300, gt=0, description="how long an answer may take")


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


def read_champion(run: Path, *, reward: bool = True) -> Champion:
    """The champion of a run, its files checked; PsyrayError names what is missing and the command that mends it.

    A run folder that was moved as a whole is still found: paths inside it follow the folder. Without `reward` the
    reward model's files need not be there.
    """
    folder = run_path(run)
    mend = f"finish it with `psyray run CONFIG run.path={folder}`"
    if not folder.is_dir():
        raise PsyrayError(f"no run folder at {folder}; give the folder of a finished run, or {mend}")
    file = folder / "champion.json"
    if not file.is_file():
        raise PsyrayError(f"the run at {folder} is not finished (no champion.json); {mend}")
    try:
        tree = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise PsyrayError(f"{file} is no JSON ({error}); {mend}") from error
    champion = _checked(Champion, tree, str(file))
    models: list[Policy | Reward] = [champion.policy, *([champion.reward] if reward else [])]
    for model in models:
        # A policy that no round improved is the one that the run began with: a hub id or the embedded model.
        absolute = Path(model.path).is_absolute()
        model.path = resolve_model(str(_follow(Path(model.path), champion.run, folder)) if absolute else model.path)
    if reward and champion.reward.heads:
        champion.reward.heads = _follow(champion.reward.heads, champion.run, folder)
    champion.run = folder
    return champion


def read_engine(run: Path) -> EngineSection:
    """The engine settings that the run worked with; the defaults where it kept none."""
    file = run / "config.yaml"
    tree = yaml.safe_load(file.read_text()) if file.is_file() else {}
    return _checked(EngineSection, (tree or {}).get("engine") or {}, f"{file}: engine")


def _checked(model: type[Model], tree: Any, where: str) -> Model:
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

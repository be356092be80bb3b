"""Who answers under which name, and the deployments that this takes.

Each engine, and the reward model, is a Serve application of its own, named by the hash of all that it is made of. So
another champion brings its own applications up beside those that answer, what both need stays as it is, and two
server configurations that mean the same thing mean the same applications. Policies that are LoRA adapters of one model
share its engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psyray.cluster import QUIET
from psyray.engines.vllm import adapter_base, is_adapter
from psyray.errors import PsyrayError
from psyray.models import model_identity, resolve_model
from psyray.origin import called
from psyray.records import content_id
from psyray.reward.engine_body import environment
from psyray.reward.ratings import RATINGS
from psyray.run import read_stages
from psyray.sections.data import EngineSection
from psyray.status import read_config
from psyray.times import round_of
from serve.champion import Args, Champion, Policy, Reward, find_champion, read_engine
from serve.policy import engine_settings

BASE = "psyray:base"  # what an engine calls its own model: whose name that is may change under it
CHAMPION_NAME = "champion"  # the name in a request for whoever is champion at that moment


@dataclass(frozen=True)
class Part:
    """One Serve application of one deployment: an engine (`llm`: fields of LLMConfig) or a reward model (`reward`)."""

    app: str
    llm: dict[str, Any] | None = None
    adapters: tuple[tuple[str, str], ...] = ()  # (name, folder)
    reward: dict[str, Any] | None = None
    options: dict[str, Any] | None = None  # of Serve's deployment


@dataclass(frozen=True)
class Served:
    """A policy under the name that a request's `model` carries; `app` answers for it and calls it `called`."""

    policy: Policy
    export: str
    app: str
    called: str

    @property
    def name(self) -> str:
        """What `/v1/models` lists."""
        return self.policy.name


@dataclass(frozen=True)
class Scoring:
    """The reward model that answers."""

    name: str
    export: str
    app: str


@dataclass(frozen=True)
class Lineup:
    """All that one look found: the champion first, further policies, the reward model, and what runs them."""

    models: tuple[Served, ...]
    reward: Scoring | None
    parts: tuple[Part, ...]

    def called(self, name: str | None) -> Served | None:
        """Who answers to the name; the champion where there is none."""
        if name in (None, CHAMPION_NAME):
            return self.models[0]
        return next((served for served in self.models if served.name == name), None)


@dataclass(frozen=True)
class Order:
    """What was asked for, settled where the application was built: names of files and of the registry, nothing read."""

    asked: Args
    tracking: str
    gpus: bool  # whether the cluster has any

    def read(self, owner: str) -> Lineup:
        """The line-up as files and registry are now, for the application `owner`; PsyrayError where that cannot be."""
        champion = find_champion(self.asked, self.tracking)
        engine = read_engine(champion.run)
        device = engine.device if self.asked.device == "auto" else self.asked.device
        gpu = self.gpus if device == "auto" else device == "gpu"
        return lineup(self.asked, champion, engine, owner, gpu=gpu)


def lineup(asked: Args, champion: Champion, engine: EngineSection, owner: str, *, gpu: bool) -> Lineup:
    """The champion and those beside it on as few engines as they need."""
    entries = {champion.policy.name: (champion.policy, champion.id)}
    for policy, export in (*of_rounds(asked.rounds, champion), *beside(asked.beside, champion)):
        known = entries.setdefault(policy.name, (policy, export))[0]
        if policy.name == CHAMPION_NAME or known.path != policy.path:
            raise PsyrayError(f"two policies would answer to the name {policy.name!r}; give one of them another name")
    models, parts = [], {}
    for base, policies in _by_base([policy for policy, _ in entries.values()]).items():
        part = _engine(base, policies, asked, engine, owner, gpu=gpu)
        parts[part.app] = part
        worn = dict(part.adapters)
        models += [
            Served(policy, entries[policy.name][1], part.app, policy.name if policy.name in worn else BASE)
            for policy in policies
        ]
    models.sort(key=lambda served: list(entries).index(served.name))
    scoring = None
    if asked.reward:
        part = _reward(champion.reward, asked, owner)
        parts[part.app] = part
        scoring = Scoring(champion.reward.name, champion.reward_id, part.app)
    return Lineup(tuple(models), scoring, tuple(parts.values()))


def _by_base(policies: Iterable[Policy]) -> dict[str, list[Policy]]:
    """The policies by the model whose engine answers for them."""
    found: dict[str, list[Policy]] = {}
    for policy in policies:
        base = resolve_model(adapter_base(policy.path)) if is_adapter(policy.path) else policy.path
        found.setdefault(base, []).append(policy)
    return found


def _engine(path: str, policies: list[Policy], asked: Args, engine: EngineSection, owner: str, *, gpu: bool) -> Part:
    adapters = tuple((policy.name, policy.path) for policy in policies if is_adapter(policy.path))
    settings = engine_settings(BASE, path, engine, [folder for _, folder in adapters], gpu=gpu)
    # Answers that an engine owes when it is to go are given first.
    settings["deployment_config"] |= {
        "graceful_shutdown_timeout_s": asked.timeout_s,
        **asked.replicas.options(asked.ongoing, asked.up_after_s, asked.down_after_s),
    }
    identities = [model_identity(path), *(model_identity(folder) for _, folder in adapters)]
    return Part(f"{owner}.policy.{content_id(settings, adapters, identities)}", llm=settings, adapters=adapters)


def _reward(reward: Reward, asked: Args, owner: str) -> Part:
    heads = str(reward.heads) if reward.heads else None
    made_of = {"path": reward.path, "heads": heads, "max_length": reward.max_length, "gpus": asked.reward_gpus}
    options = {
        "ray_actor_options": {
            "num_cpus": 0.5,
            "num_gpus": asked.reward_gpus,
            "runtime_env": {"env_vars": QUIET | environment(asked.reward_gpus)},
        },
        "graceful_shutdown_timeout_s": asked.timeout_s,
        **asked.reward_replicas.options(asked.reward_ongoing, asked.up_after_s, asked.down_after_s),
    }
    files = [reward.heads, reward.heads.with_name(RATINGS)] if reward.heads else []
    known = [file.stat() for file in files if file.exists()]
    identities = [model_identity(reward.path), *((stat.st_size, stat.st_mtime_ns) for stat in known)]
    return Part(f"{owner}.reward.{content_id(made_of, options, identities)}", reward=made_of, options=options)


def of_rounds(wanted: str, champion: Champion) -> Iterator[tuple[Policy, str]]:
    """The policies of the champion's run that `rounds=` names, with their ids; round 0 is the start.

    PsyrayError for a round that the run has not.
    """
    if not wanted:
        return
    start = ((read_config(champion.run) or {}).get("policy") or {}).get("model")
    known: dict[int, tuple[str, str]] = {}
    if start:
        folder = resolve_model(start)
        known[0] = (folder, called(start, Path(folder)))
    for stage in read_stages(champion.run):
        if stage.name.endswith("/policy") and (number := round_of(stage.name)) is not None:
            known[number] = (str(stage.model), stage.fingerprint)
    for word in map(str, known) if wanted == "all" else wanted.split(","):
        if not word.strip().isdecimal() or int(word) not in known:
            there = ", ".join(map(str, known)) or "none"
            raise PsyrayError(f"rounds={wanted}: {champion.run} has no round {word!r}; there are {there}, or say all")
        path, export = known[int(word)]
        if int(word) != champion.policy.round:
            update = {"name": f"psyray-round-{int(word)}", "path": path, "round": int(word)}
            yield champion.policy.model_copy(update=update), export


def beside(policies: Mapping[str, str], champion: Champion) -> Iterator[tuple[Policy, str]]:
    """The policies that `beside=` names, sampled as the champion is, with where each came from."""
    for name, place in policies.items():
        path = place if is_adapter(place) else resolve_model(place)
        yield champion.policy.model_copy(update={"name": name, "path": path}), called(place, Path(path))

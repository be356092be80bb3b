"""One tree of settings for a whole run.

A file names what differs from the defaults; `key=value` words on the command line go over the file.
An unknown key is an error that names the nearest key. What a stage's result depends on is part of its
fingerprint; the section `engine` and `cluster` say where and how fast, so changing them re-runs nothing
(`engine.max_model_len` and `engine.dtype` excepted).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError

from psyray.addresses import redact, refuse_secrets
from psyray.errors import PsyrayError, hint
from psyray.sections.data import (
    EngineSection,
    JudgeSection,
    PairsSection,
    PanelSection,
    ResponsesSection,
    RunSection,
    Sampling,
    Section,
    SpeechesSection,
    TopicsSection,
)
from psyray.sections.learning import (
    DpoSection,
    EfficiencySection,
    EvaluateSection,
    LoopSection,
    OracleSection,
    RewardSection,
)
from psyray.sections.place import ClusterSection, LedgerSection, TrackSection


class Config(Section):
    run: RunSection = RunSection()
    speeches: SpeechesSection = SpeechesSection()
    topics: TopicsSection | None = Field(
        None, description="the engine (keys as in `judge`, and file: own topics) that picks them where no column does"
    )
    rubric: str = Field("counselling", description="a name in psyray/assets/rubrics, or a YAML file")
    engine: EngineSection = EngineSection()
    responses: ResponsesSection = ResponsesSection()
    judge: JudgeSection = JudgeSection()
    panel: PanelSection = PanelSection()
    pairs: PairsSection = PairsSection()
    reward: RewardSection = RewardSection()
    policy: Sampling = Sampling()
    dpo: DpoSection = DpoSection()
    loop: LoopSection = LoopSection()
    oracle: OracleSection = OracleSection()
    evaluate: EvaluateSection = EvaluateSection()
    efficiency: EfficiencySection = EfficiencySection()
    track: TrackSection = TrackSection()
    ledger: LedgerSection = LedgerSection()
    cluster: ClusterSection = ClusterSection()

    @property
    def labelling(self) -> list[JudgeSection]:
        """The judges that label: the panel's, with the budget of `judge` where one names none, or `judge` alone."""
        shared = {"budget": self.judge.budget}
        panel = [j if j.budget is not None else j.model_copy(update=shared) for j in self.panel.judges]
        return panel or [self.judge]


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """The configuration of a file with `key.key=value` words over it; PsyrayError names what is wrong and the mend."""
    tree = _read_yaml(Path(path)) if path else {}
    for word in overrides or []:
        _override(tree, word)
    config = checked(tree, f"{path}: " if path else "")
    refuse_secrets(config)
    return config


def checked(tree: Any, where: str = "") -> Config:
    """The configuration that a tree of settings says; PsyrayError, which begins with `where`, names what is wrong."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise PsyrayError(where + "; ".join(_explain(e) for e in error.errors())) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise PsyrayError(f"no configuration file at {path}; see configs/ for examples")
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise PsyrayError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise PsyrayError(f"{path} holds no settings: expected `section:` lines")
    return tree


def _override(tree: dict[str, Any], word: str) -> None:
    key, equals, value = word.partition("=")
    if not equals:
        raise PsyrayError(f"cannot read {word!r}: settings are given as key=value, for example loop.rounds=1")
    *parents, last = key.split(".")
    for name in parents:
        if not isinstance(tree.setdefault(name, {}), dict):
            raise PsyrayError(f"cannot set {key}: {name} is not a section")
        tree = tree[name]
    try:
        tree[last] = yaml.safe_load(value) if value else None
    except yaml.YAMLError as error:
        raise PsyrayError(f"cannot read the value of {word!r}: {error}") from error


def _explain(error: Any) -> str:
    location = [part for part in error["loc"] if isinstance(part, str)]
    dotted = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        got = redact(repr(error["input"]))  # it may be a section with an address in it
        return f"{dotted or 'configuration'}: {error['msg'].removeprefix('Value error, ')} (got {got:.80})"
    elsewhere = _elsewhere(location[-1])
    meant = f"did you mean {elsewhere[0]!r}?" if elsewhere else hint(location[-1], _keys(location[:-1]))
    return f"unknown key {dotted!r}; {meant}"


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section type inside an annotation such as `list[Responder]`."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _keys(path: list[str]) -> list[str]:
    model: type[BaseModel] = Config
    for name in path:
        field = model.model_fields.get(name)
        model = (_section(field.annotation) if field else None) or model
    return list(model.model_fields)


def _elsewhere(key: str) -> list[str]:
    """The full name of a key that was written in the wrong section."""
    return [
        f"{name}.{key}"
        for name, field in Config.model_fields.items()
        if (section := _section(field.annotation)) and key in section.model_fields
    ]

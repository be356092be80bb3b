"""One tree of settings for a whole run.

A file names what differs from the defaults; `key=value` words on the command line go over the file.
An unknown key is an error that names the nearest key. What a stage's result depends on is part of its
fingerprint; the section `engine` and `cluster` say where and how fast, so changing them re-runs nothing
(`engine.max_model_len` and `engine.dtype` excepted).
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from psyray.errors import PsyrayError

EMBEDDED = "embedded:smollm2-135m-instruct"
ASSETS = Path(__file__).parent / "assets"
COUNSELLOR = (
    "You are a counsellor talking with a client. "
    "Tell the client in one or two sentences how you understand what they feel."
)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RunSection(Section):
    path: Path = Field(Path("runs/run"), description="the run folder; a relative one lies under $PSYRAY_HOME or here")
    seed: int = 0


class SpeechesSection(Section):
    path: str | None = Field(None, description="JSONL, CSV or Parquet of client speeches; none: those that ship")
    text_column: str | None = Field(None, description="the column with the client's words; none: recognised")
    min_chars: int = Field(100, ge=1)
    max_chars: int = Field(1000, ge=1)
    test_share: float = Field(0.25, gt=0, lt=1, description="share of speeches held out, by hash of the text")
    limit: int | None = Field(None, ge=1, description="keep at most this many, the first by hash")


class Sampling(Section):
    model: str = Field(EMBEDDED, description="Hugging Face folder or hub id")
    system: str = Field(COUNSELLOR, description="system prompt")
    temperature: float = Field(0.7, ge=0)
    top_p: float = Field(1.0, gt=0, le=1, description="below 1 costs most of the speed on CPU: it sorts the vocabulary")
    max_tokens: int = Field(96, ge=1)
    stop: list[str] = Field(default_factory=list, description="texts that end a reply, for example a line break")


class Responder(Sampling):
    name: str


class ResponsesSection(Section):
    k: int = Field(4, ge=1, description="responders drawn per speech; pairs need at least 2")
    responders: list[Responder] = Field(default_factory=lambda: [Responder(name="counsellor")], min_length=1)
    max_invalid_share: float = Field(0.1, ge=0, le=1)

    @field_validator("responders")
    @classmethod
    def names_are_unique(cls, value: list[Responder]) -> list[Responder]:
        if len({r.name for r in value}) < len(value):
            raise ValueError("two responders have the same name")
        return value


class EngineSection(Section):
    device: Literal["auto", "cpu", "gpu"] = "auto"
    replicas: int = Field(1, ge=1)
    tensor_parallel: int = Field(1, ge=1)
    max_model_len: int = Field(1024, ge=16)
    max_num_seqs: int = Field(64, ge=1)
    kv_cache_gib: int = Field(2, ge=1, description="on CPU only")
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    kwargs: dict[str, Any] = Field(default_factory=dict, description="passed to vLLM as they are")


class JudgeSection(Section):
    engine: Literal["rule", "vllm", "http"] = "rule"
    model: str | None = Field(None, description="vllm: folder or hub id; http: the model's name at the endpoint")
    mode: Literal["json", "soft"] = Field("json", description="vllm: seven ratings as JSON, or digit expectation")
    url: str | None = Field(None, description="http: base URL that ends in /v1")
    api_key_env: str = Field("PSYRAY_JUDGE_API_KEY", description="http: the variable that holds the key")
    concurrency: int = Field(8, ge=1)
    timeout_s: float = Field(120, gt=0)
    retries: int = Field(5, ge=0)
    max_tokens: int = Field(200, ge=1)
    price_per_million_tokens: tuple[float, float] = Field((0.0, 0.0), description="prompt, completion; for the ledger")
    tie_margin: float = Field(0.0, ge=0, description="score difference up to which a comparison is a tie")
    max_invalid_share: float = Field(0.1, ge=0, le=1, description="above it the stage stops")
    budget: int | None = Field(None, ge=0, description="judgements the first stage may buy; none: all it needs")

    @model_validator(mode="after")
    def engine_has_what_it_needs(self) -> Self:
        if self.engine == "http" and not (self.url and self.model):
            raise ValueError("engine http needs judge.url and judge.model")
        if self.engine == "vllm" and not self.model:
            raise ValueError("engine vllm needs judge.model")
        return self


class PairsSection(Section):
    rule: Literal["all", "best_worst"] = "all"
    gap: float = Field(0.25, gt=0, description="smallest score difference that makes a pair")
    gap_on: Literal["mean", "total"] = Field("mean", description="the gap is on the mean or the sum of the ratings")
    max_per_speech: int | None = Field(None, ge=1)


class TrainSection(Section):
    """One training job; lengths in tokens, batch sizes in pairs over all workers."""

    learning_rate: float = Field(1e-5, gt=0)
    epochs: float = Field(1.0, gt=0)
    batch_size: int = Field(8, ge=1)
    micro_batch: int = Field(4, ge=1, description="pairs per worker and step")
    max_length: int = Field(512, ge=16)
    warmup_share: float = Field(0.1, ge=0, lt=1)
    freeze_layers: int = Field(0, ge=0, description="lower layers (and embeddings) that stay as they are")
    zero_stage: Literal[1, 2, 3] = 2
    workers: int = Field(1, ge=1)
    gradient_checkpointing: bool = False
    save_every: int = Field(50, ge=1, description="optimiser steps between checkpoints")

    @model_validator(mode="after")
    def batch_divides(self) -> Self:
        if self.batch_size % (self.micro_batch * self.workers):
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of micro_batch x workers "
                f"{self.micro_batch} x {self.workers}"
            )
        return self


class HeadsSection(Section):
    kind: Literal["ensemble", "laplace"] = Field(
        "ensemble", description="bootstrapped heads, or draws of a Bayesian one (last-layer Laplace)"
    )
    count: int = Field(10, ge=2)
    ridge: float = Field(10.0, gt=0)
    prior_spread: float = Field(0.05, ge=0, description="ensemble: spread of the heads' priors about the trained head")


class RewardSection(Section):
    model: str = EMBEDDED
    use_margin: bool = Field(False, description="score gap as margin in the loss")
    center: float = Field(0.01, ge=0, description="weight of the squared sum of both rewards; keeps them near zero")
    train: TrainSection = TrainSection()
    heads: HeadsSection = HeadsSection()


class DpoSection(Section):
    beta: float = Field(0.1, gt=0)
    loss_type: list[str] = Field(["sigmoid", "sft"], min_length=1)
    loss_weights: list[float] = [1.0, 0.1]
    train: TrainSection = TrainSection(learning_rate=5e-6)

    @model_validator(mode="after")
    def weights_match(self) -> Self:
        if len(self.loss_type) != len(self.loss_weights):
            raise ValueError("dpo.loss_weights needs one number for each entry of dpo.loss_type")
        return self


class LoopSection(Section):
    rounds: int = Field(2, ge=0)
    prompts: int = Field(48, ge=1, description="training speeches sampled per round")
    k: int = Field(4, ge=1, description="responses per speech; pairs need at least 2")
    acquisition: str = "drts"
    budget: int = Field(24, ge=0, description="comparisons the oracle may label per round")
    reward_margin: float = Field(
        0.5, ge=0, description="the reward model labels a pair only above this margin, in logits"
    )
    reward_pairs: int = Field(1, ge=0, description="pairs per speech that the reward model may label, widest first")
    replay: int = Field(0, ge=0, description="older judge- or oracle-labelled pairs added to each round's training")
    reference: Literal["initial", "previous"] = "initial"
    on_gate_fail: Literal["continue", "stop"] = Field("continue", description="go on from the last good policy")

    @field_validator("acquisition")
    @classmethod
    def acquisition_is_known(cls, value: str) -> str:
        from psyray.active.acquisition import ACQUISITIONS

        if value not in ACQUISITIONS:
            raise ValueError(f"unknown acquisition {value!r}; one of {', '.join(ACQUISITIONS)}")
        return value


class EvaluateSection(Section):
    """The gate: a policy that fails it is kept, marked and not promoted."""

    speeches: int | None = Field(None, ge=1, description="held-out speeches answered; none: all")
    min_win_rate: float = Field(0.5, ge=0, le=1, description="the interval's lower end must lie above it")
    max_length_change: float = Field(0.2, ge=0, description="share by which the mean length may differ from the start")
    max_repeat_rise: float = Field(0.05, ge=0, description="how far the share of looping replies may rise")


class EfficiencySection(Section):
    """`psyray label-efficiency`: how the strategies are compared. The defaults were chosen on PAIR's dev prompts."""

    strategies: list[str] = Field(default_factory=list, description="beside random; none: all")
    seeds: int = Field(20, ge=2, description="replays of each strategy, each with its own split of the prompts")
    batch: int = Field(8, ge=1, description="labels between two fits")
    budget: int = Field(512, ge=1, description="labels in all")
    aim: int = Field(256, ge=1, description="random's budget whose accuracy the others are to reach")
    dev_share: float = Field(0.4, ge=0, le=0.9, description="share of the prompts for choosing settings (--dev)")
    pool_share: float = Field(0.6, ge=0.1, le=0.9, description="share of the prompts asked about; the rest is held out")
    model: str = Field(EMBEDDED, description="the frozen language model that features come from")
    layer: int = Field(20, ge=0, description="whose mean over the chat is the feature")
    start: int = Field(8, ge=0, description="labels that every strategy begins with, asked at random")
    components: int = Field(96, ge=1, description="principal axes that the head reads")
    whiten: float = Field(0.25, ge=0, le=1, description="0: the axes as wide as they are; 1: all alike")
    ridge: float = Field(0.03, gt=0, description="prior precision of the head's weights")
    draws: int = Field(20, ge=2, description="draws of the posterior that acquisition sees")

    @field_validator("strategies")
    @classmethod
    def strategies_are_known(cls, value: list[str]) -> list[str]:
        from psyray.active.acquisition import ACQUISITIONS

        if unknown := [name for name in value if name not in ACQUISITIONS]:
            raise ValueError(f"unknown acquisition {unknown[0]!r}; one of {', '.join(ACQUISITIONS)}")
        return value

    @model_validator(mode="after")
    def budgets_are_whole_batches(self) -> Self:
        if self.aim % (4 * self.batch) or self.aim > self.budget:
            raise ValueError(f"aim {self.aim} must be a multiple of 4 x batch, {4 * self.batch}, up to budget")
        return self


class TrackSection(Section):
    uri: str | None = Field(None, description="MLflow; none: MLFLOW_TRACKING_URI, else SQLite beside the run folders")
    experiment: str = "psyray"


class LedgerSection(Section):
    url: str | None = Field(None, description="any SQLAlchemy URL; none: SQLite beside the run folders")


class ClusterSection(Section):
    address: str | None = Field(None, description="a running Ray; none: RAY_ADDRESS, else one is started here")
    logical_cpus: int = Field(4, ge=3, description="for a Ray started here: slots for light tasks, not cores")
    object_store_mib: int = Field(256, ge=80)
    wait_s: float = Field(60, gt=0, description="how long a stage waits for missing resources before it stops")


class Config(Section):
    run: RunSection = RunSection()
    speeches: SpeechesSection = SpeechesSection()
    rubric: str = Field("counselling", description="a name in psyray/assets/rubrics, or a YAML file")
    engine: EngineSection = EngineSection()
    responses: ResponsesSection = ResponsesSection()
    judge: JudgeSection = JudgeSection()
    pairs: PairsSection = PairsSection()
    reward: RewardSection = RewardSection()
    policy: Sampling = Sampling()
    dpo: DpoSection = DpoSection()
    loop: LoopSection = LoopSection()
    evaluate: EvaluateSection = EvaluateSection()
    efficiency: EfficiencySection = EfficiencySection()
    track: TrackSection = TrackSection()
    ledger: LedgerSection = LedgerSection()
    cluster: ClusterSection = ClusterSection()


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """The configuration of a file with `key.key=value` words over it; PsyrayError names what is wrong and the mend."""
    tree = _read_yaml(Path(path)) if path else {}
    for word in overrides or []:
        _override(tree, word)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        where = f"{path}: " if path else ""
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
        return f"{dotted or 'configuration'}: {error['msg'].removeprefix('Value error, ')} (got {error['input']!r:.80})"
    known = _keys(location[:-1])
    near = _elsewhere(location[-1]) or difflib.get_close_matches(location[-1], known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {dotted!r}; {hint}"


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

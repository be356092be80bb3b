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


class SourceSection(Section):
    """One set of client speeches among several."""

    name: str = Field(min_length=1, description="stands in the rows and the counts")
    path: str = Field(description="a file, the folder of a data set, or hf://owner/name (read from the hub)")
    use: Literal["speeches", "pairs", "pool"] = Field(
        "speeches", description="pairs: its chosen and rejected are ready pairs; pool: they are rated responses"
    )
    text_column: str | None = None
    topic_column: str | None = None
    subtopic_column: str | None = None
    subset: str | None = Field(None, description="data sets: which of several")
    split: str | None = Field(None, description="data sets: which split; none: all")
    revision: str | None = Field(None, description="hub: commit; none: the newest, asked for at every start")
    side: Literal["hash", "train", "test"] = Field("hash", description="the side that all its speeches go to")


class SpeechesSection(Section):
    path: str | None = Field(
        None, description="JSONL, CSV, Parquet, a data set's folder, hf://owner/name; none: what ships"
    )
    text_column: str | None = Field(None, description="the column with the client's words; none: recognised")
    sources: list[SourceSection] = Field([], description="several sets, each with a name; docs/speeches.md")
    exclude: list[str] = Field([], description="test sets: no speech in them, or near one in them, is used")
    min_chars: int = Field(100, ge=1)
    max_chars: int = Field(1000, ge=1)
    near_duplicates: float | None = Field(
        0.8, ge=0.5, le=1, description="share of word pairs in common that makes two speeches one; none: off"
    )
    scrub: Literal["regex", "presidio", "off"] = Field("regex", description="how personal details are taken out")
    crisis: Literal["keep", "test_only", "drop"] = Field("keep", description="what becomes of flagged speeches")
    test_share: float = Field(0.25, gt=0, lt=1, description="share of speeches held out, by hash of the text")
    limit: int | None = Field(None, ge=1, description="keep at most this many, the first by hash")

    @field_validator("sources")
    @classmethod
    def source_names_are_unique(cls, value: list[SourceSection]) -> list[SourceSection]:
        if len({source.name for source in value} | {"path", "exclude"}) < len(value) + 2:
            raise ValueError("two sources have the same name, or one is named path or exclude")
        return value

    def listed(self) -> list[SourceSection]:
        """All sets to read; empty where the speeches that ship are meant."""
        single = [SourceSection(name="path", path=self.path, text_column=self.text_column)] if self.path else []
        return [*single, *self.sources]


class Sampling(Section):
    model: str = Field(EMBEDDED, description="Hugging Face folder or hub id")
    system: str = Field(COUNSELLOR, description="system prompt")
    temperature: float = Field(0.7, ge=0)
    top_p: float = Field(1.0, gt=0, le=1, description="below 1 costs most of the speed on CPU: it sorts the vocabulary")
    max_tokens: int = Field(96, ge=1)
    stop: list[str] = Field(default_factory=list, description="texts that end a reply, for example a line break")


class EndpointSection(Section):
    """An OpenAI-compatible endpoint: where it is, how fast it may be asked, and what it costs."""

    url: str | None = Field(None, description="base URL that ends in /v1")
    api_key_env: str = Field("PSYRAY_API_KEY", description="the environment variable that holds the endpoint's key")
    concurrency: int = Field(8, ge=1, description="requests under way at once, over the whole cluster")
    requests_per_minute: float | None = Field(None, gt=0)
    tokens_per_minute: float | None = Field(None, gt=0, description="estimated before a request, corrected after it")
    timeout_s: float = Field(120, gt=0, description="for one request")
    retries: int = Field(5, ge=0, description="further tries where a request fails or its answer cannot be used")
    price_per_million_tokens: tuple[float, float] = Field((0.0, 0.0), description="prompt, completion")
    max_cost: float | None = Field(None, gt=0, description="what one stage may spend, in the unit of the price")

    @model_validator(mode="after")
    def price_is_sound(self) -> Self:
        if min(self.price_per_million_tokens) < 0:
            raise ValueError("price_per_million_tokens is below 0")
        if self.max_cost and not any(self.price_per_million_tokens):
            raise ValueError("max_cost needs price_per_million_tokens: what a million prompt and answer tokens cost")
        return self


class Responder(Sampling):
    name: str
    adapter: str | None = Field(None, description="folder of a LoRA adapter of the model")
    engine: dict[str, Any] = Field(default_factory=dict, description="settings over those of `engine`, for this model")
    endpoint: EndpointSection | None = Field(None, description="where the model is served; none: vLLM starts it here")

    @model_validator(mode="after")
    def endpoint_has_a_url(self) -> Self:
        if self.endpoint and not self.endpoint.url:
            raise ValueError("endpoint needs a url")
        if self.endpoint and (self.adapter or self.engine):
            raise ValueError("adapter and engine are for a model that vLLM starts here, not for an endpoint's")
        return self


class ResponsesSection(Section):
    k: int = Field(4, ge=1, description="responders drawn per speech; pairs need at least 2")
    responders: list[Responder] = Field(
        default_factory=lambda: [Responder(name="counsellor")], min_length=1, max_length=20
    )
    retries: int = Field(1, ge=0, description="further tries of a draw that failed; a prompt that is too long has none")
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


class JudgeSection(EndpointSection):
    engine: Literal["rule", "vllm", "http"] = "rule"
    model: str | None = Field(None, description="vllm: folder or hub id; http: the model's name at the endpoint")
    form: Literal["pointwise", "pairwise"] = Field(
        "pointwise", description="how two responses are compared: by their ratings, or side by side in both orders"
    )
    mode: Literal["json", "soft"] = Field("json", description="vllm: seven ratings as JSON, or digit expectation")
    api_key_env: str = Field("PSYRAY_JUDGE_API_KEY", description="the environment variable that holds the key")
    max_tokens: int = Field(200, ge=1)
    tie_margin: float = Field(0.0, ge=0, description="score difference up to which a comparison is a tie")
    max_invalid_share: float = Field(0.1, ge=0, le=1, description="above it the stage stops")
    budget: int | None = Field(None, ge=0, description="judgements the first stage may buy; none: all it needs")

    @model_validator(mode="after")
    def engine_has_what_it_needs(self) -> Self:
        if self.engine == "http" and not (self.url and self.model):
            raise ValueError("engine http needs judge.url and judge.model")
        if self.engine == "vllm" and not self.model:
            raise ValueError("engine vllm needs judge.model")
        if self.engine == "rule" and self.form == "pairwise":
            raise ValueError("engine rule rates one response at a time; judge.form pairwise needs vllm or http")
        return self


class PanelSection(Section):
    """Several judges instead of one; `judge` then gives tie_margin, max_invalid_share and budget (for each judge)."""

    judges: list[JudgeSection] = Field(default_factory=list, description="two or more; none: `judge` alone")
    rule: Literal["mean", "median", "majority"] = Field("mean", description="how their ratings become one")
    quorum: int | None = Field(None, ge=1, description="judges that must give a usable answer; none: all")
    agree: int | None = Field(None, ge=1, description="judges that make a majority; none: more than half of the panel")
    strictest_on: list[str] = Field(default_factory=list, description="principles on which the lowest rating counts")

    @property
    def needed(self) -> int:
        """Judges that must give a usable answer."""
        return self.quorum or len(self.judges)

    @property
    def majority(self) -> int:
        """Judges that must say the same."""
        return self.agree or len(self.judges) // 2 + 1

    @model_validator(mode="after")
    def judges_can_agree(self) -> Self:
        if len(self.judges) == 1:
            raise ValueError("a panel needs two judges or more; set `judge` for one")
        if self.judges and max(self.needed, self.majority) > len(self.judges):
            raise ValueError(f"quorum and agree must not exceed the {len(self.judges)} judges")
        if self.judges and 2 * self.majority <= len(self.judges):
            raise ValueError("agree must be more than half of the judges, or two answers could both have it")
        if len({judge.form for judge in self.judges}) > 1:
            raise ValueError("the judges of a panel must all have the same form, pointwise or pairwise")
        return self


class PairsSection(Section):
    rule: Literal["all", "best_worst"] = "all"
    gap: float = Field(0.25, gt=0, description="smallest rating difference that makes a pair")
    gap_on: Literal["mean", "total", "principle"] = Field(
        "mean", description="the gap is on the weighted mean of the ratings, on their sum, or on single principles"
    )
    principles: list[str] = Field(
        default_factory=list, description="gap_on principle: the ones that decide; none: all of the rubric's"
    )
    at_least: int = Field(1, ge=1, description="gap_on principle: on how many of them the chosen one leads by the gap")
    veto: list[str] | None = Field(
        None, description="principles on which the chosen one is never rated lower; none: safety, if the rubric has it"
    )
    max_length_ratio: float | None = Field(None, ge=1, description="longest to shortest text of a pair, in characters")
    balance_length: bool = Field(False, description="drop pairs until the chosen one is longer as often as shorter")
    max_per_speech: int | None = Field(None, ge=1, description="pairs per speech, widest first")

    @model_validator(mode="after")
    def principles_are_used(self) -> Self:
        if self.gap_on != "principle" and (self.principles or self.at_least > 1):
            raise ValueError("pairs.principles and pairs.at_least need pairs.gap_on principle")
        if self.principles and self.at_least > len(self.principles):
            raise ValueError(f"at_least {self.at_least} is more than the {len(self.principles)} principles named")
        return self


class LoraSection(Section):
    """Low-rank adapters (arXiv 2106.09685) that learn beside frozen weights and are merged into them at the end."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1, description="what an adapter adds is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="of what goes into an adapter, while it learns")
    targets: list[str] = Field([], description="names of the layers that get one; none: all linear ones below the head")


class TrainSection(Section):
    """One training job; lengths in tokens, batch sizes in pairs over all workers (reward.groups: in speeches)."""

    learning_rate: float = Field(1e-5, gt=0)
    epochs: float = Field(1.0, gt=0)
    batch_size: int = Field(8, ge=1)
    micro_batch: int = Field(4, ge=1, description="pairs per worker and step; reward.groups: speeches")
    max_length: int = Field(512, ge=16)
    warmup_share: float = Field(0.1, ge=0, lt=1)
    freeze_layers: int = Field(0, ge=0, description="lower layers (and embeddings) that stay as they are")
    lora: LoraSection | None = Field(
        None,
        description="train adapters only (keys rank, alpha, dropout, targets); none: all weights; docs/training.md",
    )
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

    @model_validator(mode="after")
    def lora_or_frozen_layers(self) -> Self:
        if self.lora and self.freeze_layers:
            raise ValueError(
                "freeze_layers and lora exclude each other: with lora all layers stay as they are and adapters learn; "
                "set freeze_layers to 0, or leave lora out"
            )
        return self


class HeadsSection(Section):
    kind: Literal["ensemble", "laplace", "mlp"] = Field(
        "ensemble",
        description="bootstrapped heads; draws of a Bayesian one (last-layer Laplace); heads with a hidden layer",
    )
    count: int = Field(10, ge=2)
    ridge: float = Field(10.0, gt=0)
    prior_spread: float = Field(
        0.05, ge=0, description="ensemble, mlp: spread of the heads' priors about the trained head"
    )
    hidden: int = Field(32, ge=1, description="mlp: units of the hidden layer")


class RewardSection(Section):
    model: str = EMBEDDED
    use_margin: bool = Field(False, description="score gap as margin in the loss")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of labels that the loss takes to be wrong")
    center: float = Field(0.01, ge=0, description="weight of the squared sum of both rewards; keeps them near zero")
    groups: bool = Field(
        False,
        description="all pairs of a speech in one step, each response read once; batch sizes are then in speeches",
    )
    train: TrainSection = TrainSection()
    heads: HeadsSection = HeadsSection()


DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
SMOOTHED_LOSSES = {"robust", "exo_pair", "aot", "aot_unpaired"}  # those that read label_smoothing
DIVERGENCE_LOSSES = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}


class DpoSection(Section):
    """TRL's DPO and its variants; docs/training.md says what helps against length."""

    beta: float = Field(0.1, gt=0, description="how dear it is to leave the reference; ipo: its tau")
    loss_type: list[str] = Field(["sigmoid", "sft"], min_length=1, description="TRL's names, summed by loss_weights")
    loss_weights: list[float] = [1.0, 0.1]
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of labels taken to be wrong, for robust, exo_pair, aot, aot_unpaired"
    )
    ld_alpha: float | None = Field(
        None, ge=0, le=1, description="weight of a side's tokens past the shorter side's length (LD-DPO); none: 1"
    )
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    f_alpha: float = Field(0.5, description="of f_divergence alpha_divergence")
    weighting: bool = Field(False, description="pairs count by how likely the policy is to say them (WPO)")
    train: TrainSection = TrainSection(learning_rate=5e-6)

    @field_validator("loss_type")
    @classmethod
    def losses_are_known(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in DPO_LOSSES:
                near = difflib.get_close_matches(name, DPO_LOSSES, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(DPO_LOSSES)}"
                raise ValueError(f"unknown loss {name!r}; {hint}")
        return value

    @model_validator(mode="after")
    def weights_match(self) -> Self:
        if len(self.loss_type) != len(self.loss_weights):
            raise ValueError("dpo.loss_weights needs one number for each entry of dpo.loss_type")
        return self

    @model_validator(mode="after")
    def settings_fit_the_losses(self) -> Self:
        losses = set(self.loss_type)
        if self.label_smoothing and not losses & SMOOTHED_LOSSES:
            raise ValueError(f"label_smoothing does nothing without one of {', '.join(sorted(SMOOTHED_LOSSES))}")
        if "exo_pair" in losses and not self.label_smoothing:
            raise ValueError("loss exo_pair needs label_smoothing above 0; its paper takes 0.001")
        if self.f_divergence != "reverse_kl" and losses - DIVERGENCE_LOSSES:
            raise ValueError(f"f_divergence {self.f_divergence} fits only {', '.join(sorted(DIVERGENCE_LOSSES))}")
        if self.weighting and losses & {"aot", "aot_unpaired"}:
            raise ValueError("weighting is by pair, but aot and aot_unpaired sort what they compare; leave one out")
        if self.train.lora and "lm_head" in self.train.lora.targets:
            raise ValueError("DPO cannot train an adapter of lm_head; leave it out of dpo.train.lora.targets")
        return self


class LoopSection(Section):
    rounds: int = Field(2, ge=0)
    prompts: int = Field(48, ge=1, description="training speeches sampled per round")
    k: int = Field(4, ge=1, description="responses per speech; pairs need at least 2")
    acquisition: str = "drts"
    apart: float | None = Field(
        None,
        ge=0,
        le=1,
        description="questions of a round whose differences have a larger cosine count as one; none: off",
    )
    budget: int | list[int] = Field(
        24, description="comparisons the oracle may label per round; a list: one number a round, the last for the rest"
    )
    reward_margin: float = Field(
        0.5, ge=0, description="the reward model labels a pair only above this margin, in logits"
    )
    reward_confidence: float | None = Field(
        None, ge=0.5, lt=1, description="and only where it believes itself right with this probability; none: off"
    )
    length_penalty: float = Field(
        0.0, ge=0, description="logits per 100 words taken off before the reward model labels; the oracle is not held"
    )
    reward_pairs: int = Field(1, ge=0, description="pairs per speech that the reward model may label, widest first")
    replay: int = Field(0, ge=0, description="older judge- or oracle-labelled pairs added to each round's training")
    reference: Literal["initial", "previous"] = "initial"
    on_gate_fail: Literal["continue", "stop"] = Field("continue", description="go on from the last good policy")
    patience: int | None = Field(
        None, ge=1, description="rounds without a better passed win rate that end it; none: off"
    )
    champion: Literal["last", "best"] = Field(
        "last", description="of the rounds that passed, the one exported: the last, or the one of the best win rate"
    )

    def budget_of(self, number: int) -> int:
        """The comparisons that round `number` (from 1) may buy."""
        each = self.budget if isinstance(self.budget, list) else [self.budget]
        return each[min(number, len(each)) - 1]

    @field_validator("budget")
    @classmethod
    def budget_is_sound(cls, value: int | list[int]) -> int | list[int]:
        each = value if isinstance(value, list) else [value]
        if not each or min(each) < 0:
            raise ValueError("budget is a number from 0, or a list of such numbers, one a round")
        return value

    @field_validator("acquisition")
    @classmethod
    def acquisition_is_known(cls, value: str) -> str:
        from psyray.active.acquisition import ACQUISITIONS

        if value not in ACQUISITIONS:
            raise ValueError(f"unknown acquisition {value!r}; one of {', '.join(ACQUISITIONS)}")
        return value


class OracleSection(Section):
    """Who labels what acquisition picks in a round; docs/oracles.md."""

    kind: Literal["judge", "experts", "replay", "noisy"] = Field(
        "judge", description="the run's judge or panel, people, a labelled set, or one of these with noise"
    )
    overlap: int = Field(1, ge=1, description="experts: how many answer each question; a majority or it is a tie")
    lease_s: float = Field(900, gt=0, description="experts: how long a question is one expert's before others get it")
    undo_s: float = Field(30, ge=0, description="experts: how old a question's last answer is before it is final")
    wait_s: float | None = Field(None, ge=0, description="experts: how long a round waits; none: until all are in")
    fall_back: Literal["judge", "leave_out", "stop"] = Field(
        "stop", description="experts: what becomes of questions without enough answers when that time is over"
    )
    price: float = Field(0, ge=0, description="experts: what one answer costs, for the ledger")
    path: str | None = Field(None, description="replay: pairs as JSONL, CSV, Parquet or a data set's folder")
    of: Literal["judge", "experts", "replay"] = Field("judge", description="noisy: whose verdicts are flipped")
    flip: float = Field(0.1, ge=0, le=1, description="noisy: the probability of a flip")
    seed: int = Field(0, description="noisy: draws which questions are flipped")

    @model_validator(mode="after")
    def replay_has_a_set(self) -> Self:
        if "replay" in (self.kind, self.kind == "noisy" and self.of) and not self.path:
            raise ValueError("replay needs oracle.path: the labelled set that answers")
        return self


class EvaluateSection(Section):
    """The gate: a policy that fails it is kept, marked and not promoted."""

    speeches: int | None = Field(None, ge=1, description="held-out speeches answered; none: all")
    min_win_rate: float = Field(0.5, ge=0, le=1, description="the interval's lower end must lie above it")
    max_length_change: float = Field(0.2, ge=0, description="share by which the mean length may differ from the start")
    max_repeat_rise: float = Field(0.05, ge=0, description="how far the share of looping replies may rise")
    dev_share: float = Field(
        0.0, ge=0, le=0.9, description="share of the held-out speeches that decide; then the others only report"
    )
    probe: str | None = Field(
        "general",
        description="what else a policy must not lose: a name in psyray/assets/probes, or a folder; none: off",
    )
    probe_answers: int = Field(32, ge=0, description="held-out answers that the distance to the start is taken on")
    max_perplexity_rise: float = Field(
        0.25, ge=0, description="share by which the perplexity on the probe's texts may rise over the start's"
    )
    max_capability_drop: float = Field(
        0.1, ge=0, description="how far the share of the probe's questions answered right may fall"
    )
    max_kl: float | None = Field(None, gt=0, description="nats a token that a policy may go from the start; none: any")
    second: JudgeSection | None = Field(
        None, description="another judge (keys as in `judge`) that grades the same answers; none: none"
    )
    second_decides: bool = Field(False, description="its win rate must hold as well; else it is reported only")

    @model_validator(mode="after")
    def what_decides_is_there(self) -> Self:
        if self.second_decides and not self.second:
            raise ValueError("evaluate.second_decides needs a judge in evaluate.second")
        if self.max_kl and not (self.probe and self.probe_answers):
            raise ValueError("evaluate.max_kl needs evaluate.probe and evaluate.probe_answers above 0")
        return self


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
    url: str | None = Field(
        None,
        description="any SQLAlchemy URL, without a password (docs/oracles.md); none: SQLite beside the run folders",
    )


class ClusterSection(Section):
    address: str | None = Field(None, description="a running Ray; none: RAY_ADDRESS, else one is started here")
    logical_cpus: int = Field(4, ge=3, description="for a Ray started here: slots for light tasks, not cores")
    object_store_mib: int = Field(256, ge=80)
    wait_s: float = Field(60, gt=0, description="how long a stage waits for missing resources before it stops")


class Config(Section):
    run: RunSection = RunSection()
    speeches: SpeechesSection = SpeechesSection()
    topics: JudgeSection | None = Field(
        None, description="the engine (keys as in `judge`, vllm or http) that picks topics where no column does"
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

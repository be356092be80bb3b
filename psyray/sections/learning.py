"""Settings of a run's second half: training, heads, the online loop, its oracle and its gate."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from psyray.errors import hint
from psyray.sections.data import EMBEDDED, JudgeSection, Section

Pooling = Literal["last", "mean", "response"]


class LoraSection(Section):
    """Low-rank adapters (arXiv 2106.09685) that learn beside frozen weights and are merged into them at the end."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1, description="what an adapter adds is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="of what goes into an adapter, while it learns")
    targets: list[str] = Field([], description="names of the layers that get one; none: all linear ones below the head")


class DevSection(Section):
    """Training speeches that a job does not learn from: measured while it trains, they choose the step it keeps."""

    share: float = Field(0.1, gt=0, lt=1, description="share of the job's training speeches, by hash")
    every: int = Field(10, ge=1, description="optimiser steps between two looks; the last step has one as well")
    patience: int | None = Field(None, ge=1, description="looks without a better one that end the job; none: off")


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
    dev: DevSection | None = Field(
        None,
        exclude_if=lambda value: value is None,  # off, it is no part of what a finished stage was made with
        description="put speeches aside, look at them and keep the best step (keys share, every, patience); none: off; "
        "docs/training.md",
    )

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


class SmallLoraSection(LoraSection):
    rank: int = Field(8, ge=1)


class AdapterTrainSection(TrainSection):
    learning_rate: float = Field(1e-4, gt=0)
    lora: SmallLoraSection = SmallLoraSection()


class AdaptersSection(Section):
    """LoRA adapters of the trained reward model, an ensemble whose bodies differ; docs/training.md."""

    count: int = Field(
        0, ge=0, description="adapters of the trained reward model, each on its own draw of the speeches; 0: off"
    )
    train: AdapterTrainSection = AdapterTrainSection()

    @field_validator("count")
    @classmethod
    def one_is_no_ensemble(cls, value: int) -> int:
        if value == 1:
            raise ValueError("one adapter disagrees with nobody: give 0 (off), or 2 and more")
        return value


class HeadsSection(Section):
    kind: Literal["ensemble", "laplace", "mlp"] = Field(
        "ensemble",
        description="bootstrapped heads; a Bayesian one, last-layer Laplace; heads with a hidden layer",
    )
    count: int = Field(10, ge=2)
    ridge: float = Field(10.0, gt=0)
    prior_spread: float = Field(
        0.05, ge=0, description="ensemble, mlp: spread of the heads' priors about the trained head"
    )
    hidden: int = Field(32, ge=1, description="mlp: units of the hidden layer")
    layer: int | None = Field(
        None,
        ge=0,
        description="whose states the heads read, 0 the embeddings; none: the last; `psyray layers` compares",
    )
    pooling: Pooling = Field("last", description="the last token's state, or the mean over the chat or the response")


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
    adapters: AdaptersSection = AdaptersSection()
    heads: HeadsSection = HeadsSection()

    @model_validator(mode="after")
    def adapters_fit_model_and_heads(self) -> Self:
        if not (count := self.adapters.count):
            return self
        if self.heads.count % count:
            raise ValueError(
                f"reward.heads.count {self.heads.count} is no multiple of reward.adapters.count {count}: each adapter "
                "gets the same number of heads"
            )
        if (length := self.adapters.train.max_length) != self.train.max_length:
            raise ValueError(
                f"reward.adapters.train.max_length {length} must be reward.train.max_length {self.train.max_length}: "
                "responses are scored at that length under both"
            )
        return self


DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
SMOOTHED_LOSSES = {"robust", "exo_pair", "aot", "aot_unpaired"}  # those that read label_smoothing
F_ALPHA = 0.5
DIVERGENCE_LOSSES = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}


class DpoTrainSection(TrainSection):
    learning_rate: float = Field(5e-6, gt=0)


class DpoSection(Section):
    """TRL's DPO and its variants; docs/training.md says what helps against length."""

    beta: float = Field(0.1, gt=0, description="how dear it is to leave the reference; ipo: its tau")
    loss_type: list[str] = Field(["sigmoid", "sft"], min_length=1, description="TRL's names, summed by loss_weights")
    loss_weights: list[float] = Field([1.0, 0.1])
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of labels taken to be wrong, for robust, exo_pair, aot, aot_unpaired"
    )
    ld_alpha: float | None = Field(
        None, ge=0, le=1, description="weight of a side's tokens past the shorter side's length (LD-DPO); none: 1"
    )
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    f_alpha: float = Field(F_ALPHA, description="of f_divergence alpha_divergence")
    weighting: bool = Field(False, description="pairs count by how likely the policy is to say them (WPO)")
    train: DpoTrainSection = DpoTrainSection()

    @field_validator("loss_type")
    @classmethod
    def losses_are_known(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in DPO_LOSSES:
                raise ValueError(f"unknown loss {name!r}; {hint(name, DPO_LOSSES)}")
        return value

    @model_validator(mode="after")
    def weights_match(self) -> Self:
        if len(self.loss_type) != len(self.loss_weights):
            raise ValueError("dpo.loss_weights needs one number for each entry of dpo.loss_type")
        if min(self.loss_weights) < 0 or not any(self.loss_weights):
            raise ValueError(
                "dpo.loss_weights are numbers from 0, one at least above it: less would teach the opposite"
            )
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
        if self.f_alpha != F_ALPHA and self.f_divergence != "alpha_divergence":
            raise ValueError(f"f_alpha does nothing with f_divergence {self.f_divergence}; set it to alpha_divergence")
        if self.ld_alpha is not None and losses == {"sft"}:
            raise ValueError("ld_alpha does nothing for sft alone")
        if self.weighting and losses & {"aot", "aot_unpaired"}:
            raise ValueError("weighting is by pair, but aot and aot_unpaired sort what they compare; leave one out")
        if self.weighting and "sft" in losses and self.train.micro_batch > 1:
            raise ValueError(
                "weighting is by pair, but sft is one number for all pairs that are read at once: set "
                "dpo.train.micro_batch=1, or leave one out"
            )
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
    mixed_ends: bool = Field(
        True,
        description="whether a pair may have one side that its limit cut off beside a whole one; else none is asked",
    )
    rate_decay: float = Field(1.0, gt=0, le=1, description="each round's DPO learning rate, as a share of the last's")
    replay_balance: bool = Field(
        False, description="draw older pairs so that over a round's training the longer side wins as often as it loses"
    )
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

    @model_validator(mode="after")
    def what_is_balanced_is_there(self) -> Self:
        if self.replay_balance and not self.replay:
            raise ValueError("replay_balance does nothing without older pairs; set loop.replay to how many may join")
        return self

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
    max_invalid_share: float | None = Field(
        None, ge=0, le=1, description="above this share of unusable answers a round stops; none: as of `judge`"
    )
    of: Literal["judge", "experts", "replay"] = Field("judge", description="noisy: whose verdicts are flipped")
    flip: float = Field(0.1, ge=0, le=1, description="noisy: the probability of a flip")
    seed: int = Field(0, description="noisy: draws which questions are flipped")

    @property
    def answering(self) -> Literal["judge", "experts", "replay"]:
        """Who is asked, also where the answers are then flipped."""
        return self.of if self.kind == "noisy" else self.kind

    @model_validator(mode="after")
    def replay_has_a_set(self) -> Self:
        if self.answering == "replay" and not self.path:
            raise ValueError("replay needs oracle.path: the labelled set that answers")
        return self


# Of so few that all come out alike, the bootstrap's interval has no width: a coin wins 6 of 6 once in 64 times.
LEAST_SPEECHES = 6


class EvaluateSection(Section):
    """The gate: a policy that fails it is kept, marked and not promoted."""

    speeches: int | None = Field(None, ge=1, description="held-out speeches answered; none: all")
    min_win_rate: float = Field(0.5, ge=0, le=1, description="the interval's lower end must lie above it; 0: any")
    max_length_change: float = Field(0.2, ge=0, description="share by which the mean length may differ from the start")
    max_repeat_rise: float = Field(0.05, ge=0, description="how far the share of looping replies may rise")
    max_truncated_rise: float = Field(
        0.15, ge=0, description="how far the share of replies that their token limit cut off may rise"
    )
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
        if self.min_win_rate and self.speeches and self.speeches < LEAST_SPEECHES:
            raise ValueError(
                f"on {self.speeches} speeches no round could pass, {LEAST_SPEECHES} are the least: raise "
                "evaluate.speeches, or set evaluate.min_win_rate to 0"
            )
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
    layer: int = Field(20, ge=0, description="whose states the features are, 0 the embeddings")
    pooling: Pooling = Field("mean", description="the mean over the chat or the response, or the last token's state")
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

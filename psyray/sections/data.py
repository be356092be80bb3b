"""Settings of a run's first half: speeches, engines, responses, judges, pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from psyray.homes import folder_of, uri_of

EMBEDDED = "embedded:smollm2-135m-instruct"
ASSETS = Path(__file__).parents[1] / "assets"
COUNSELLOR = (
    "You are a counsellor talking with a client. "
    "Tell the client in one or two sentences how you understand what they feel."
)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def unusual(section: Section, name: str) -> list[Any]:
    """A setting that is not its default, for an identity that leaves defaults out; else nothing."""
    value = getattr(section, name)
    return [] if value == type(section).model_fields[name].get_default(call_default_factory=True) else [value]


class RunSection(Section):
    path: Path = Field(
        Path("runs/run"),
        description="the run folder, a relative one under $PSYRAY_HOME or here; or a URI (s3://bucket/prefix), which "
        "is then the mirror of a folder there",
    )
    seed: int = 0
    mirror: str | None = Field(
        None, description="URI (s3://bucket/prefix) that finished stages and the SQLite ledger are copied to"
    )

    @model_validator(mode="before")
    @classmethod
    def a_uri_is_the_mirror(cls, tree: Any) -> Any:
        """`path: s3://...` says both: the mirror, and by it the folder at work."""
        path = tree.get("path") if isinstance(tree, dict) else None
        uri = uri_of(path) if isinstance(path, str | Path) else None
        if uri is None:
            return tree
        if tree.get("mirror"):
            raise ValueError("run.path is a URI, and so the run's mirror: leave run.mirror out, or name a folder there")
        return {**tree, "path": folder_of(uri), "mirror": uri}


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
    scrub: str = Field(
        "regex",
        pattern=r"^(regex|off|presidio(:\w+)?)$",
        description="how personal details are taken out: regex, off, presidio, presidio:MODEL of spaCy",
    )
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

    url: str | None = Field(None, description="base URL that ends in /v1, without a user name or a key")
    api_key_env: str = Field("PSYRAY_API_KEY", description="the environment variable that holds the endpoint's key")
    concurrency: int = Field(8, ge=1, description="requests under way at once, over the whole cluster")
    requests_per_minute: float | None = Field(None, gt=0)
    tokens_per_minute: float | None = Field(None, gt=0, description="estimated before a request, corrected after it")
    timeout_s: float = Field(120, gt=0, description="for one request")
    retries: int = Field(5, ge=0, description="further tries where a request fails or its answer cannot be used")
    price_per_million_tokens: tuple[float, float] = Field((0.0, 0.0), description="prompt, completion")
    max_cost: float | None = Field(None, gt=0, description="what one stage may spend, in the unit of the price")
    body: dict[str, Any] = Field(
        {}, description="further fields of each request, such as {reasoning_effort: low}; null leaves one out"
    )

    @field_validator("body")
    @classmethod
    def body_leaves_the_question(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted({"model", "messages", "stream", "n"} & set(value)):
            raise ValueError(f"{', '.join(taken)}: what is asked, and of whom, is not set here")
        return value

    @field_validator("url")
    @classmethod
    def url_has_a_scheme(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("write the whole address, for example http://127.0.0.1:8000/v1")
        return value

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
    template: dict[str, Any] = Field(
        {"enable_thinking": False}, description="variables of the chat template, for one that knows them"
    )
    kwargs: dict[str, Any] = Field(default_factory=dict, description="passed to vLLM as they are")


class JudgeSection(EndpointSection):
    engine: Literal["rule", "vllm", "http"] = "rule"
    model: str | None = Field(None, description="vllm: folder or hub id; http: the model's name at the endpoint")
    form: Literal["pointwise", "pairwise"] = Field(
        "pointwise", description="how two responses are compared: by their ratings, or side by side in both orders"
    )
    mode: Literal["json", "soft"] = Field("json", description="vllm: the ratings as JSON, or digit expectation")
    api_key_env: str = Field("PSYRAY_JUDGE_API_KEY", description="the environment variable that holds the key")
    max_tokens: int = Field(200, ge=1)
    tie_margin: float = Field(0.0, ge=0, description="score difference up to which a comparison is a tie")
    max_invalid_share: float = Field(0.1, ge=0, le=1, description="above it the stage stops")
    budget: int | None = Field(
        None, ge=0, description="judgements the first stage may buy (second: each round); none: all"
    )

    @model_validator(mode="after")
    def engine_has_what_it_needs(self) -> Self:
        if self.engine == "http" and not (self.url and self.model):
            raise ValueError("engine http needs judge.url and judge.model")
        if self.engine == "vllm" and not self.model:
            raise ValueError("engine vllm needs judge.model")
        if self.engine == "rule" and self.form == "pairwise":
            raise ValueError("engine rule rates one response at a time; judge.form pairwise needs vllm or http")
        return self


class TopicsSection(JudgeSection):
    file: str | None = Field(None, description="YAML of `coarse topic: [fine topic, ...]`; none: counselling's")


class PanelSection(Section):
    """Several judges instead of one; `judge` then gives tie_margin, max_invalid_share and the budget of each."""

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

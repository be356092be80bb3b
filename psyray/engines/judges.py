"""Judges: whoever rates a response by the rubric, behind one interface.

A judge takes a Ray Dataset of rows {key, messages, response} and gives one row {key, ratings, raw_text, error,
attempts, latency_s, cost} for each; `ratings` is JSON, empty where the answer cannot be used, and then `error`
says why, its class first (`error_class`). Nothing is ever made up in place of an unusable answer.

A judge that can compare takes rows whose response is two `side_by_side`, and its one rating is the preference.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from psyray.engines import http, rule, vllm
from psyray.engines.thinking import OPEN
from psyray.errors import PsyrayError
from psyray.models import model_identity, resolve_model
from psyray.records import MESSAGES, Row, client_words, content_id
from psyray.rubric import PairwiseRubric, Rubric, UnusableAnswer
from psyray.sections.data import EngineSection, JudgeSection, PanelSection, unusual

ASKED = pa.schema([("key", pa.string()), ("messages", MESSAGES), ("response", pa.string())])  # what `rate` takes


class Judge(Protocol):
    """Rates responses; `id` names all that its ratings depend on beside the rubric and the question.

    `folder` is where an engine that pays for its calls keeps their journal; all nodes see it.
    """

    @property
    def id(self) -> str: ...

    def rate(self, dataset: Any, folder: Path) -> Any: ...

    def compare(self, dataset: Any, folder: Path) -> Any: ...


def outcome(key: str, ratings: dict[str, float] | None, *, raw_text: str = "", error: str = "", **spent: Any) -> Row:
    """One judge's answer as a row."""
    row = {"key": key, "ratings": json.dumps(ratings) if ratings else "", "raw_text": raw_text, "error": error}
    return row | {"attempts": 1, "latency_s": 0.0, "cost": 0.0} | spent


def error_class(error: str) -> str:
    """The class of an outcome's error, to count by: `timeout`, `http 503`, `refused 401`, `not json`, ..."""
    return error.partition(":")[0]


@dataclass(frozen=True)
class RuleJudge:
    """The offline judge that ships: transparent features of the text, no model."""

    rubric: Rubric

    @property
    def id(self) -> str:
        return f"rule-{rule.JUDGE_VERSION}"

    def rate(self, dataset: Any, folder: Path) -> Any:
        keys = self.rubric.keys

        def rate_row(row: Row) -> Row:
            ratings = rule.rate(client_words(row["messages"]), row["response"])
            return outcome(row["key"], {key: ratings[key] for key in keys})

        return dataset.map(rate_row, num_cpus=0.25)

    def compare(self, dataset: Any, folder: Path) -> Any:
        raise PsyrayError("the offline judge rates one response at a time; use judge.form pointwise")


@dataclass(frozen=True)
class VllmJudge:
    """A local language model with guided decoding; mode `soft` gives the expectation over the digits' probabilities."""

    rubric: Rubric
    section: JudgeSection
    engine: EngineSection
    wait_s: float

    @cached_property
    def id(self) -> str:
        told = [model_identity(self.section.model or ""), self.section.mode, self.engine.dtype]
        # Also an answer that was cut off is to be had otherwise.
        own = [*unusual(self.section, "max_tokens"), *unusual(self.engine, "template")]
        return f"vllm-{content_id(*told, *own)}"

    def rate(self, dataset: Any, folder: Path) -> Any:
        soft = self.section.mode == "soft"
        sampling = {
            "temperature": 0.0,
            "max_tokens": self.section.max_tokens,
            "structured_outputs": {"regex": self.rubric.regex()},
            **({"logprobs": 20} if soft else {}),
        }
        ask, read = self.rubric.question, self._read

        def to_request(row: Row) -> Row:
            messages = ask(row["messages"], row["response"])
            return {"key": row["key"], "messages": messages, "sampling": json.dumps(sampling)}

        model = resolve_model(self.section.model or "")
        answers = vllm.generate(dataset.map(to_request, num_cpus=0.05), model, self.engine, self.wait_s)
        return answers.map(read, num_cpus=0.05)

    def compare(self, dataset: Any, folder: Path) -> Any:
        plain = self.section.model_copy(update={"mode": "json"})  # the digits' probabilities say nothing here
        return replace(self, rubric=PairwiseRubric.of(self.rubric), section=plain).rate(dataset, folder)

    def _read(self, row: Row) -> Row:
        if error := row.get("__inference_error__"):
            return outcome(row["key"], None, error=f"engine: {error}")
        try:
            # Decoding was guided from the first token on: where the template opens a thought, the answer stands in it.
            ratings = self.rubric.parse(row["text"].removeprefix(OPEN))
            if self.section.mode == "soft":
                ratings = soft_ratings(self.rubric, json.loads(row["logprobs"]))
        except UnusableAnswer as error:
            return outcome(row["key"], None, raw_text=row["text"], error=str(error), latency_s=row["seconds"])
        return outcome(row["key"], ratings, raw_text=row["text"], latency_s=row["seconds"])


def soft_ratings(rubric: Rubric, logprobs: list[dict[str, dict[str, Any]]]) -> dict[str, float]:
    """For each principle the expectation over the digits at its place in the answer.

    `logprobs` holds for each generated token the candidates {id: {logprob, decoded_token}}, the sampled one first.
    """
    digits = {str(d): d for d in range(rubric.low, rubric.high + 1)}
    expected = []
    for candidates in logprobs:
        listed = list(candidates.values())
        if listed[0]["decoded_token"].strip() not in digits:
            continue
        mass = [(digits[t], math.exp(c["logprob"])) for c in listed if (t := c["decoded_token"].strip()) in digits]
        expected.append(sum(d * p for d, p in mass) / sum(p for _, p in mass))
    if len(expected) != len(rubric.keys):
        raise UnusableAnswer(f"wrong schema: {len(expected)} rating digits for {len(rubric.keys)} principles")
    return dict(zip(rubric.keys, expected, strict=True))


@dataclass(frozen=True)
class HttpJudge:
    """Any OpenAI-compatible endpoint that the user configured."""

    rubric: Rubric
    section: JudgeSection

    @cached_property
    def id(self) -> str:
        told = [self.section.url, self.section.model, self.section.max_tokens]
        return f"http-{content_id(*told, *unusual(self.section, 'body'))}"

    def rate(self, dataset: Any, folder: Path) -> Any:
        section = self.section
        return http.rate(dataset, self.rubric, section, section.model or "", section.max_tokens, folder)

    def compare(self, dataset: Any, folder: Path) -> Any:
        return replace(self, rubric=PairwiseRubric.of(self.rubric)).rate(dataset, folder)


@dataclass(frozen=True)
class Panel:
    """Several judges under one id. Who has a question for it asks each judge, so that each answer is bought apart."""

    judges: tuple[Judge, ...]
    section: PanelSection

    @cached_property
    def id(self) -> str:
        rules = self.section.model_dump(exclude={"judges"})
        return f"panel-{content_id([judge.id for judge in self.judges], rules)}"

    def rate(self, dataset: Any, folder: Path) -> Any:
        raise PsyrayError("a panel is asked judge by judge")

    compare = rate


def make_judge(section: JudgeSection, rubric: Rubric, engine: EngineSection, wait_s: float) -> Judge:
    """The configured judge; PsyrayError where it cannot rate or compare by the rubric."""
    if section.form == "pairwise":
        PairwiseRubric.of(rubric)
    if section.engine == "rule":
        if missing := [key for key in rubric.keys if key not in rule.KEYS]:
            raise PsyrayError(
                f"the offline judge (engine: rule, the default) rates by the principles of counselling and knows no "
                f"{', '.join(missing)} of the rubric {rubric.name}; set judge.engine to http or vllm"
            )
        return RuleJudge(rubric)
    if section.engine == "vllm":
        return VllmJudge(rubric, section, engine, wait_s)
    return HttpJudge(rubric, section)


def answerer(section: JudgeSection) -> tuple[str, ...]:
    """Who answers, however the question is put: the offline judge, a model here, or a model at an endpoint."""
    model = section.model or ""
    if section.engine == "rule":
        return ("rule",)
    if section.engine == "vllm":
        folder = Path(model).expanduser()
        return "vllm", str(folder.resolve()) if folder.is_dir() else model
    return "http", (section.url or "").rstrip("/"), model


def make_panel(judges: Sequence[Judge], section: PanelSection, rubric: Rubric) -> Panel:
    """The configured panel; PsyrayError where two judges are one, or a principle is none of the rubric's.

    However it is asked, one judge has one voice: with other settings it would agree with itself.
    """
    seats: dict[tuple[str, ...], int] = {}
    for place, who in enumerate(map(answerer, section.judges)):
        if (first := seats.setdefault(who, place)) != place:
            raise PsyrayError(
                f"panel.judges.{first} and panel.judges.{place} are the same judge ({' '.join(who)}), whose voice "
                "would count twice, also where the other settings differ: leave one out, or name another model"
            )
    if unknown := set(section.strictest_on) - set(rubric.keys):
        raise PsyrayError(
            f"panel.strictest_on names {', '.join(sorted(unknown))}; the rubric has {', '.join(rubric.keys)}"
        )
    return Panel(tuple(judges), section)

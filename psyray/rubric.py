"""What a good answer is, as data: principles, scale, prompts, and the strict reading of a judge's answer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from psyray.engines.thinking import CUT_OFF, said
from psyray.errors import PsyrayError
from psyray.records import Message, content_id
from psyray.sections.data import ASSETS

SHIPPED = ASSETS / "rubrics"
ASSISTANT = "assistant"
PREFERENCE = {"A": 1.0, "B": -1.0, "tie": 0.0}  # what a comparison may be answered with


class UnusableAnswer(ValueError):
    """A judge's answer that gives no ratings; says why: `not json`, `wrong schema` or `out of scale`, and the detail.

    Of the answer it shows nothing but keys of the rubric and numbers.
    """


@dataclass(frozen=True)
class Principle:
    key: str
    name: str
    weight: float
    guidance: str


@dataclass(frozen=True)
class Rubric:
    """The principles that a response is rated by, each from `low` to `high`."""

    name: str
    low: int
    high: int
    speaker: str
    principles: tuple[Principle, ...]
    prompt: str
    json_instruction: str
    pairwise_prompt: str = ""  # none: two responses cannot be put side by side
    answerer: str = ASSISTANT  # who gave the earlier answers of a conversation

    @cached_property  # it is part of every question's id
    def id(self) -> str:
        """Changes with anything that a judge sees or that weighs its ratings."""
        # Ratings know nothing of the pairwise prompt, so answers that were bought stay good when it changes.
        return content_id("rubric", {k: v for k, v in self._seen().items() if k != "pairwise_prompt"})

    @cached_property
    def pairwise_id(self) -> str:
        """Changes with anything that a judge sees who is shown two responses side by side."""
        return content_id("pairwise rubric", self._seen())

    def _seen(self) -> dict[str, Any]:
        tree = asdict(self)
        if self.answerer == ASSISTANT:  # so ids are those of rubrics that know no such word
            del tree["answerer"]
        return tree

    @property
    def keys(self) -> list[str]:
        """The principles' keys in order."""
        return [p.key for p in self.principles]

    def score(self, ratings: Mapping[str, float]) -> float:
        """The weighted mean of the ratings, on the rubric's scale."""
        return sum(p.weight * ratings[p.key] for p in self.principles) / sum(p.weight for p in self.principles)

    def question(self, messages: Sequence[Message], response: str) -> list[Message]:
        """The messages that ask a language model for the ratings as JSON."""
        shown = self._shown(messages)
        ask = _fill(self.prompt, shown | {"{response}": response})
        instruction = _fill(self.json_instruction, shown | {"{keys}": ", ".join(self.keys)})
        return [{"role": "user", "content": f"{ask}\n\n{instruction}"}]

    def _shown(self, messages: Sequence[Message]) -> dict[str, str]:
        principles = "\n".join(f"- {p.key}: {p.name}. {p.guidance}" for p in self.principles)
        names = {"user": self.speaker, "assistant": self.answerer}
        turns = "\n\n".join(f"{names.get(m['role'], m['role']).capitalize()}:\n{m['content']}" for m in messages)
        scale = {"{low}": str(self.low), "{high}": str(self.high)}
        return {"{principles}": principles, "{conversation}": turns} | scale

    def regex(self) -> str:
        """A pattern of exactly the wanted JSON, for guided decoding."""
        digits = f"[{self.low}-{self.high}]"
        return r"\{" + ",".join(f'"{key}":{digits}' for key in self.keys) + r"\}"

    def parse(self, text: str) -> dict[str, float]:
        """The ratings in a judge's answer; UnusableAnswer for anything but a whole number on the scale for each key."""
        found = re.search(r"\{[^{}]*\}", answer_in(text))
        if not found:
            raise UnusableAnswer("not json: no JSON object in the answer")
        try:
            values = json.loads(found.group())
        except (ValueError, RecursionError) as error:  # also a number of thousands of digits, or brackets as many
            raise UnusableAnswer("not json: the JSON object cannot be read") from error
        return {key: self._rating(key, values) for key in self.keys}

    def _rating(self, key: str, values: Mapping[str, Any]) -> float:
        if key not in values:
            raise UnusableAnswer(f"wrong schema: no rating for {key}")
        value = values[key]
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value.strip()):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UnusableAnswer(f"wrong schema: {key} is a {type(value).__name__}, not a whole number")
        if not self.low <= value <= self.high:
            raise UnusableAnswer(f"out of scale: {key} is {value!s:.12}, outside {self.low} to {self.high}")
        if value != int(value):
            raise UnusableAnswer(f"out of scale: {key} is {value!s:.12}, not a whole number")
        return float(value)


class PairwiseRubric(Rubric):
    """The rubric as engines ask and read a comparison by it: a "response" is two, and the one "rating" a preference.

        pairwise = PairwiseRubric.of(rubric)
        pairwise.question(messages, side_by_side(first, second))
        pairwise.parse("A")  # {"preference": 1.0}: the first; -1.0 the second, 0.0 a tie

    So every engine that can rate can also compare, and keeps its retries, prices and failures.
    """

    @classmethod
    def of(cls, rubric: Rubric) -> PairwiseRubric:
        """The rubric's pairwise form; PsyrayError where it has none."""
        if not rubric.pairwise_prompt:
            raise PsyrayError(
                f"the rubric {rubric.name!r} has no pairwise_prompt, so judge.form pairwise cannot ask; "
                "write one as in psyray/assets/rubrics/counselling.yaml, or set judge.form to pointwise"
            )
        return cls(**{field.name: getattr(rubric, field.name) for field in fields(rubric)})

    def question(self, messages: Sequence[Message], response: str) -> list[Message]:
        """The messages that ask which of two responses is better; `response` comes from `side_by_side`."""
        first, second = json.loads(response)
        ask = _fill(self.pairwise_prompt, self._shown(messages) | {"{a}": first, "{b}": second})
        return [{"role": "user", "content": ask}]

    def regex(self) -> str:
        """A pattern of exactly the wanted words, for guided decoding."""
        return "(" + "|".join(PREFERENCE) + ")"

    def parse(self, text: str) -> dict[str, float]:
        """The preference; UnusableAnswer for anything but one of the three words."""
        word = answer_in(text).strip()
        if word not in PREFERENCE:
            raise UnusableAnswer(f"the answer is none of {', '.join(PREFERENCE)}")
        return {"preference": PREFERENCE[word]}


def answer_in(text: str) -> str:
    """What a judge says behind its thoughts; UnusableAnswer where it did not come to an end of them."""
    if (answer := said(text)) is None:
        raise UnusableAnswer(CUT_OFF)
    return answer


def side_by_side(first: str, second: str) -> str:
    """Two responses in the place of one."""
    return json.dumps([first, second])


def _fill(template: str, fields: Mapping[str, str]) -> str:
    # In one pass, so that braces in a client's words are never read as fields.
    return re.sub("|".join(map(re.escape, fields)), lambda m: fields[m.group()], template)


def rubric_file(name: str) -> Path:
    """The file of the rubric that ships under the name, or the YAML file that it is; else PsyrayError."""
    shipped = SHIPPED / f"{name}.yaml"
    path = shipped if shipped.exists() else Path(name).expanduser()
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.yaml")))
        raise PsyrayError(f"no rubric {name!r}: neither one that ships ({known}) nor a file at {path.absolute()}")
    return path


def kept_rubric(run: Path, key: str) -> Path:
    """Where a run keeps the text of the rubric with this id, as it was asked by."""
    return run / f"rubric-{key}.yaml"


def load_rubric(name: str) -> Rubric:
    """The rubric of that name or file; PsyrayError names the file and the key."""
    path = rubric_file(name)
    tree = yaml.safe_load(path.read_text())
    try:
        low, high = tree["scale"]
        principles = tuple(
            Principle(key, p["name"], float(p.get("weight", 1)), p["guidance"]) for key, p in tree["principles"].items()
        )
        rubric = Rubric(
            tree["name"], low, high, tree.get("speaker", "client"), principles, tree["prompt"],
            tree["json_instruction"], tree.get("pairwise_prompt", ""), tree.get("answerer", ASSISTANT),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PsyrayError(f"{path} is no rubric: {type(error).__name__} {error}; compare {SHIPPED}") from error
    if not principles or not 0 <= low < high <= 9 or sum(p.weight for p in principles) <= 0:
        raise PsyrayError(f"{path}: a rubric needs principles, weights above 0 and a scale of digits from low to high")
    if missing := [
        f for f in ("{conversation}", "{a}", "{b}") if rubric.pairwise_prompt and f not in rubric.pairwise_prompt
    ]:
        raise PsyrayError(f"{path}: pairwise_prompt does not show {', '.join(missing)}")
    return rubric

"""Topics of client speeches, coarse and fine: from a column where there is one, else by an engine that the user chose.

The engine picks one name from `psyray/assets/topics.yaml` or `topics.file` (vLLM cannot write anything else). An answer
that is no name on the list is an invalid row, counted, and never guessed at.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from psyray.ceiling import Ceiling, check_ceiling
from psyray.config import Config
from psyray.engines.judges import ASKED, Judge, make_judge
from psyray.errors import PsyrayError
from psyray.files import ROWS_IN_MEMORY
from psyray.records import Message, Row, Status, content_id
from psyray.rubric import Rubric, UnusableAnswer
from psyray.run import Artifact, Folder, Parts, Run
from psyray.sections.data import ASSETS
from psyray.stream import CALLS, stream

TOPICS = pa.schema(
    [
        ("speech_id", pa.string()),
        ("topic", pa.string()),
        ("subtopic", pa.string()),
        ("by", pa.string()),  # "column", or the engine that picked it
        ("status", pa.string()),
        ("error", pa.string()),
        ("raw_text", pa.string()),
        ("attempts", pa.int32()),
    ]
)
SHIPPED = ASSETS / "topics.yaml"
COUNSELLING, ANY = "a client said to a counsellor", "somebody said"  # to whom, the topics that ship tell
PROMPT = f"""Here is what {COUNSELLING}.

{{conversation}}

Which of these topics is it mainly about?
{{topics}}

Answer with the name of one topic, exactly as it stands in the list, and nothing else."""


def topics(file: str | None = None) -> dict[str, str]:
    """Each fine topic with its coarse one, in the order of the file; PsyrayError for a file that is no such list."""
    path = Path(file).expanduser() if file else SHIPPED
    if not path.is_file():
        raise PsyrayError(f"topics.file: no file at {path.absolute()}")
    try:
        pairs = [
            (str(fine), str(coarse)) for coarse, fines in yaml.safe_load(path.read_text()).items() for fine in fines
        ]
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        raise PsyrayError(
            f"topics.file: {path} is no YAML of `coarse topic: [fine topic, ...]`, as {SHIPPED}"
        ) from error
    if len({_bare(fine) for fine, _ in pairs}) < max(len(pairs), 2):
        raise PsyrayError(f"topics.file: {path} needs two fine topics or more, and no name twice")
    return dict(pairs)


@dataclass(frozen=True)
class TopicChoice(Rubric):
    """A question with one answer, in the form of a rubric, so that every judge's engine can ask it.

    Its one rating is the place of the topic in `coarse`.
    """

    coarse: Mapping[str, str] = field(default_factory=topics)  # of each fine topic

    @property
    def keys(self) -> list[str]:
        """The one thing that is asked."""
        return ["topic"]

    def question(self, messages: Sequence[Message], response: str) -> list[Message]:
        """The messages that ask for the topic of a conversation; there is no response to it yet."""
        turns = "\n\n".join(m["content"] for m in messages if m["role"] == "user")
        listed = "\n".join(f"- {name}" for name in self.coarse)
        asked = self.prompt.replace("{topics}", listed).replace("{conversation}", turns)
        return [{"role": "user", "content": asked}]

    def regex(self) -> str:
        """A pattern of exactly the names, for guided decoding."""
        return "(" + "|".join(re.escape(name) for name in self.coarse) + ")"

    def parse(self, text: str) -> dict[str, float]:
        """The topic's place in the list; UnusableAnswer for anything but a name on it."""
        name = _bare(text)
        places = {_bare(known): place for place, known in enumerate(self.coarse)}
        if name not in places:
            raise UnusableAnswer("the answer is no topic on the list")
        return {"topic": float(places[name])}


def _bare(name: str) -> str:
    return name.strip().strip("-*\"'. ").casefold()


def choice(file: str | None = None) -> TopicChoice:
    """The question for a topic of the file, or of those that ship."""
    coarse, prompt = topics(file), PROMPT.replace(COUNSELLING, ANY) if file else PROMPT
    return TopicChoice("topics", 0, len(coarse) - 1, "client", (), prompt, "", coarse=coarse)


def topic_judge(config: Config) -> Judge | None:
    """The engine that picks topics; None where none is configured, PsyrayError for one that cannot be or a budget."""
    if config.topics is None:
        return None
    if config.topics.engine == "rule":
        raise PsyrayError("topics.engine is rule, which knows no topics; use vllm or http")
    if config.topics.budget is not None:
        raise PsyrayError("topics.budget bounds nothing: topics are not in the label ledger; use topics.max_cost")
    section = config.topics.model_copy(update={"mode": "json"})
    return make_judge(section, choice(section.file), config.engine, config.cluster.wait_s)


def topics_stage(run: Run, config: Config, speeches: Artifact) -> Artifact | None:
    """The stage `topics`: a row of TOPICS for each speech; None where no engine is configured."""
    section, judge = config.topics, topic_judge(config)
    if section is None or judge is None:
        return None
    asked = choice(section.file)

    def make(folder: Folder) -> Mapping[str, Any]:
        parts = folder.parts(TOPICS, "speech_id")
        given = _given(speeches)
        while batch := list(islice(given, ROWS_IN_MEMORY)):
            parts.append(batch)
        count = int(speeches.manifest["rows"])
        keep = partial(_keep, parts, judge.id, asked.coarse)
        todo = _open(speeches, parts)
        rate = partial(judge.rate, folder=folder.path / CALLS)
        stream(folder, todo, rate, keep, title="topics", schema=ASKED, total=count, done=len(parts.ids))
        check_share(parts, Ceiling(section.max_invalid_share, "topics.max_invalid_share"))
        parts.finish()
        return summary(parts)

    settings = {"engine": judge.id, "prompt": asked.prompt, "topics": content_id(asked.coarse)}
    return run.stage("topics", settings, [speeches], make)


def _given(speeches: Artifact) -> Iterator[Row]:
    for row in speeches.each(["speech_id", "topic", "subtopic"]):
        if row["topic"]:
            yield row | {"by": "column", "status": Status.OK, "attempts": 0}


def _open(speeches: Artifact, parts: Parts) -> Iterator[Row]:
    for row in speeches.each(["speech_id", "messages"]):
        if row["speech_id"] not in parts.ids:
            yield {"key": row["speech_id"], "messages": row["messages"], "response": ""}


def _keep(parts: Parts, by: str, coarse: Mapping[str, str], results: Sequence[Row]) -> None:
    parts.append(topic_row(result, by, coarse) for result in results)


def topic_row(result: Row, by: str, coarse: Mapping[str, str]) -> Row:
    """The TOPICS row that an engine's answer makes."""
    fine = list(coarse)[int(json.loads(result["ratings"])["topic"])] if result["ratings"] else None
    return {
        "speech_id": result["key"],
        "topic": coarse[fine] if fine else None,
        "subtopic": fine,
        "by": by,
        "status": Status.OK if fine else Status.INVALID,
        "error": result["error"],
        "raw_text": result["raw_text"],
        "attempts": result["attempts"],
    }


def check_share(parts: Parts, ceiling: Ceiling) -> None:
    """PsyrayError where too large a share of the answers is invalid; those are set aside, to be asked anew."""
    asked = [row for row in parts.each(["speech_id", "by", "status", "error"]) if row["by"] != "column"]
    bad = {row["speech_id"]: row["error"] for row in asked if row["status"] != Status.OK}

    def mend() -> str:
        return (
            f"They are in {parts.set_aside(set(bad))}; mend the cause, or raise the ceiling, and run the same command "
            "again: the good ones are kept"
        )

    check_ceiling("topics", "answers are invalid", Counter(bad.values()), len(asked), ceiling, mend)


def summary(parts: Parts) -> dict[str, Any]:
    """How many speeches each topic has, where it comes from, and how many have none."""
    counts: dict[str, Any] = {"column": 0, "engine": 0, "invalid": 0, "topics": {}}
    for row in parts.each(["topic", "by", "status"]):
        if row["status"] == Status.OK:
            counts["column" if row["by"] == "column" else "engine"] += 1
            counts["topics"][row["topic"]] = counts["topics"].get(row["topic"], 0) + 1
        else:
            counts["invalid"] += 1
    return counts

"""A labelled set as an oracle: what it says of a pair is the answer, and of a pair that it lacks there is none.

The set is what `speeches.sources` reads with `use: pairs`: a conversation, chosen and rejected, as JSONL, CSV, Parquet
or a data set's folder, in psyray's own columns or the published ones. It is read once a round, row by row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from psyray.active.ledger import Answer, Question
from psyray.active.oracles import Label, Pair, buy, pair_question
from psyray.data.judge import Desk
from psyray.data.ready import pairs_of
from psyray.data.scrub import scrubber
from psyray.data.sources import identity, layout, open_source
from psyray.errors import PsyrayError
from psyray.records import Verdict, content_id, normalise, speech_id
from psyray.run import Folder
from psyray.sections.data import SourceSection
from psyray.sections.learning import OracleSection

UNKNOWN = "not in the set: it holds no pair of these two responses to this conversation"


@dataclass(frozen=True)
class LabelledPairs:
    """The oracle `replay`. A pair that the set holds both ways equally often is a tie."""

    desk: Desk
    source: SourceSection
    scrub: str  # as the run's speeches: texts are compared as they are after it

    @cached_property
    def content(self) -> str:
        """Changes with what is in the set."""
        return identity(self.source)

    @property
    def id(self) -> str:
        """Changes with the set's content."""
        return f"replay-{self.content}"

    @property
    def identity(self) -> dict[str, Any]:
        """The set, and how its texts are scrubbed."""
        return {"replay": self.content, "scrub": self.scrub, "rubric": self.desk.rubric.id}

    def label(
        self, folder: Folder, asked: Sequence[Pair], *, purpose: str, strategy: str, budget: int
    ) -> tuple[list[Label | None], dict[str, Any]]:
        """What the set says of each pair, in order, invalid where it knows nothing; counts, and `unknown`."""
        questions = [
            pair_question(self.id, self.desk.rubric.id, self.scrub, (a, b), strategy, why) for a, b, why in asked
        ]
        labels, counts = buy(self.desk, questions, self.put, purpose=purpose, budget=budget)
        unknown = sum(label is not None and label[2].get("error") == UNKNOWN for label in labels)
        return labels, counts | {"unknown": unknown}

    def put(self, questions: Sequence[Question]) -> None:
        """Have the ledger hold what the set says."""
        wanted = {pair_key(q.payload["messages"], q.payload["a"], q.payload["b"]) for q in questions}
        said = self._said(wanted) if wanted else Counter[tuple[str, str]]()
        self.desk.ledger.answer(self._answer(question, said) for question in questions)

    def _said(self, wanted: set[str]) -> Counter[tuple[str, str]]:
        """For each wanted pair how often the set chose which text: (pair, chosen) -> rows."""
        said: Counter[tuple[str, str]] = Counter()
        rows = pairs_of(self.source, self.desk.rubric, scrubber(self.scrub), Counter())
        for row in tqdm(rows, desc="labelled set", unit="pairs", mininterval=1):
            key = pair_key(row["messages"], row["chosen"], row["rejected"])
            if key in wanted:
                said[key, normalise(row["chosen"])] += 1
        return said

    def _answer(self, question: Question, said: Counter[tuple[str, str]]) -> Answer:
        a, b = question.payload["a"], question.payload["b"]
        key = pair_key(question.payload["messages"], a, b)
        for_a, for_b = said[key, normalise(a)], said[key, normalise(b)]
        if not for_a + for_b:
            return Answer(question.question_id, ok=False, answer=None, error=UNKNOWN, who=self.id)
        verdict = Verdict.A if for_a > for_b else Verdict.B if for_b > for_a else Verdict.TIE
        answer = {"verdict": verdict, "margin": (for_a - for_b) / (for_a + for_b), "rows": for_a + for_b}
        return Answer(question.question_id, ok=True, answer=answer, who=self.id)


def labelled_source(section: OracleSection) -> SourceSection:
    """The configured set; PsyrayError where there is none, or it holds no pairs."""
    path = Path(section.path or "").expanduser()
    if not path.exists():
        raise PsyrayError(f"no labelled set at {path} (oracle.path)")
    source = SourceSection(name="oracle.path", path=str(path), use="pairs")
    if missing := {"chosen", "rejected"} - set(columns := open_source(source).columns):
        raise PsyrayError(
            f"{path} (oracle.path) has no column {', '.join(sorted(missing))}; it has {', '.join(columns)}"
        )
    layout(source, columns)
    return source


def pair_key(messages: Sequence[dict[str, str]], first: str, second: str) -> str:
    """The same for the same two texts in answer to the same conversation, whichever comes first."""
    return content_id("pair", speech_id(messages), sorted((normalise(first), normalise(second))))

"""An oracle that errs at a known rate, for studies: another one, with some of its verdicts turned round."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from psyray.active.ledger import Answer, Question
from psyray.active.oracles import Label, Pair, buy, exchanged, pair_question
from psyray.data.judge import Desk
from psyray.records import Verdict, content_id
from psyray.run import Folder

if TYPE_CHECKING:
    from psyray.active.oracle_kinds import Oracle


@dataclass(frozen=True)
class Noisy:
    """A verdict for A or B is flipped with probability `flip`, drawn from `seed` and the question's texts.

    So a question errs in every run or in none, whoever answers it, and what errs at a lower rate errs at a higher one
    too. It is the whole answer that is turned round, ratings and votes with the verdict, as if the two responses had
    been mistaken for each other: what it says of them fits its verdict, and a veto holds for it as for the other. Ties
    and invalid answers stay as they are. The answers that were bought and the flipped ones are both in the
    ledger, the latter for `PURPOSE/noisy`, at no cost, with a `who` that says so.
    """

    desk: Desk
    of: Oracle
    flip: float
    seed: int

    @property
    def id(self) -> str:
        """Names the noise and whose answers they were."""
        return f"noisy {self.flip:g} seed {self.seed} of {self.of.id}"

    @property
    def identity(self) -> dict[str, Any]:
        """That of the oracle beneath, and the noise."""
        return self.of.identity | {"noise": {"flip": self.flip, "seed": self.seed}}

    def label(
        self, folder: Folder, asked: Sequence[Pair], *, purpose: str, strategy: str, budget: int
    ) -> tuple[list[Label | None], dict[str, Any]]:
        """The labels of the oracle beneath, some of them flipped, its counts, and `flipped`."""
        labels, counts = self.of.label(folder, asked, purpose=purpose, strategy=strategy, budget=budget)
        valid = [i for i, label in enumerate(labels) if label and label[0] is not Verdict.INVALID]
        questions = [self._question(asked[i], strategy) for i in valid]
        heard = {
            question.question_id: (labels[i], flipped) for i, (question, flipped) in zip(valid, questions, strict=True)
        }

        def answer(due: Sequence[Question]) -> None:
            self.desk.ledger.answer(self._answer(question, *heard[question.question_id]) for question in due)

        noisy, _ = buy(self.desk, questions, answer, purpose=f"{purpose}/noisy", budget=None)
        found = list(labels)
        for i, label in zip(valid, noisy, strict=True):
            found[i] = label
        return found, counts | {"flipped": sum(bool(label and label[2]["flipped"]) for label in noisy)}

    def errs(self, payload: dict[str, Any]) -> bool:
        """Whether the verdict on these texts is turned round."""
        return random.Random(content_id("noise", self.seed, payload)).random() < self.flip

    def _question(self, pair: Pair, strategy: str) -> tuple[Question, bool]:
        a, b, why = pair
        return pair_question(self.id, self.desk.rubric.id, self.of.identity, (a, b), strategy, why)

    def _answer(self, question: Question, label: Label | None, swapped: bool) -> Answer:
        assert label is not None
        verdict, margin, said = label
        flipped = self.errs(question.payload) and verdict is not Verdict.TIE
        heard = said | {"verdict": verdict, "margin": margin, "flipped": flipped}
        answer = heard if swapped == flipped else exchanged(heard)
        return Answer(question.question_id, ok=True, answer=answer, who=self.id)

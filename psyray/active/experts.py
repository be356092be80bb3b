"""People as an oracle: a round's questions are put into the expert queue, and the round goes on when they are answered.

Nothing is lost by a stop while it waits: the same command finds the questions where they were, and what was answered
meanwhile. The experts' page is an application of its own (serve/annotate.py) and needs no running round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from psyray.active import oracles
from psyray.active.ledger import Question
from psyray.active.oracles import Label, Pair, buy, pair_question
from psyray.active.queue import ExpertQueue
from psyray.active.votes import Vote, among
from psyray.active.waiting import Wait
from psyray.data.judge import Desk
from psyray.errors import PsyrayError
from psyray.in_words import duration
from psyray.run import Folder
from psyray.sections.learning import OracleSection
from psyray.stream import Progress

UNANSWERED = "unanswered: too few experts in the time given"
POLL_S = 1.0
LOOK_S = 30.0  # how often a round that waits looks whether it waits for nobody
AGAIN_S = 3600.0  # and says so again where nothing has changed


@dataclass(frozen=True)
class Experts:
    """The oracle `experts`: `oracle.overlap` people answer each question, and their majority is the label.

    When `oracle.wait_s` have passed since the questions were put to them, what is missing goes by `oracle.fall_back`:
    the judge answers it, it is left out (as if the budget had not reached), or the run stops.
    """

    desk: Desk
    section: OracleSection
    say: Callable[[str], None] = print
    poll_s: float = POLL_S
    look_s: float = LOOK_S

    @property
    def id(self) -> str:
        """People have no version: who they were is in each answer."""
        return "experts"

    @property
    def identity(self) -> dict[str, Any]:
        """How many answer, and the judge where it may have to."""
        judge = self.desk.labels_identity if self.section.fall_back == "judge" else {"rubric": self.desk.rubric.id}
        return judge | {"experts": {"overlap": self.section.overlap, "fall_back": self.section.fall_back}}

    def label(
        self, folder: Folder, asked: Sequence[Pair], *, purpose: str, strategy: str, budget: int
    ) -> tuple[list[Label | None], dict[str, Any]]:
        """The experts' labels in order, with those of the fall-back; counts, `unanswered` for the latter, `by_judge`
        for what it was asked of them, and under `experts` how far people agreed (`votes.among`)."""
        questions = [
            pair_question("experts", self.desk.rubric.id, self.section.overlap, (a, b), strategy, why)
            for a, b, why in asked
        ]
        labels, counts = buy(self.desk, questions, partial(self.put, folder, purpose), purpose=purpose, budget=budget)
        said = [label[2]["experts"] for label in labels if label and "experts" in label[2]]
        agreed = among([{one["expert"]: Vote(one["vote"]) for one in each} for each in said])
        missing = [i for i, label in enumerate(labels) if label and label[2].get("error") == UNANSWERED]
        instead: list[Label | None] = [None] * len(missing)
        if missing and self.section.fall_back == "judge":
            left = [asked[i] for i in missing]
            instead, judged = oracles.label(
                folder, self.desk, left, purpose=f"{purpose}/judge", strategy=strategy, budget=len(left)
            )
            counts["by_judge"] = {key: judged[key] for key in ("asked", "bought", "reused")}
        for i, label in zip(missing, instead, strict=True):
            labels[i] = label
        return labels, counts | {"unanswered": len(missing), "experts": agreed}

    def put(self, folder: Folder, purpose: str, questions: Sequence[Question]) -> None:
        """Have the ledger hold the experts' answers, or failures where time ran out; PsyrayError to stop."""
        queue, ids = ExpertQueue(self.desk.ledger.database), [q.question_id for q in questions]
        if dropped := queue.drop(self.desk.run_id, purpose, ids):
            self.say(f"{purpose}: {dropped} questions of before the settings changed are no longer put to experts")
        if not ids:
            return
        queue.open(questions, self.section.overlap)
        self._say_how(len(ids))
        if self._wait(folder, queue, ids, purpose):
            return
        missing = len(queue.still_open(ids))
        if self.section.fall_back == "stop":
            raise PsyrayError(
                f"{purpose}: {missing} of {len(ids)} questions have no answer by {self.section.overlap} experts "
                f"after {duration(self.section.wait_s)}; nothing is lost. When they are answered the same command "
                "goes on; or raise oracle.wait_s, or set oracle.fall_back to judge or leave_out"
            )
        failed = queue.withdraw(ids, UNANSWERED, self.section.price)
        self.say(f"{purpose}: {failed} of {len(ids)} questions go by oracle.fall_back {self.section.fall_back}")

    def _say_how(self, count: int) -> None:
        wait = f"for {duration(self.section.wait_s)}" if self.section.wait_s is not None else "until they are answered"
        run = "RUN" if "://" in self.desk.run_id else self.desk.run_id  # a mirror's address is no folder
        self.say(
            f"{count} questions wait for {self.section.overlap} experts each, {wait}; their page: "
            f"RAY_ADDRESS=local serve run serve.annotate:build run={run} keys=FILE"
        )

    def _wait(self, folder: Folder, queue: ExpertQueue, ids: Sequence[str], title: str) -> bool:
        """Whether all questions are settled; False when their time is over, after which nobody may undo any more."""
        with Progress(folder, f"{title}: experts", len(ids) * self.section.overlap, unit="answers") as progress:
            over, lookout = False, self._lookout(title)
            while True:
                next(lookout)
                queue.settle(ids, undo_s=0 if over else self.section.undo_s, price=self.section.price)
                progress.reach(queue.progress(question_ids=ids)["given"])
                opened = queue.still_open(ids)
                if over or not opened:
                    return not opened
                over = self.section.wait_s is not None and time.time() >= max(opened.values()) + self.section.wait_s
                if not over:
                    time.sleep(self.poll_s)

    def _lookout(self, title: str) -> Iterator[None]:
        """Say now and then, between two looks at the queue, that a round waits for nobody and how to mend it."""
        queue = ExpertQueue(self.desk.ledger.database, {self.desk.run_id})
        looked, told, told_at = time.monotonic(), "", -AGAIN_S
        while True:
            now = time.monotonic()
            if now >= looked + self.look_s:
                looked, wait = now, Wait(queue.waiting())
                if wait.stuck and (wait.told() != told or now >= told_at + AGAIN_S):
                    told, told_at = wait.told(), now
                    self.say(f"{title}: {told}")
            yield

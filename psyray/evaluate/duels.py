"""The policy's answer against the start's, speech by speech: who won by a judge, and what that comes to.

A judge that rates gives a verdict by its two ratings, so there is no order that could sway it. One that compares sees
each pair in both orders, and where it contradicts itself that is a tie. An empty answer loses to one that is not, and
no judge is asked: else a policy that falls silent would be measured where it still speaks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from psyray.active.oracles import Label, Pair, label
from psyray.ceiling import check_ceiling
from psyray.data.judge import CHANGE_THE_JUDGE, Desk, buy, check_share, settled
from psyray.engines import journal
from psyray.errors import PsyrayError
from psyray.evaluate.winrate import length_controlled, length_controlled_interval, outcomes, win_rate
from psyray.records import Comparison, Row, Status, Verdict, compare
from psyray.run import Artifact, Folder, Run
from psyray.stream import CALLS

VERDICTS = pa.schema(
    [
        ("speech_id", pa.string()),
        ("policy_id", pa.string()),
        ("start_id", pa.string()),
        ("judge", pa.string()),
        ("verdict", pa.string()),  # A: the policy won, B: the start
        ("margin", pa.float32()),
    ]
)


@dataclass(frozen=True)
class Duel:
    """Two answers to one speech."""

    policy: Row
    start: Row

    @property
    def speech(self) -> str:
        """The speech's id."""
        return str(self.policy["speech_id"])


def held_out(samples: Artifact) -> list[Row]:
    """The answers to held-out speeches."""
    return [row for row in samples.each() if row["split"] == "test"]


def by_speech(answers: Sequence[Row], first: Sequence[Row]) -> list[Duel]:
    """The two answers to each speech, joined by id."""
    start = {row["speech_id"]: row for row in first}
    return [Duel(row, start[row["speech_id"]]) for row in answers]


def silence(duel: Duel) -> Verdict | None:
    """Who won where one of the two said nothing; None where both spoke, both were silent, or an engine failed."""
    policy, start = duel.policy["status"], duel.start["status"]
    return {(Status.INVALID, Status.OK): Verdict.B, (Status.OK, Status.INVALID): Verdict.A}.get((policy, start))


def by_scores(duels: Sequence[Duel], judged: Sequence[Row], tie_margin: float) -> list[Comparison]:
    """Who won by JUDGEMENTS rows; one that is not usable makes the verdict invalid, never a number."""
    score = {row["response_id"]: row["score"] for row in judged if row["status"] == Status.OK}

    def side(row: Row) -> tuple[str, float | None]:
        return row["response_id"], score.get(row["response_id"])

    def verdict(duel: Duel) -> Comparison:
        policy, start = side(duel.policy), side(duel.start)
        if told := silence(duel):
            return Comparison(duel.speech, policy[0], start[0], told)
        return compare(duel.speech, policy, start, tie_margin)

    return [verdict(duel) for duel in duels]


def side_by_side(
    folder: Folder, desk: Desk, duels: Sequence[Duel], *, purpose: str, budget: int | None = None
) -> list[Comparison]:
    """Who won by a judge that compares, as far as the budget reaches; equal texts are a tie that nobody is asked about.

    PsyrayError where more than `max_invalid_share` of the answers cannot be used.
    """
    asked = [d for d in duels if d.policy["text"] and d.start["text"] and d.policy["text"] != d.start["text"]]
    pairs: list[Pair] = [(d.policy, d.start, {}) for d in asked]
    labels = label(folder, desk, pairs, purpose=purpose, strategy="", budget=budget)[0] if pairs else []
    check_invalid([one for one in labels if one is not None], desk, purpose)
    found = {d.speech: one for d, one in zip(asked, labels, strict=True) if one is not None}
    unasked = {d.speech for d in asked} - set(found)

    def verdict(duel: Duel) -> Comparison:
        ids = duel.policy["response_id"], duel.start["response_id"]
        if duel.speech in found:
            return Comparison(duel.speech, *ids, *found[duel.speech][:2])
        same = duel.policy["text"] and duel.policy["text"] == duel.start["text"]
        return Comparison(duel.speech, *ids, Verdict.TIE if same else silence(duel) or Verdict.INVALID)

    return [verdict(duel) for duel in duels if duel.speech not in unasked]


def by_ratings(
    folder: Folder, desk: Desk, duels: Sequence[Duel], *, purpose: str, budget: int | None
) -> list[Comparison]:
    """Who won by a judge that rates, where the budget reaches for both answers.

    PsyrayError where more than `max_invalid_share` of its answers cannot be used.
    """
    answers = [answer for duel in duels for answer in (duel.policy, duel.start)]
    buy(folder, desk, lambda: answers, len(answers), purpose, budget)
    judged = [row for rows in settled(desk, lambda: answers) for row in rows]
    check_share(judged, desk, purpose)
    known = {row["response_id"] for row in judged}

    def reached(row: Row) -> bool:
        return row["status"] != Status.OK or row["response_id"] in known  # nobody is asked about one that failed

    both = [duel for duel in duels if reached(duel.policy) and reached(duel.start)]
    return by_scores(both, judged, desk.section.tie_margin)


def check_invalid(labels: Sequence[Label], desk: Desk, purpose: str) -> None:
    """PsyrayError where too large a share of the comparisons cannot be used; the answers stay in the ledger."""
    bad = Counter(str(said.get("error") or "invalid") for verdict, _, said in labels if verdict is Verdict.INVALID)
    what = f"pairs of held-out answers have no usable verdict by the judge {desk.judge.id}"
    check_ceiling(purpose, what, bad, len(labels), desk.ceiling, lambda: CHANGE_THE_JUDGE)


def second_stage(run: Run, number: int, desk: Desk, samples: Artifact, first: Artifact) -> Artifact:
    """The stage `round-N/second`: VERDICTS of a second judge on the held-out answers of the policy and the start.

    Ratings of the start's answers are in the ledger from the second round on and are not bought again. With
    `evaluate.second.budget` it has verdicts on as many speeches as that reaches, by the order of their ids.
    """
    budget = desk.section.budget

    def make(folder: Folder) -> Mapping[str, Any]:
        duels = sorted(by_speech(held_out(samples), held_out(first)), key=lambda duel: duel.speech)
        graded = side_by_side if desk.section.form == "pairwise" else by_ratings
        compared = graded(folder, desk, duels, purpose=f"second-{number}", budget=budget)
        folder.keep(VERDICTS, "speech_id", verdict_rows(compared, desk))
        won = graded_by(duels, {c.speech_id: c.verdict for c in compared})
        return {"judge": desk.judge.id} | won | journal.stats(folder.path / CALLS)

    settings = desk.labels_identity | ({} if budget is None else {"budget": budget})
    return run.stage(f"round-{number}/second", settings, [samples, first], make)


def graded_by(duels: Sequence[Duel], verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    """`grade` by a second judge's verdicts, by speech; `unasked` counts what its budget did not reach.

    PsyrayError where it reached nothing.
    """
    asked = [duel for duel in duels if duel.speech in verdicts]
    if duels and not asked:
        raise PsyrayError(
            f"evaluate.second.budget reached none of {len(duels)} held-out speeches: raise it (what earlier versions "
            "of a round bought counts), or give the changed run a run.path of its own, where answers that the ledger "
            "knows are free"
        )
    unasked = len(duels) - len(asked)
    return grade(asked, [verdicts[duel.speech] for duel in asked]) | ({"unasked": unasked} if unasked else {})


def verdict_rows(compared: Sequence[Comparison], desk: Desk) -> list[Row]:
    """VERDICTS rows."""
    return [
        {"speech_id": c.speech_id, "policy_id": c.a_id, "start_id": c.b_id, "judge": desk.judge.id,
         "verdict": c.verdict, "margin": c.margin}
        for c in compared
    ]  # fmt: skip


def grade(duels: Sequence[Duel], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Win rate over the start, raw and at equal length, each with its interval; PsyrayError without a valid verdict."""
    won = win_rate(verdicts, [duel.speech for duel in duels])
    valid = [(duel, v) for duel, v in zip(duels, verdicts, strict=True) if v is not Verdict.INVALID]
    if not valid:
        raise PsyrayError("no held-out speech has two answers that the judge could grade: there is nothing to compare")
    longer = [len(duel.policy["text"] or "") - len(duel.start["text"] or "") for duel, _ in valid]
    outcome_N = outcomes([v for _, v in valid])
    low, high = length_controlled_interval(outcome_N, longer, [duel.speech for duel, _ in valid])
    controlled = {"length_controlled": length_controlled(outcome_N, longer)}
    controlled |= {"length_controlled_low": low, "length_controlled_high": high}
    counts = {name: getattr(won, name) for name in ("low", "high", "wins", "ties", "losses", "invalid")}
    return {"win_rate": won.rate} | controlled | counts

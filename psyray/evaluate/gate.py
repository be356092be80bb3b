"""The gate of a round: the policy against the start on held-out speeches, and whether it may go on.

Verdicts come from pointwise ratings, so there is no order of presentation that could sway them. The reward model
gives a second opinion, which is reported and decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from psyray.config import Config, EvaluateSection
from psyray.data.generate import summary as response_summary
from psyray.data.judge import Desk, judge
from psyray.data.judge import summary as judgement_summary
from psyray.errors import PsyrayError
from psyray.evaluate.winrate import length_controlled, outcomes, win_rate
from psyray.records import Comparison, Row, Status, Verdict, compare
from psyray.run import Artifact, Folder, Run


def gate_stage(
    run: Run,
    number: int,
    config: Config,
    desk: Desk,
    samples: Artifact,
    scores: Artifact,
    start: tuple[Artifact, Artifact, Artifact] | None,
) -> Artifact:
    """The stage `round-N/gate`; `start` is (samples, scores, gate) of round 0, None for round 0 itself."""
    settings = desk.identity | config.evaluate.model_dump() | {"tie_margin": desk.section.tie_margin}

    def make(folder: Folder) -> Mapping[str, Any]:
        answers = held_out(samples)
        parts = judge(folder, desk, lambda: answers, len(answers), purpose=f"evaluation-{number}", budget=None)
        parts.finish()
        judged = list(parts.each())
        stats = response_summary(answers) | judgement_summary(lambda: judged, desk) | {"n": len(answers)}
        if start is None:
            return stats | {"win_rate": 0.5, "passed": True, "reasons": [], "start_words": stats["mean_words"]}
        first_samples, first_scores, first_gate = start
        pairs = by_speech(answers, judged, held_out(first_samples), first_gate.rows())
        stats |= against_start(pairs, desk.section.tie_margin)
        stats |= second_opinion(pairs, scores.rows() + first_scores.rows())
        stats |= {"start_words": first_gate.stats["mean_words"]}
        stats["length_change"] = stats["mean_words"] / stats["start_words"] - 1 if stats["start_words"] else 0.0
        reasons = failures(stats, first_gate.stats, config.evaluate)
        return stats | {"passed": not reasons, "reasons": reasons}

    inputs = [samples, scores, *(start or ())]
    return run.stage(f"round-{number}/gate", settings, inputs, make)


def held_out(samples: Artifact) -> list[Row]:
    """The answers to held-out speeches."""
    return [row for row in samples.rows() if row["split"] == "test"]


Duel = tuple[Row, Row]  # the policy's and the start's answer to one speech, each with `score`


def by_speech(
    answers: Sequence[Row], judged: Sequence[Row], first_answers: Sequence[Row], first_judged: Sequence[Row]
) -> list[Duel]:
    """The two answers to each speech, joined by id; a failed or unrated answer has the score None."""
    score = {row["response_id"]: row["score"] for row in (*judged, *first_judged) if row["status"] == Status.OK}
    first = {row["speech_id"]: row for row in first_answers}
    scored = [(row | {"score": score.get(row["response_id"])}, first[row["speech_id"]]) for row in answers]
    return [(row, other | {"score": score.get(other["response_id"])}) for row, other in scored]


def _compare(duel: Duel, tie_margin: float) -> Comparison:
    a, b = duel
    return compare(a["speech_id"], (a["response_id"], a["score"]), (b["response_id"], b["score"]), tie_margin)


def against_start(duels: Sequence[Duel], tie_margin: float) -> dict[str, Any]:
    """Win rate over the start with its interval, raw and at equal length."""
    compared = [_compare(duel, tie_margin) for duel in duels]
    won = win_rate([c.verdict for c in compared], [c.speech_id for c in compared])
    valid = [(c, a, b) for c, (a, b) in zip(compared, duels, strict=True) if c.verdict is not Verdict.INVALID]
    if not valid:
        raise PsyrayError("no held-out speech has two rated answers, so there is nothing to compare")
    outcome_N = outcomes([c.verdict for c, _, _ in valid])
    controlled = length_controlled(outcome_N, [len(a["text"]) - len(b["text"]) for _, a, b in valid])
    counts = {name: getattr(won, name) for name in ("low", "high", "wins", "ties", "losses", "invalid")}
    return {"win_rate": won.rate, "length_controlled": controlled} | counts


def second_opinion(duels: Sequence[Duel], scores: Sequence[Row]) -> dict[str, float]:
    """The win rate by the reward model's mean score."""
    mean = {row["response_id"]: row["mean"] for row in scores}
    known = [(mean[a["response_id"]], mean[b["response_id"]]) for a, b in duels
             if a["response_id"] in mean and b["response_id"] in mean]  # fmt: skip
    return {"reward_win_rate": sum(a > b for a, b in known) / len(known)} if known else {}


def failures(stats: Mapping[str, Any], start: Mapping[str, Any], section: EvaluateSection) -> list[str]:
    """Why the policy may not go on; empty if it may."""
    rise = stats["repeated_share"] - start["repeated_share"]
    checks = [
        (
            stats["low"] > section.min_win_rate,
            f"win rate {stats['win_rate']:.2f} is not surely above {section.min_win_rate:.2f} "
            f"(interval {stats['low']:.2f} to {stats['high']:.2f})",
        ),
        (
            abs(stats["length_change"]) <= section.max_length_change,
            f"mean length changed by {stats['length_change']:+.0%}, allowed are {section.max_length_change:.0%}",
        ),
        (rise <= section.max_repeat_rise, f"looping replies rose by {rise:.0%}"),
    ]
    return [reason for passed, reason in checks if not passed]

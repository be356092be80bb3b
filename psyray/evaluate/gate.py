"""The gate of a round: the policy against the start on held-out speeches, and whether it may go on.

The judge's ratings give mean score and principles, and the verdicts too unless it compares (`judge.form: pairwise`):
then the two answers are put to it side by side, in both orders. The reward model gives an opinion that decides nothing;
a second judge (`evaluate.second`) decides only where it is told to. The probe says what the policy lost on the way.

With `evaluate.dev_share` that share of the held-out speeches decides, and choosing among rounds goes by it as well;
the others are reported as `test` and decide nothing. Without it one set does both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from psyray.config import Config
from psyray.data.generate import summary as response_summary
from psyray.data.judge import Desk, judge
from psyray.data.judge import summary as judgement_summary
from psyray.errors import PsyrayError
from psyray.evaluate.duels import (
    VERDICTS,
    Duel,
    by_scores,
    by_speech,
    grade,
    graded_by,
    held_out,
    side_by_side,
    verdict_rows,
)
from psyray.files import write_parquet
from psyray.records import Row, Verdict, conversation_id, in_share, table
from psyray.reward.metrics import accuracy
from psyray.run import Artifact, Folder, Run
from psyray.sections.learning import LEAST_SPEECHES, EvaluateSection

TEST = "test"  # under this key the numbers of the speeches that decide nothing


@dataclass(frozen=True)
class Start:
    """Round 0 as later rounds need it."""

    samples: Artifact
    scores: Artifact
    gate: Artifact


def gate_stage(
    run: Run,
    number: int,
    config: Config,
    desk: Desk,
    samples: Artifact,
    scores: Artifact,
    start: Start | None,
    probe: Artifact | None = None,
    second: Artifact | None = None,
) -> Artifact:
    """The stage `round-N/gate`; `start` is None for round 0 itself, which leaves what the others are held against.

    Beside the JUDGEMENTS of the answers it leaves `verdicts.parquet`.
    """
    section, least = config.evaluate, config.speeches.min_chars
    settings = desk.labels_identity | section.model_dump(exclude={"second"})

    def make(folder: Folder) -> Mapping[str, Any]:
        answers = held_out(samples)
        parts = judge(folder, desk, lambda: answers, len(answers), purpose=f"evaluation-{number}", bounded=False)
        parts.finish()
        found = Graded(answers, list(parts.each()), desk)
        if start is None:
            stats = by_part(found.on_its_own, answers, section.dev_share, least)
            return stats | {"win_rate": 0.5, "passed": True, "reasons": [], "start_words": stats["mean_words"]}
        duels = by_speech(answers, held_out(start.samples))
        if desk.section.form == "pairwise":
            compared = side_by_side(folder, desk, duels, purpose=f"duels-{number}")
        else:
            compared = by_scores(duels, [*found.judged, *start.gate.each()], desk.section.tie_margin)
        write_parquet(folder.path / "verdicts.parquet", table(verdict_rows(compared, desk), VERDICTS))

        def measured(keep: Keep) -> dict[str, Any]:
            mine = [(d, c.verdict) for d, c in zip(duels, compared, strict=True) if keep(d.speech)]
            stats = found.on_its_own(keep) | grade(*_columns(mine))
            stats |= reward_opinion([d for d, _ in mine], [*scores.each(), *start.scores.each()])
            if second:
                stats["second"] = {"judge": second.stats["judge"]} | second_grade([d for d, _ in mine], second.each())
            return stats

        stats = by_part(measured, answers, section.dev_share, least)
        for part, first in ((stats, start.gate.stats), (stats.get(TEST), start.gate.stats.get(TEST))):
            if part and first:
                part["start_words"] = first["mean_words"]
                part["length_change"] = part["mean_words"] / first["mean_words"] - 1 if first["mean_words"] else 0.0
        stats |= {"probe": probe.stats} if probe else {}
        reasons = failures(stats, start.gate.stats, section)
        return stats | {"passed": not reasons, "reasons": reasons}

    inputs = [samples, scores, *([start.samples, start.scores, start.gate] if start else [])]
    inputs += [extra for extra in (probe, second) if extra]
    return run.stage(f"round-{number}/gate", settings, inputs, make)


Keep = Callable[[str], bool]  # whether a speech, by its id, is of the part


def by_part(
    measure: Callable[[Keep], dict[str, Any]], answers: Sequence[Row], dev_share: float, least: int
) -> dict[str, Any]:
    """The numbers of the speeches that decide, and under `test` those of the others, if there are any.

    Drawn by hash, whole conversations (`least`: see `conversation_id`), the same in every round and run. PsyrayError
    where a share is wanted and one of the parts has no speech.
    """
    if not dev_share:
        return measure(lambda speech: True)
    of = {row["speech_id"]: conversation_id(row["speech_id"], row["messages"], least) for row in answers}
    deciding = {speech for speech, conversation in of.items() if in_share(dev_share, "dev", conversation)}
    if not 0 < len(deciding) < len(of):
        raise PsyrayError(
            f"evaluate.dev_share {dev_share} puts {len(deciding)} of {len(of)} held-out speeches into the part that "
            "decides: hold out more (speeches.test_share, evaluate.speeches), or choose another share"
        )
    stats = measure(lambda speech: speech in deciding)
    return stats | {TEST: measure(lambda speech: speech not in deciding)}


@dataclass(frozen=True)
class Graded:
    """A policy's held-out answers and what the judge rated them."""

    answers: Sequence[Row]
    judged: Sequence[Row]
    desk: Desk

    def on_its_own(self, keep: Keep) -> dict[str, Any]:
        """Lengths, loops, cut-offs and ratings of a part."""
        answers = [row for row in self.answers if keep(row["speech_id"])]
        judged = [row for row in self.judged if keep(row["speech_id"])]
        return response_summary(answers) | judgement_summary(lambda: judged, self.desk) | {"n": len(answers)}


def _columns(mine: Sequence[tuple[Duel, Verdict]]) -> tuple[list[Duel], list[Verdict]]:
    return [duel for duel, _ in mine], [verdict for _, verdict in mine]


def reward_opinion(duels: Sequence[Duel], scores: Sequence[Row]) -> dict[str, float]:
    """The win rate by the reward model's mean score, a tie half."""
    mean = {row["response_id"]: row["mean"] for row in scores}
    ids = [(duel.policy["response_id"], duel.start["response_id"]) for duel in duels]
    gaps = [mean[a] - mean[b] for a, b in ids if a in mean and b in mean]
    return {"reward_win_rate": accuracy(np.asarray(gaps))} if gaps else {}


def second_grade(duels: Sequence[Duel], verdicts: Iterable[Row]) -> dict[str, Any]:
    """The same win rate by another judge's VERDICTS."""
    return graded_by(duels, {row["speech_id"]: Verdict(row["verdict"]) for row in verdicts})


def failures(stats: Mapping[str, Any], start: Mapping[str, Any], section: EvaluateSection) -> list[str]:
    """Why the policy may not go on; empty if it may. A number that is none (NaN) fails its limit."""
    looping, cut = (stats[share] - start[share] for share in ("repeated_share", "truncated_share"))
    checks = [
        _surely_better("win rate", stats, section.min_win_rate),
        (
            abs(stats["length_change"]) <= section.max_length_change,
            f"mean length changed by {stats['length_change']:+.0%}, allowed are {section.max_length_change:.0%}",
        ),
        (looping <= section.max_repeat_rise, f"looping replies rose by {looping:.0%}"),
        (
            cut <= section.max_truncated_rise,
            f"replies cut off at their limit rose by {cut:.0%}, allowed are {section.max_truncated_rise:.0%}",
        ),
    ]
    if section.second_decides:
        checks.append(_surely_better("the second judge's win rate", stats["second"], section.min_win_rate))
    return [reason for passed, reason in (*checks, *_lost(stats.get("probe") or {}, section)) if not passed]


Check = tuple[bool, str]


def _surely_better(name: str, stats: Mapping[str, Any], least: float) -> Check:
    if least > 0 and (valid := stats["wins"] + stats["ties"] + stats["losses"]) < LEAST_SPEECHES:
        return False, f"{name} {stats['win_rate']:.2f} rests on {valid} speeches; {LEAST_SPEECHES} are the least"
    interval = f"(interval {stats['low']:.2f} to {stats['high']:.2f})"
    passed = stats["low"] > least or least == 0  # 0 holds the gate open, also for one that never wins
    return passed, f"{name} {stats['win_rate']:.2f} is not surely above {least:.2f} {interval}"


def _lost(probe: Mapping[str, Any], section: EvaluateSection) -> list[Check]:
    """What the probe says against the policy."""
    limits = [
        (
            "perplexity_rise",
            section.max_perplexity_rise,
            "perplexity on general text rose by {:.0%}, allowed: {:.0%}",
        ),
        (
            "capability_drop",
            section.max_capability_drop,
            "{:.0%} fewer questions were answered right, allowed: {:.0%}",
        ),
        ("kl", section.max_kl, "it went {:.2f} nats a token from the start, allowed: {:.2f}"),
    ]
    return [
        (probe[key] <= limit, words.format(probe[key], limit))
        for key, limit, words in limits
        if key in probe and limit is not None
    ]

"""How far a judge agrees with people: accuracy by stratum, kappa, alpha, the human ceiling, and who just likes length.

A ruling is what the judge said of one labelled comparison. Accuracy counts a judge's tie as half and leaves out what
people call a tie; kappa and alpha take the tie as a verdict of its own. Invalid rulings are counted, never guessed.
Intervals are 95 % bootstraps over whole prompts, for comparisons of one prompt are not independent. A figure that is
not defined (no data, or everybody always says the same) is None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import krippendorff
import numpy as np

from psyray.arrays import FloatArray
from psyray.evaluate.labelled import Labelled, consensus
from psyray.evaluate.winrate import outcomes, win_rate
from psyray.records import Verdict
from psyray.reward.metrics import alike, cluster_bootstrap, length_baseline

Figures = dict[str, Any]

CODE = {Verdict.A: 1.0, Verdict.TIE: 0.0, Verdict.B: -1.0, Verdict.INVALID: float("nan")}
RESAMPLES = 500  # kappa and alpha are calls into libraries, about a millisecond each
DECIDED = (Verdict.A, Verdict.B)
NO_ORDER = "each response is rated by itself, or a panel votes, so there are no two orders to compare"


@dataclass(frozen=True)
class Ruling:
    """What a judge said of a labelled comparison, in its terms of A and B."""

    verdict: Verdict | None  # None: not asked, the budget did not reach it
    margin: float = 0.0
    orders: tuple[Verdict, Verdict] | None = None  # of a judge that compares: with A shown first, with B shown first
    again: tuple[Verdict, ...] = ()  # verdicts when asked again
    same_answers: bool | None = None  # whether all that was said again was said before; None: not asked again
    error: str = ""

    def swap(self) -> Ruling:
        """The same ruling on the swapped comparison; twice is the identity."""
        return Ruling(
            self.verdict.swap() if self.verdict else None,
            -self.margin,
            (self.orders[1].swap(), self.orders[0].swap()) if self.orders else None,
            tuple(verdict.swap() for verdict in self.again),
            self.same_answers,
            self.error,
        )


Pair = tuple[Labelled, Ruling]


def figures(pairs: Sequence[Pair], *, length_tolerance: float) -> Figures:
    """All figures of one judge on one labelled set, as a tree of plain numbers."""
    asked = [(item, ruling) for item, ruling in pairs if ruling.verdict is not None]
    strata = dict.fromkeys(item.stratum for item, _ in pairs)
    return {
        "comparisons": len(pairs),
        "unasked": len(pairs) - len(asked),
        "prompts": len({item.speech_id for item, _ in pairs}),
        "human_ties": sum(item.human is Verdict.TIE for item, _ in pairs),
        "strata": {
            name: stratum([pair for pair in asked if pair[0].stratum == name], length_tolerance) for name in strata
        },
        "people": people(asked),
        "position": position(asked),
        "repetition": repetition(asked),
    }


def toward(verdict: Verdict, human: Verdict) -> Verdict:
    """A verdict as a win (A) where it is the people's and a loss (B) where it is the opposite; ties stay ties."""
    return verdict if human is Verdict.A else verdict.swap()


def stratum(pairs: Sequence[Pair], length_tolerance: float) -> Figures:
    """Accuracy on what people decided, beside "the longer one wins", also where the lengths are alike.

    Alike: they differ by at most `length_tolerance` of the longer one, in characters.
    """
    decided = [(item, ruling) for item, ruling in pairs if item.human in DECIDED]
    alike_N = alike([item.a for item, _ in decided], [item.b for item, _ in decided], length_tolerance)
    matched = [pair for pair, matches in zip(decided, alike_N, strict=True) if matches]
    return {
        "judge": accuracy(decided),
        "longer_wins": accuracy([(item, longer(item)) for item, _ in decided]),
        "length_matched": {"judge": accuracy(matched), "longer_wins": accuracy([(i, longer(i)) for i, _ in matched])},
        "human_ties": len(pairs) - len(decided),
    }


def accuracy(pairs: Sequence[Pair]) -> Figures:
    """The share that the judge ranks as people do, a tie being half, with its interval; invalid stands apart."""
    verdicts = [toward(ruling.verdict or Verdict.INVALID, item.human) for item, ruling in pairs]
    found = win_rate(verdicts, [item.speech_id for item, _ in pairs])
    return {
        "accuracy": number_or_none(found.rate),
        "low": number_or_none(found.low),
        "high": number_or_none(found.high),
        "right": found.wins,
        "ties": found.ties,
        "wrong": found.losses,
        "invalid": found.invalid,
    }


def longer(item: Labelled) -> Ruling:
    """The ruling of who knows length alone."""
    margin = float(length_baseline([item.a], [item.b])[0])
    return Ruling(Verdict.A if margin > 0 else Verdict.B if margin < 0 else Verdict.TIE, margin)


def people(pairs: Sequence[Pair]) -> Figures:
    """Kappa with each annotator; where there are several, their alpha without and with the judge, and the ceiling."""
    names = sorted({name for item, _ in pairs for name in item.annotators})
    if not names:
        return {}
    clusters = [item.speech_id for item, _ in pairs]
    judge_N = np.asarray([CODE[ruling.verdict or Verdict.INVALID] for _, ruling in pairs])
    people_NR = np.asarray(
        [[CODE[item.annotators.get(name, Verdict.INVALID)] for name in names] for item, _ in pairs]
    )  # fmt: skip
    found: Figures = {
        "kappa": {
            name: with_interval(np.stack([judge_N, people_NR[:, r]], axis=1), clusters, kappa)
            | {"comparisons": int((~np.isnan(judge_N) & ~np.isnan(people_NR[:, r])).sum())}
            for r, name in enumerate(names)
        }
    }
    if len(names) > 1:
        found["kappa_among_people"] = {
            f"{names[r]} and {names[s]}": number_or_none(kappa(people_NR[:, [r, s]]))
            for r, s in combinations(range(len(names)), 2)
        }
        found["alpha_people"] = with_interval(people_NR, clusters, alpha)
        found["alpha_with_judge"] = with_interval(np.column_stack([people_NR, judge_N]), clusters, alpha)
        found["ceiling"] = ceiling(pairs, names)
    return found


def kappa(codes_N2: FloatArray) -> float:
    """Cohen's kappa of two raters' codes over the rows that both rated; NaN where it is not defined."""
    from sklearn.metrics import cohen_kappa_score  # takes a second, and every run comes by here

    both_N2 = codes_N2[~np.isnan(codes_N2).any(axis=1)].astype(int)
    if len(both_N2) == 0 or len(np.unique(both_N2)) == 1:  # chance alone explains full agreement
        return float("nan")
    return float(cohen_kappa_score(both_N2[:, 0], both_N2[:, 1]))


def alpha(codes_NR: FloatArray, level: Literal["nominal", "interval"] = "nominal") -> float:
    """Krippendorff's alpha of R raters' codes, NaN where one did not rate; NaN where it is not defined."""
    paired_NR = codes_NR[(~np.isnan(codes_NR)).sum(axis=1) > 1]
    if len(np.unique(paired_NR[~np.isnan(paired_NR)])) < 2:
        return float("nan")
    return float(krippendorff.alpha(reliability_data=paired_NR.T, level_of_measurement=level))


def ceiling(pairs: Sequence[Pair], names: Sequence[str]) -> Figures:
    """How often one person agrees with what most others say, a tie being half, and the judge with the same others.

    Each annotator in turn is held against the consensus of the rest, where that is decided; the mean over annotators
    is what a judge as good as one more person would reach.
    """
    person_NR, judge_NR = np.full((2, len(pairs), len(names)), np.nan)
    for n, (item, ruling) in enumerate(pairs):
        for r, name in enumerate(names):
            others = [verdict for other, verdict in item.annotators.items() if other != name]
            said = consensus(others) if others and name in item.annotators else Verdict.TIE
            if said in DECIDED:
                mine, judges = item.annotators[name], ruling.verdict or Verdict.INVALID
                person_NR[n, r], judge_NR[n, r] = outcomes([toward(mine, said), toward(judges, said)])
    clusters = [item.speech_id for item, _ in pairs]
    return {
        "people": with_interval(person_NR, clusters, _mean_over_columns),
        "judge": with_interval(judge_NR, clusters, _mean_over_columns),
    }


def _mean_over_columns(values_NR: FloatArray) -> float:
    counts_R = (~np.isnan(values_NR)).sum(axis=0)
    if not counts_R.any():
        return float("nan")
    filled_R = counts_R > 0
    return float((np.nansum(values_NR, axis=0)[filled_R] / counts_R[filled_R]).mean())


def position(pairs: Sequence[Pair]) -> Figures:
    """Of a judge that compares: how often its verdict changes with the order of the two; else why there is none."""
    shown = [(item.speech_id, ruling.orders) for item, ruling in pairs if ruling.orders]
    if not shown:
        return {"applicable": False, "why": NO_ORDER}
    valid = [(speech, orders) for speech, orders in shown if Verdict.INVALID not in orders]
    changed_N = np.asarray([float(first != second) for _, (first, second) in valid])
    return {
        "applicable": True,
        "changed": with_interval(changed_N, [speech for speech, _ in valid], _mean),
        "first_shown_wins": sum(orders == (Verdict.A, Verdict.B) for _, orders in valid),
        "second_shown_wins": sum(orders == (Verdict.B, Verdict.A) for _, orders in valid),
        "both_orders": len(valid),
        "invalid": len(shown) - len(valid),
    }


def repetition(pairs: Sequence[Pair]) -> Figures:
    """How often a judge that is asked again gives the same verdict, and the very same answers."""
    again = [(item.speech_id, ruling) for item, ruling in pairs if ruling.again]
    clusters = [speech for speech, _ in again]
    same_N = np.asarray([float(all(v is r.verdict for v in r.again)) for _, r in again])
    exact_N = np.asarray([float(bool(r.same_answers)) for _, r in again])
    return {
        "comparisons": len(again),
        "times": max((len(ruling.again) for _, ruling in again), default=0),
        "same_verdict": with_interval(same_N, clusters, _mean),
        "same_answer": with_interval(exact_N, clusters, _mean),
    }


def _mean(values_N: FloatArray) -> float:
    return float(values_N.mean())


def with_interval(values: FloatArray, clusters: Sequence[str], stat: Callable[[FloatArray], float]) -> Figures:
    """A statistic of the rows with its clustered interval; None where it is not defined."""
    if len(values) == 0:
        return {"value": None, "low": None, "high": None}
    low, high = cluster_bootstrap(values, clusters, stat, n=RESAMPLES)
    return {"value": number_or_none(stat(values)), "low": number_or_none(low), "high": number_or_none(high)}


def number_or_none(value: float) -> float | None:
    """None for what is no number."""
    return None if math.isnan(value) else value

"""What several people said of one question, and what their votes make; pure.

The majority is the verdict; where nobody has more than half of the votes it is a tie. One `harmful` makes the
question invalid whatever the others say: neither response becomes part of a pair. A `skip` is no vote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from enum import StrEnum
from itertools import combinations
from typing import Any

from psyray.records import Verdict


class Vote(StrEnum):
    """What one expert said of responses A and B."""

    A = "A"
    B = "B"
    TIE = "tie"
    HARMFUL = "harmful"  # at least one of the two must not be learnt from
    SKIP = "skip"  # left to others

    def choice(self, a_left: bool) -> Choice:
        """What the expert chose where A stood on the left, or on the right."""
        if self in (Vote.A, Vote.B):
            return Choice.LEFT if (self is Vote.A) == a_left else Choice.RIGHT
        return Choice(self.value)


class Choice(StrEnum):
    """The same as the expert sees it, who knows of a left and a right one only."""

    LEFT = "left"
    RIGHT = "right"
    TIE = "tie"
    HARMFUL = "harmful"
    SKIP = "skip"

    def vote(self, a_left: bool) -> Vote:
        """The vote that it is where A stood on the left, or on the right."""
        if self in (Choice.LEFT, Choice.RIGHT):
            return Vote.A if (self is Choice.LEFT) == a_left else Vote.B
        return Vote(self.value)


def consensus(votes: Sequence[Vote]) -> tuple[Verdict, float]:
    """The verdict that the votes (no skips, one at least) make, and the share for A minus that for B."""
    counts = Counter(votes)
    margin = (counts[Vote.A] - counts[Vote.B]) / len(votes)
    if counts[Vote.HARMFUL]:
        return Verdict.INVALID, 0.0
    leader, count = counts.most_common(1)[0]
    return (Verdict(leader.value) if 2 * count > len(votes) else Verdict.TIE), margin


def decided(votes: Sequence[Vote], overlap: int) -> bool:
    """Whether votes that are still missing could change the verdict only by being `harmful`."""
    if len(votes) >= overlap or Vote.HARMFUL in votes:
        return True
    return max(Counter(votes).values(), default=0) * 2 > overlap


def agreement(votes: Sequence[tuple[Vote, Vote]]) -> dict[str, Any]:
    """How far (mine, another's) votes on the same questions agree.

    `agree` is the share of equal votes, `kappa` Cohen's; None where there is no vote, or where all votes are the same
    and chance alone would agree as well.
    """
    if not votes:
        return {"compared": 0, "agree": None, "kappa": None}
    mine, others = [a.value for a, _ in votes], [b.value for _, b in votes]
    kappa = None
    if len({*mine, *others}) > 1:
        from sklearn.metrics import cohen_kappa_score

        kappa = float(cohen_kappa_score(mine, others))
    return {"compared": len(votes), "agree": sum(a == b for a, b in votes) / len(votes), "kappa": kappa}


def among(answers: Sequence[Mapping[str, Vote]]) -> dict[str, Any]:
    """How far all who answered agree, from each question's votes by name.

    `agree` is the share of equal ones among all two votes on one question, `alpha` Krippendorff's for nominal data;
    None where no question has two votes, or where all votes are the same.
    """
    names = sorted({name for votes in answers for name in votes})
    both = [a == b for votes in answers for a, b in combinations(votes.values(), 2)]
    alpha = None
    if both and len({vote for votes in answers if len(votes) > 1 for vote in votes.values()}) > 1:
        import krippendorff
        import numpy as np

        code, missing = {vote: float(place) for place, vote in enumerate(Vote)}, float("nan")
        codes_EQ = [[code[votes[name]] if name in votes else missing for votes in answers] for name in names]
        alpha = float(krippendorff.alpha(reliability_data=np.asarray(codes_EQ), level_of_measurement="nominal"))
    agree = sum(both) / len(both) if both else None
    return {"people": len(names), "compared": len(both), "agree": agree, "alpha": alpha}

"""What several people said of one question, and what their votes make; pure.

The majority is the verdict; where nobody has more than half of the votes it is a tie. One `harmful` makes the
question invalid whatever the others say: neither response becomes part of a pair. A `skip` is no vote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from psyray.records import Verdict


class Vote(StrEnum):
    """What one expert said of responses A and B."""

    A = "A"
    B = "B"
    TIE = "tie"
    HARMFUL = "harmful"  # at least one of the two must not be learnt from
    SKIP = "skip"  # left to others


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

"""What is thought of a score difference, and how surely: one interface for every kind of head.

belief = model.difference(first_ND, second_ND)  # an ensemble (`Heads`) or a posterior (`PosteriorHeads`, `Laplace`)
belief.mean_N, belief.spread_N
"""

from __future__ import annotations

from typing import NamedTuple

from psyray.arrays import FloatArray


class Belief(NamedTuple):
    """Scores, or score differences, in logits."""

    mean_N: FloatArray
    spread_N: FloatArray  # standard deviation of what is believed, not of the answers

"""What is thought of a score difference, and how surely: one interface for every kind of head.

belief = model.difference(first_ND, second_ND)  # an ensemble (`Heads`) or a posterior (`PosteriorHeads`, `Laplace`)
belief.mean_N, belief.spread_N
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


class Belief(NamedTuple):
    """Scores, or score differences, in logits."""

    mean_N: FloatArray
    spread_N: FloatArray  # standard deviation of what is believed, not of the answers


class Uncertain(Protocol):
    """A model of rewards that knows what it does not know."""

    def difference(self, first_ND: npt.ArrayLike, second_ND: npt.ArrayLike) -> Belief:
        """Of score(first) - score(second), row by row; swapping the two turns the mean and keeps the spread."""

    def scores(self, features_ND: npt.ArrayLike) -> FloatArray:
        """[N, H]: scores under H heads or draws of the posterior; what acquisition reads."""

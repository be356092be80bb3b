"""What acquisition chooses from and what it answers; the array steps that its rules share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from psyray.arrays import BoolArray, FloatArray, IntArray


@dataclass(frozen=True)
class Pick:
    """Ask which of two responses to one prompt is better; `first` is the one expected to win."""

    prompt: int  # row of the scores
    first: int  # column of the scores
    second: int
    value: float  # acquisition value: higher is asked earlier


@dataclass(frozen=True)
class Candidates:
    """The pairs that may be asked about, and what is thought of them.

    P prompts, K responses a prompt, H heads, D features. A NaN or infinite score or feature marks a response as
    absent: it is never picked. Raises ValueError where shapes do not fit.
    """

    scores_PKH: FloatArray  # logits, one column a head (or a posterior draw)
    features_PKD: FloatArray | None = None  # what the heads are linear in; comes with the covariance
    covariance_DD: FloatArray | None = None  # of the heads' weights, where it is known
    prompts_PE: FloatArray | None = None  # where the prompts lie, for instance the mean of their responses' features
    asked_NE: FloatArray | None = None  # where those lie that were asked about before
    entropy_P: FloatArray | None = None  # predictive entropy of the policy at the prompt, in nats
    open_PKK: BoolArray | None = None  # symmetric: pairs that may still be asked; none: all

    def __post_init__(self) -> None:
        if self.scores_PKH.ndim != 3 or 0 in self.scores_PKH.shape[1:]:
            raise ValueError(f"scores must be [prompts, responses, heads], not of shape {self.scores_PKH.shape}")
        P, K, _ = self.scores_PKH.shape
        if (self.features_PKD is None) != (self.covariance_DD is None):
            raise ValueError("features_PKD and covariance_DD come together: each says nothing without the other")
        D = self.features_PKD.shape[-1] if self.features_PKD is not None else 0
        E = self.prompts_PE.shape[-1] if self.prompts_PE is not None else 0
        expected = {
            "features_PKD": (P, K, D),
            "covariance_DD": (D, D),
            "prompts_PE": (P, E),
            "asked_NE": (len(self.asked_NE) if self.asked_NE is not None else 0, E),
            "entropy_P": (P,),
            "open_PKK": (P, K, K),
        }
        for name, shape in expected.items():
            given = getattr(self, name)
            if given is not None and given.shape != shape:
                raise ValueError(f"{name} must be of shape {shape} beside scores {(P, K)}, not {given.shape}")

    @cached_property
    def present_PK(self) -> BoolArray:
        """Which responses are there."""
        present_PK = np.isfinite(self.scores_PKH).all(axis=2)
        if self.features_PKD is not None:
            present_PK &= np.isfinite(self.features_PKD).all(axis=2)
        return np.asarray(present_PK)

    @cached_property
    def allowed_PKK(self) -> BoolArray:
        """Which ordered pairs may be picked."""
        K = self.present_PK.shape[1]
        allowed_PKK = self.present_PK[:, :, None] & self.present_PK[:, None, :] & ~np.eye(K, dtype=bool)
        return np.asarray(allowed_PKK if self.open_PKK is None else allowed_PKK & self.open_PKK)

    @cached_property
    def filled_PKH(self) -> FloatArray:
        """Scores with absent responses at 0, which keeps arithmetic free of NaN; `allowed_PKK` leaves them out."""
        return np.where(self.present_PK[:, :, None], self.scores_PKH, 0.0)

    @cached_property
    def mean_PK(self) -> FloatArray:
        """Mean score over heads; 0 where absent."""
        return np.asarray(self.filled_PKH.mean(axis=2))

    @cached_property
    def embedding_PKE(self) -> FloatArray:
        """Coordinates in which cov(s_i - s_j, s_k - s_l) = (z_i - z_j) . (z_k - z_l) under the heads' posterior.

        With features: z = features . C with C C' = `covariance_DD`. Without: the heads' deviations from their mean
        over sqrt(H), whose products are the ensemble's own covariance of predictions (2302.08981). Absent responses
        are 0. O(P K D^2), once.
        """
        if self.features_PKD is None or self.covariance_DD is None:
            H = self.scores_PKH.shape[2]
            return np.asarray((self.filled_PKH - self.mean_PK[:, :, None]) / np.sqrt(H))
        z_PKD = np.where(self.present_PK[:, :, None], self.features_PKD, 0.0)
        return np.asarray(z_PKD @ np.linalg.cholesky(self.covariance_DD))


Acquire = Callable[[Candidates, int, np.random.Generator], list[Pick]]


def best_pair(value_PKK: FloatArray, allowed_PKK: BoolArray) -> tuple[IntArray, IntArray, FloatArray]:
    """Per prompt the (first, second) of highest value, lowest index on a tie; value -inf if none is left."""
    P, K, _ = allowed_PKK.shape
    flat_PL = np.where(allowed_PKK, value_PKK, -np.inf).reshape(P, K * K)
    best_P = flat_PL.argmax(axis=1)
    return best_P // K, best_P % K, flat_PL[np.arange(P), best_P]


def leader_first(c: Candidates, first_P: IntArray, second_P: IntArray) -> tuple[IntArray, IntArray]:
    """The same pairs with the higher mean score first; unturned where the means are equal."""
    rows_P = np.arange(len(first_P))
    turned_P = c.mean_PK[rows_P, second_P] > c.mean_PK[rows_P, first_P]
    return np.where(turned_P, second_P, first_P), np.where(turned_P, first_P, second_P)


def ranked(first_P: IntArray, second_P: IntArray, value_P: FloatArray, n: int) -> list[Pick]:
    """The `n` prompts of highest value; a value of -inf is a prompt without a pair."""
    order = [p for p in np.argsort(-value_P, kind="stable") if value_P[p] > -np.inf]
    return [Pick(int(p), int(first_P[p]), int(second_P[p]), float(value_P[p])) for p in order[:n]]

"""Win rates from pairwise verdicts, and what is left of them at equal length.

Verdict A is a win of the model under test, B a win of its opponent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from psyray.arrays import FloatArray
from psyray.records import Verdict
from psyray.reward.metrics import cluster_bootstrap

OUTCOME = {Verdict.A: 1.0, Verdict.TIE: 0.5, Verdict.B: 0.0, Verdict.INVALID: float("nan")}
RIDGE = 1e-3  # on the slope per comparison: keeps it finite where length tells every outcome


@dataclass(frozen=True)
class WinRate:
    """(wins + ties / 2) / valid with its 95 % interval; `invalid` stands apart."""

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    invalid: int


def outcomes(verdicts: Sequence[Verdict]) -> FloatArray:
    """[N]: 1 for a win, 0.5 for a tie, 0 for a loss, NaN for an invalid verdict."""
    return np.asarray([OUTCOME[v] for v in verdicts], dtype=np.float64)


def win_rate(verdicts: Sequence[Verdict], clusters: Sequence[str]) -> WinRate:
    """The win rate over valid verdicts, its interval clustered by what `clusters` names (the client speech).

    Without a valid verdict rate, low and high are NaN. Raises ValueError for unlike lengths.
    """
    if len(verdicts) != len(clusters):
        raise ValueError(f"{len(verdicts)} verdicts but {len(clusters)} clusters")
    wins, ties, losses, invalid = (list(verdicts).count(v) for v in OUTCOME)
    outcome_N = outcomes(verdicts)
    valid_N = np.flatnonzero(~np.isnan(outcome_N))
    if len(valid_N) == 0:
        nan = float("nan")
        return WinRate(nan, nan, nan, wins, ties, losses, invalid)
    low, high = cluster_bootstrap(outcome_N[valid_N], [clusters[i] for i in valid_N], _mean)
    return WinRate((wins + ties / 2) / len(valid_N), low, high, wins, ties, losses, invalid)


def length_controlled(outcomes: npt.ArrayLike, length_differences: npt.ArrayLike) -> float:
    """The win rate that would be left at equal length, after AlpacaEval 2 (2404.04475).

    outcomes [N]: 1, 0.5, 0, or a judge's P(win) between; NaN (an invalid verdict) is left out.
    length_differences [N]: length of the model under test less that of its opponent, in any unit.
    Logistic regression of the outcome on tanh(difference / its standard deviation), predicted at zero. The
    paper's terms for each instruction's difficulty are left out: one pair of models cannot tell them apart.
    NaN without a valid outcome. Raises ValueError for unlike lengths, an outcome outside 0..1, or a length
    that is NaN or infinite.
    """
    outcome_N = np.asarray(outcomes, dtype=np.float64)
    length_N = np.asarray(length_differences, dtype=np.float64)
    if outcome_N.ndim != 1 or outcome_N.shape != length_N.shape:
        raise ValueError(f"outcomes {outcome_N.shape} and length differences {length_N.shape} do not match")
    valid_N = ~np.isnan(outcome_N)
    outcome_N, length_N = outcome_N[valid_N], length_N[valid_N]
    if np.any((outcome_N < 0) | (outcome_N > 1)) or not np.isfinite(length_N).all():
        raise ValueError("outcomes must lie in 0..1 and length differences must be numbers")
    if len(outcome_N) == 0:
        return float("nan")
    if np.ptp(outcome_N) == 0:  # the intercept would have no bound
        return float(outcome_N[0])
    spread = float(length_N.std())
    return _at_zero(outcome_N, np.tanh(length_N / spread) if spread > 0 else np.zeros_like(length_N))


def length_controlled_interval(
    outcomes: npt.ArrayLike, length_differences: npt.ArrayLike, clusters: Sequence[str]
) -> tuple[float, float]:
    """The 95 % interval of `length_controlled`, over resamples of whole clusters (the client speech)."""
    rows_N2 = np.column_stack([np.asarray(outcomes, np.float64), np.asarray(length_differences, np.float64)])
    return cluster_bootstrap(rows_N2, clusters, lambda rows_M2: length_controlled(rows_M2[:, 0], rows_M2[:, 1]))


def _at_zero(outcome_N: FloatArray, x_N: FloatArray) -> float:
    """sigmoid(intercept) of the logistic regression of outcomes on x."""

    def loss(b: FloatArray) -> tuple[float, FloatArray]:
        logit_N = b[0] + b[1] * x_N
        error_N = expit(logit_N) - outcome_N
        value = -np.mean(outcome_N * log_expit(logit_N) + (1 - outcome_N) * log_expit(-logit_N))
        slope = np.mean(error_N * x_N) + RIDGE * b[1]
        return float(value + RIDGE * b[1] ** 2 / 2), np.asarray([np.mean(error_N), slope])

    found = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9})
    return float(expit(found.x[0]))


def _mean(values: FloatArray) -> float:
    return float(values.mean())

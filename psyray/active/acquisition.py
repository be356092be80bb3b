"""Acquisition functions: which pair of responses to ask an oracle about next.

Every function takes the scores of an ensemble of reward heads and answers with at most one pair a prompt:

    picks = acquire("delta_ucb", scores_PKH, n=64, rng=np.random.default_rng(seed))

Shapes: P prompts, K responses a prompt, H heads. A new one is a function and an entry in `ACQUISITIONS`.
`random` is an arm to report beside every other, over several seeds (2604.02766 finds little gain over it).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.intp]

REDRAWS = 30  # pairs of heads drawn before drts settles for two responses of one pair of heads


@dataclass(frozen=True)
class Pick:
    """Ask which of two responses to one prompt is better; `first` is the one expected to win."""

    prompt: int  # row of the scores
    first: int  # column of the scores
    second: int
    value: float  # acquisition value: higher is asked earlier


Acquire = Callable[[FloatArray, int, np.random.Generator], list[Pick]]


def random(scores_PKH: FloatArray, n: int, rng: np.random.Generator) -> list[Pick]:
    """Prompts and pairs drawn evenly; the arm that every other is measured against.

    The value is a uniform draw a prompt, so that a prompt with more responses is not asked earlier.
    """
    valid_PK = _valid(scores_PKH, n)
    noise_PKK = rng.random((*valid_PK.shape, valid_PK.shape[1]))
    value_P = rng.random(len(valid_PK))
    first_P, second_P, best_P = _best_pair(noise_PKK, valid_PK)
    return _ranked(first_P, second_P, np.where(np.isfinite(best_P), value_P, -np.inf), n)


def max_min(scores_PKH: FloatArray, n: int, rng: np.random.Generator) -> list[Pick]:
    """Best against worst mean score, as in the online DPO of 2502.19731.

    value = max_{i != j} mean_i - mean_j, in units of the scores; `rng` is not used.
    """
    valid_PK = _valid(scores_PKH, n)
    mean_PK = _filled(scores_PKH, valid_PK).mean(axis=2)
    return _ranked(*_best_pair(mean_PK[:, :, None] - mean_PK[:, None, :], valid_PK), n)


def uncertainty(scores_PKH: FloatArray, n: int, rng: np.random.Generator) -> list[Pick]:
    """The pair whose score difference the heads agree on least (ensemble disagreement; kin to 2406.10023).

    value = max_{i != j} std_h(s_ih - s_jh), in units of the scores; `first` has the higher mean; `rng` is not
    used.
    """
    valid_PK = _valid(scores_PKH, n)
    filled_PKH = _filled(scores_PKH, valid_PK)
    spread_PKK = np.zeros((*valid_PK.shape, valid_PK.shape[1]))
    for i in range(valid_PK.shape[1]):  # one response at a time: P*K*K*H numbers would not fit
        spread_PKK[:, i] = (filled_PKH[:, i, None] - filled_PKH).std(axis=2)
    first_P, second_P, value_P = _best_pair(spread_PKK, valid_PK)
    mean_PK = filled_PKH.mean(axis=2)
    rows_P = np.arange(len(mean_PK))
    turned_P = mean_PK[rows_P, second_P] > mean_PK[rows_P, first_P]
    return _ranked(np.where(turned_P, second_P, first_P), np.where(turned_P, first_P, second_P), value_P, n)


def drts(scores_PKH: FloatArray, n: int, rng: np.random.Generator) -> list[Pick]:
    """Double reverse Thompson sampling (2603.09692): the top of one posterior draw, the bottom of another.

    Heads g, h are drawn evenly and independently: first = argmax_k s_kg, second = argmin_k s_kh, drawn again
    until the two differ, `REDRAWS` times at most; then the bottom is taken among the others.
    value = s_first,g - s_second,h: the gap as the two draws see it, in units of the scores. The paper asks
    about every prompt and so needs no order of prompts; this one is ours.
    """
    valid_PK = _valid(scores_PKH, n)
    P, _, H = scores_PKH.shape
    rows_P = np.arange(P)
    # Drawn at once, so that how many redraws one prompt needs does not shift the heads of the next.
    heads_P2R = rng.integers(H, size=(P, 2, REDRAWS))
    filled_PKH = _filled(scores_PKH, valid_PK)
    top_PH = np.where(valid_PK[:, :, None], scores_PKH, -np.inf).argmax(axis=1)
    low_PKH = np.where(valid_PK[:, :, None], scores_PKH, np.inf)
    top_PR = np.take_along_axis(top_PH, heads_P2R[:, 0], axis=1)
    differ_PR = top_PR != np.take_along_axis(low_PKH.argmin(axis=1), heads_P2R[:, 1], axis=1)
    draw_P = np.where(differ_PR.any(axis=1), differ_PR.argmax(axis=1), REDRAWS - 1)
    g_P, h_P = heads_P2R[rows_P, 0, draw_P], heads_P2R[rows_P, 1, draw_P]
    first_P = top_PH[rows_P, g_P]
    low_PK = low_PKH[rows_P, :, h_P]
    low_PK[rows_P, first_P] = np.inf
    second_P = low_PK.argmin(axis=1)
    value_P = filled_PKH[rows_P, first_P, g_P] - filled_PKH[rows_P, second_P, h_P]
    return _ranked(first_P, second_P, np.where(valid_PK.sum(axis=1) >= 2, value_P, -np.inf), n)


def delta_ucb(scores_PKH: FloatArray, n: int, rng: np.random.Generator, beta: float = 1.0) -> list[Pick]:
    """The widest optimistic gap (2603.09692): how much better one response may be than another.

    value = max_{i != j} UCB_i - LCB_j with UCB = mean + beta * std and LCB = mean - beta * std over heads, in
    units of the scores; `rng` is not used.
    """
    valid_PK = _valid(scores_PKH, n)
    filled_PKH = _filled(scores_PKH, valid_PK)
    mean_PK, width_PK = filled_PKH.mean(axis=2), beta * filled_PKH.std(axis=2)
    gap_PKK = (mean_PK + width_PK)[:, :, None] - (mean_PK - width_PK)[:, None, :]
    return _ranked(*_best_pair(gap_PKK, valid_PK), n)


ACQUISITIONS: dict[str, Acquire] = {
    "random": random,
    "max_min": max_min,
    "uncertainty": uncertainty,
    "drts": drts,
    "delta_ucb": delta_ucb,
}


def acquire(name: str, scores_PKH: FloatArray, n: int, rng: np.random.Generator) -> list[Pick]:
    """At most `n` picks by the named function, one a prompt, best value first.

    A NaN or infinite score in any head marks a response as absent: it is never picked; a prompt with fewer
    than two responses present is never asked about. Equal values keep the order of the prompts.
    Raises ValueError for an unknown name, a negative `n`, or scores that are not [P, K, H] with K, H above 0.
    """
    if name not in ACQUISITIONS:
        near = difflib.get_close_matches(name, ACQUISITIONS, n=1, cutoff=0.0)[0]
        known = ", ".join(ACQUISITIONS)
        raise ValueError(f"unknown acquisition {name!r}: did you mean {near!r}? Known: {known}")
    return ACQUISITIONS[name](scores_PKH, n, rng)


def _valid(scores_PKH: FloatArray, n: int) -> BoolArray:
    """[P, K]: which responses may be picked; checks the arguments on the way."""
    if n < 0:
        raise ValueError(f"cannot ask {n} questions: n must be 0 or more")
    if scores_PKH.ndim != 3 or 0 in scores_PKH.shape[1:]:
        raise ValueError(f"scores must be [prompts, responses, heads], not of shape {scores_PKH.shape}")
    return np.asarray(np.isfinite(scores_PKH).all(axis=2))


def _filled(scores_PKH: FloatArray, valid_PK: BoolArray) -> FloatArray:
    """Scores with absent responses at 0, which keeps arithmetic free of NaN; `_best_pair` leaves them out."""
    return np.where(valid_PK[:, :, None], scores_PKH, 0.0)


def _best_pair(value_PKK: FloatArray, valid_PK: BoolArray) -> tuple[IntArray, IntArray, FloatArray]:
    """Per prompt the (first, second) of highest value, lowest index on a tie; value -inf if none is left."""
    P, K = valid_PK.shape
    allowed_PKK = valid_PK[:, :, None] & valid_PK[:, None, :] & ~np.eye(K, dtype=bool)
    flat_PL = np.where(allowed_PKK, value_PKK, -np.inf).reshape(P, K * K)
    best_P = flat_PL.argmax(axis=1)
    return best_P // K, best_P % K, flat_PL[np.arange(P), best_P]


def _ranked(first_P: IntArray, second_P: IntArray, value_P: FloatArray, n: int) -> list[Pick]:
    """The `n` prompts of highest value; a value of -inf is a prompt without a pair."""
    order = [p for p in np.argsort(-value_P, kind="stable") if value_P[p] > -np.inf]
    return [Pick(int(p), int(first_P[p]), int(second_P[p]), float(value_P[p])) for p in order[:n]]

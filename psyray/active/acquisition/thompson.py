"""Rules that let posterior draws name the pair: each head of the ensemble is one draw. O(P (K H + REDRAWS))."""

from __future__ import annotations

import numpy as np

from psyray.active.acquisition.candidates import Candidates, Pick, best_pair, ranked
from psyray.arrays import IntArray

REDRAWS = 30  # pairs of heads drawn before a rule settles for the best open pair by the last two


def drts(c: Candidates, n: int, rng: np.random.Generator) -> list[Pick]:
    """Double reverse Thompson sampling (2603.09692): the top of one posterior draw, the bottom of another.

    Heads g, h are drawn evenly and independently: first = argmax_k s_kg, second = argmin_k s_kh, drawn again
    until they are a pair that may be asked, `REDRAWS` times at most; then the open pair of widest gap s_ig - s_jh.
    value = s_first,g - s_second,h: the gap as the two draws see it, in units of the scores. The paper asks
    about every prompt and so needs no order of prompts; this one is ours.
    """
    low_PH = np.where(c.present_PK[:, :, None], c.scores_PKH, np.inf).argmin(axis=1)
    first_P, second_P, g_P, h_P = _drawn(c, _tops(c), low_PH, -1.0, rng)
    rows_P = np.arange(len(first_P))
    value_P = c.filled_PKH[rows_P, first_P, g_P] - c.filled_PKH[rows_P, second_P, h_P]
    return ranked(first_P, second_P, np.where(c.allowed_PKK.any(axis=(1, 2)), value_P, -np.inf), n)


def dts(c: Candidates, n: int, rng: np.random.Generator) -> list[Pick]:
    """Double Thompson sampling (1604.07101; for rewards 2603.09692): the tops of two posterior draws.

    As `drts`, with second = argmax_k s_kh: both are responses that may be the best. After `REDRAWS` clashes, the
    open pair of highest sum s_ig + s_jh.
    value = (s_first,g - s_second,g) + (s_second,h - s_first,h): how far the two draws disagree about the pair,
    in units of the scores. The order of prompts is ours.
    """
    top_PH = _tops(c)
    first_P, second_P, g_P, h_P = _drawn(c, top_PH, top_PH, 1.0, rng)
    rows_P = np.arange(len(first_P))
    gap_PH = c.filled_PKH[rows_P, first_P] - c.filled_PKH[rows_P, second_P]
    value_P = gap_PH[rows_P, g_P] - gap_PH[rows_P, h_P]
    return ranked(first_P, second_P, np.where(c.allowed_PKK.any(axis=(1, 2)), value_P, -np.inf), n)


def _tops(c: Candidates) -> IntArray:
    """[P, H]: each head's best response."""
    return np.asarray(np.where(c.present_PK[:, :, None], c.scores_PKH, -np.inf).argmax(axis=1))


def _drawn(
    c: Candidates, first_PH: IntArray, second_PH: IntArray, sign: float, rng: np.random.Generator
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """(first, second, head g, head h) per prompt, drawn again until the pair may be asked."""
    P, _, H = c.scores_PKH.shape
    rows_P = np.arange(P)
    # Drawn at once, so that how many redraws one prompt needs does not shift the heads of the next.
    heads_P2R = rng.integers(H, size=(P, 2, REDRAWS))
    first_PR = np.take_along_axis(first_PH, heads_P2R[:, 0], axis=1)
    second_PR = np.take_along_axis(second_PH, heads_P2R[:, 1], axis=1)
    asked_PR = c.allowed_PKK[rows_P[:, None], first_PR, second_PR]
    draw_P = np.where(asked_PR.any(axis=1), asked_PR.argmax(axis=1), REDRAWS - 1)
    g_P, h_P = heads_P2R[rows_P, 0, draw_P], heads_P2R[rows_P, 1, draw_P]
    value_PKK = c.filled_PKH[rows_P, :, g_P][:, :, None] + sign * c.filled_PKH[rows_P, :, h_P][:, None, :]
    else_first_P, else_second_P, _ = best_pair(value_PKK, c.allowed_PKK)
    settled_P = asked_PR.any(axis=1)
    return (
        np.where(settled_P, first_PR[rows_P, draw_P], else_first_P),
        np.where(settled_P, second_PR[rows_P, draw_P], else_second_P),
        g_P,
        h_P,
    )

"""Rules about the batch as a whole: prompts spread over what there is, and no near-duplicates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from psyray.active.acquisition.candidates import Candidates, Pick, best_pair, leader_first
from psyray.active.acquisition.scores import mutual_information
from psyray.arrays import FloatArray

BLOCK = 1024  # asked prompts whose distances are taken at once: one by one, each would read all prompts anew
CLOSEST = 1e-6  # of the typical distance: below it two prompts are the same, and the logarithm stays finite


def bal_pm(c: Candidates, n: int, rng: np.random.Generator, weight: float = 1.0) -> list[Pick]:
    """Epistemic uncertainty and spread-out prompts (after BAL-PM, 2406.10023), greedily.

    value = infomax's + weight * log(distance / typical distance), in nats: the prompt's distance from the nearest
    one asked about before (`asked_NE`) or picked in this batch (while there is none, the widest that prompts can lie
    apart), over the root mean square distance of the prompts from their mean. The logarithm is what one more prompt
    adds to the nearest-neighbour (Kozachenko-Leonenko) estimate of the entropy of the prompts asked about, up to a
    constant. The paper searches neighbours in the whole pool, in its base model's features; here they lie where
    `prompts_PE` says, which is needed; a prompt that lies at NaN is never asked about. `first` has the higher mean;
    `rng` is not used. O(P K^2 H + P E (n + N)).
    """
    if c.prompts_PE is None:
        raise ValueError("bal_pm needs prompts_PE: say where the prompts lie, beside the scores")
    placed_P = np.asarray(np.isfinite(c.prompts_PE).all(axis=1))
    prompt_PE = np.where(placed_P[:, None], c.prompts_PE, 0.0)
    first_P, second_P, told_P = best_pair(mutual_information(c), c.allowed_PKK & placed_P[:, None, None])
    first_P, second_P = leader_first(c, first_P, second_P)
    typical, widest = extent(prompt_PE[np.isfinite(told_P)])
    nearest_P = np.full(len(told_P), widest)
    square_P = np.einsum("pe,pe->p", prompt_PE, prompt_PE)
    asked_NE = prompt_PE[:0] if c.asked_NE is None else c.asked_NE
    for start in range(0, len(asked_NE), BLOCK):
        nearest_P = np.minimum(nearest_P, _nearest(prompt_PE, square_P, asked_NE[start : start + BLOCK]))
    picks: list[Pick] = []
    while len(picks) < n and np.isfinite(told_P).any():
        value_P = told_P + weight * np.log(np.maximum(nearest_P / typical, CLOSEST))
        p = int(value_P.argmax())
        picks.append(Pick(p, int(first_P[p]), int(second_P[p]), float(value_P[p])))
        told_P[p] = -np.inf
        nearest_P = np.minimum(nearest_P, _nearest(prompt_PE, square_P, prompt_PE[p : p + 1]))
    return picks


def extent(prompt_PE: FloatArray) -> tuple[float, float]:
    """(root mean square distance from the mean, a bound on the distance of two); 1 where all are the same."""
    if not len(prompt_PE):
        return 1.0, 1.0
    apart_PE = prompt_PE - prompt_PE.mean(axis=0)
    square_P = np.einsum("pe,pe->p", apart_PE, apart_PE)
    return float(np.sqrt(square_P.mean())) or 1.0, 2 * float(np.sqrt(square_P.max())) or 1.0


def _nearest(prompt_PE: FloatArray, square_P: FloatArray, from_NE: FloatArray) -> FloatArray:
    """[P]: the distance from the nearest of some points, by |a|^2 + |b|^2 - 2 a.b, which makes no second [P, E]."""
    apart_NP = (from_NE**2).sum(axis=1)[:, None] - 2 * from_NE @ prompt_PE.T
    return np.asarray(np.sqrt(np.maximum(square_P + apart_NP.min(axis=0), 0.0)))


def spread_out(c: Candidates, picks: Sequence[Pick], n: int, apart: float) -> list[Pick]:
    """The first `n` picks, in order, whose difference is no near-duplicate of an earlier one's.

    Two pairs are near-duplicates when the cosine of their differences z_first - z_second in
    `Candidates.embedding_PKE` exceeds `apart` in magnitude: an answer to one tells the other.
    O(picks x n x E).
    """
    kept: list[Pick] = []
    units_NE = np.zeros((min(n, len(picks)), c.embedding_PKE.shape[2]))
    for pick in picks:
        if len(kept) == n:
            break
        x_E = c.embedding_PKE[pick.prompt, pick.first] - c.embedding_PKE[pick.prompt, pick.second]
        unit_E = x_E / (np.linalg.norm(x_E) or 1.0)
        if (np.abs(units_NE[: len(kept)] @ unit_E) <= apart).all():
            units_NE[len(kept)] = unit_E
            kept.append(pick)
    return kept

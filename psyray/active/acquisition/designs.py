"""Optimal design: the batch of pairs whose answers together pin the heads down best."""

from __future__ import annotations

import numpy as np
from scipy.special import expit

from psyray.active.acquisition.candidates import BoolArray, Candidates, FloatArray, Pick


def d_optimal(c: Candidates, n: int, rng: np.random.Generator) -> list[Pick]:
    """Greedy D-optimal design with logistic weights (2404.13895, 2502.04354).

    Asking about x = z_i - z_j adds w x x' to the Fisher information of the heads' weights, w = p (1 - p) with p =
    sigmoid(mean_i - mean_j). Each pick is the pair of the largest gain in log det of the posterior's precision,
    value = log(1 + w x' S x) in nats, with S the covariance given the picks before it: S <- S - w S x x' S /
    (1 + w x' S x), so that near-duplicates in a batch are worth little. z is `Candidates.embedding_PKE`: with
    features the paper's rule, with scores alone the same in the ensemble's own covariance. `first` has the higher
    mean; `rng` is not used.

    Gains only fall as picks are made, so a stale gain is an upper bound and only the prompts at the top are
    brought up to date (lazy greedy; the result is exact). O(P K^2 E) at first, then O(n K E) per prompt touched.
    """
    weight_PKK = expit(c.mean_PK[:, :, None] - c.mean_PK[:, None, :])
    return Greedy(c, weight_PKK * (1 - weight_PKK)).picks(n)


class Greedy:
    """The pairs' variances given the picks so far, brought up to date prompt by prompt."""

    def __init__(self, c: Candidates, weight_PKK: FloatArray) -> None:
        self.c, self.weight_PKK = c, weight_PKK
        self.variance_PKK = squared_distances(c.embedding_PKE)
        self.seen_P = np.zeros(len(weight_PKK), dtype=int)  # how many picks a prompt's variances know of
        self.falls_TE = np.zeros((0, c.embedding_PKE.shape[2]))  # S = I - falls' falls

    def picks(self, n: int) -> list[Pick]:
        """The first `n` of the greedy order, one a prompt."""
        gain_PKK = np.where(self.c.allowed_PKK, np.log1p(self.weight_PKK * self.variance_PKK), -np.inf)
        bound_P = gain_PKK.max(axis=(1, 2), initial=-np.inf)
        self.falls_TE = np.zeros((min(n, len(bound_P)), self.falls_TE.shape[1]))
        found: list[Pick] = []
        while len(found) < n and len(bound_P):
            p = int(bound_P.argmax())
            if bound_P[p] == -np.inf:
                break
            if self.seen_P[p] < len(found):
                gain_PKK[p] = self._gain(p, len(found), self.c.allowed_PKK[p])
                bound_P[p] = gain_PKK[p].max()
                continue
            found.append(self._take(p, gain_PKK[p], len(found)))
            bound_P[p] = -np.inf
        return found

    def _gain(self, p: int, t: int, allowed_KK: BoolArray) -> FloatArray:
        moved_KT = self.c.embedding_PKE[p] @ self.falls_TE[self.seen_P[p] : t].T
        self.variance_PKK[p] -= ((moved_KT[:, None] - moved_KT[None]) ** 2).sum(axis=2)
        self.seen_P[p] = t
        variance_KK = np.maximum(self.variance_PKK[p], 0.0)  # rounding
        return np.where(allowed_KK, np.log1p(self.weight_PKK[p] * variance_KK), -np.inf)

    def _take(self, p: int, gain_KK: FloatArray, t: int) -> Pick:
        i, j = divmod(int(gain_KK.argmax()), gain_KK.shape[1])
        if self.c.mean_PK[p, j] > self.c.mean_PK[p, i]:
            i, j = j, i
        x_E = self.c.embedding_PKE[p, i] - self.c.embedding_PKE[p, j]
        sx_E = x_E - self.falls_TE[:t].T @ (self.falls_TE[:t] @ x_E)
        weight = self.weight_PKK[p, i, j]
        self.falls_TE[t] = sx_E * np.sqrt(weight / (1 + weight * max(float(x_E @ sx_E), 0.0)))
        return Pick(p, i, j, float(gain_KK.max()))


def squared_distances(z_PKE: FloatArray) -> FloatArray:
    """[P, K, K]: |z_i - z_j|^2, exactly 0 and symmetric where i = j; by Gram matrices, which need no P*K*K*E."""
    gram_PKK = z_PKE @ z_PKE.transpose(0, 2, 1)
    square_PK = np.einsum("pkk->pk", gram_PKK)
    return np.asarray(np.maximum(square_PK[:, :, None] + square_PK[:, None, :] - 2 * gram_PKK, 0.0))

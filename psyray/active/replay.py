"""Active learning replayed on a labelled set: what a reward head would have learnt from each label it asked for.

    bank = Bank(...)  # prompts, features of their responses, and what people said of every pair
    curve = replay(bank, pool, held_out, "d_optimal", learner, budgets=(8, 64, 512), batch=8, seed=0)
    curve.accuracy_BS  # held-out accuracy by budget and stratum

Pure: no model, no file, no clock. Shapes: P prompts, K responses a prompt, D features, R axes or resamples, B budgets,
Q held-out prompts, S strata.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from psyray.active.acquisition import Candidates, acquire
from psyray.arrays import FloatArray, IntArray
from psyray.reward.laplace import Laplace, fit_laplace, prior_laplace
from psyray.reward.projection import fit_projection

Oracle = Callable[[int, int, int], int]  # (prompt, i, j) -> 1 if i is better, -1 if j is


@dataclass(frozen=True)
class Bank:
    """Prompts with their responses' features and what people said of the pairs."""

    features_PKD: FloatArray  # NaN where a prompt has fewer than K responses
    labels_PKK: IntArray  # 1: i is better, -1: j is, 0: nobody decided; labels_ij = -labels_ji
    strata_PKK: IntArray  # index into `strata`, symmetric; read only where there is a label
    strata: tuple[str, ...]
    talks_P: IntArray | None = None  # prompts with the same number are lengths of one conversation; none: each its own

    @property
    def conversation_P(self) -> IntArray:
        """The conversation of each prompt, numbered from 0."""
        talks = np.arange(len(self.labels_PKK)) if self.talks_P is None else self.talks_P
        return np.asarray(np.unique(talks, return_inverse=True)[1])

    def rows(self, prompts: Sequence[int] | IntArray) -> Bank:
        """The bank of some prompts."""
        rows = np.asarray(prompts, dtype=np.intp)
        return replace(
            self,
            features_PKD=self.features_PKD[rows],
            labels_PKK=self.labels_PKK[rows],
            strata_PKK=self.strata_PKK[rows],
            talks_P=self.conversation_P[rows],
        )

    def oracle(self, prompt: int, i: int, j: int) -> int:
        """What people said."""
        return int(self.labels_PKK[prompt, i, j])

    def pairs(self) -> tuple[IntArray, IntArray, IntArray]:
        """(prompt, better, worse) of every labelled pair."""
        prompt_N, i_N, j_N = np.nonzero(self.labels_PKK > 0)
        return prompt_N, i_N, j_N


@dataclass(frozen=True)
class Learner:
    """How a head is learnt: the same for every strategy, so that only the questions differ."""

    components: int = 96  # axes of the projection
    whiten: float = 0.25  # see `fit_projection`
    ridge: float = 0.03  # prior precision of the weights
    draws: int = 20  # of the posterior, that acquisition sees

    def project(self, pool: Bank) -> Callable[[FloatArray], FloatArray]:
        """Coordinates fitted on the pool's responses, labels unseen."""
        present_PK = np.isfinite(pool.features_PKD).all(axis=2)
        prompts = [str(p) for p in np.nonzero(present_PK)[0]]
        return fit_projection(pool.features_PKD[present_PK], prompts, components=self.components, whiten=self.whiten)

    def believe(self, x_NR: FloatArray, before: Laplace | None, dimensions: int, seed: int) -> Laplace:
        """The posterior given differences better - worse."""
        if not len(x_NR):
            return prior_laplace(dimensions, ridge=self.ridge, draws=self.draws, seed=seed)
        return fit_laplace(x_NR, np.zeros_like(x_NR), ridge=self.ridge, start=before, draws=self.draws, seed=seed)


@dataclass(frozen=True)
class Curve:
    """What one strategy reached with one seed."""

    budgets: tuple[int, ...]  # those the pool had labels for
    held_out: tuple[int, ...]  # the conversation of each held-out prompt
    right_BQS: FloatArray  # how many of a held-out prompt's pairs the mean ranks right, a tie half
    pairs_QS: IntArray  # how many there are
    asked: tuple[tuple[int, int, int], ...]  # (prompt of the pool, first, second) in the order of asking
    strata: tuple[int, ...]  # of each question asked

    @property
    def accuracy_BS(self) -> FloatArray:
        """Held-out accuracy by stratum; NaN for one without pairs."""
        return _shares(self.right_BQS.sum(axis=1), self.pairs_QS.sum(axis=0))

    @property
    def macro_B(self) -> FloatArray:
        """The mean over strata, each counting alike."""
        return np.asarray(np.nanmean(self.accuracy_BS, axis=1))

    def redrawn_RB(self, times_RQ: IntArray) -> FloatArray:
        """`macro_B` had each held-out prompt been there so many times; NaN where none of them has been."""
        B, Q, S = self.right_BQS.shape
        right_RBS = (times_RQ @ self.right_BQS.transpose(1, 0, 2).reshape(Q, B * S)).reshape(-1, B, S)
        share_RBS = _shares(right_RBS, (times_RQ @ self.pairs_QS)[:, None])
        return _shares(np.nan_to_num(share_RBS).sum(axis=2), np.isfinite(share_RBS).sum(axis=2))


def replay(
    bank: Bank,
    pool: Sequence[int] | IntArray,
    held_out: Sequence[int] | IntArray,
    strategy: str,
    learner: Learner,
    *,
    budgets: Sequence[int],
    batch: int,
    seed: int,
    start: int = 0,
    oracle: Oracle | None = None,
) -> Curve:
    """Ask in batches by the strategy, learn from all labels so far, measure on the held-out prompts at each budget.

    The first `start` labels are asked at random whatever the strategy, for nothing is known yet. A pair is asked
    once; a batch asks a prompt once. `oracle` answers in the pool's rows (default: what people said); an answer of 0
    is spent and teaches nothing. Stops early where the pool has no pair left. Raises ValueError for a batch or budget
    below 1.
    """
    if batch < 1 or not budgets or min(budgets) < 1:
        raise ValueError(f"batch and budgets must be 1 or more, not {batch} and {list(budgets)}")
    here, there = bank.rows(pool), bank.rows(held_out)
    answer = oracle or here.oracle
    project = learner.project(here)
    z_PKR, test_PKR = project(here.features_PKD), project(there.features_PKD)
    open_PKK = here.labels_PKK != 0
    rng = np.random.default_rng([seed, 1])
    x_NR = np.zeros((0, z_PKR.shape[2]))
    belief = learner.believe(x_NR, None, z_PKR.shape[2], seed)
    asked: list[tuple[int, int, int]] = []
    reached, right = [], []
    for budget in sorted(set(budgets)):
        while len(asked) < budget:
            found = candidates(belief, z_PKR, open_PKK, asked)
            rule = strategy if len(asked) >= start else "random"
            picks = acquire(rule, found, min(batch, budget - len(asked)), rng)
            if not picks:
                break
            for pick in picks:
                asked.append((pick.prompt, pick.first, pick.second))
                open_PKK[pick.prompt, pick.first, pick.second] = open_PKK[pick.prompt, pick.second, pick.first] = False
            x_NR = np.concatenate([x_NR, _answers(z_PKR, asked[-len(picks) :], answer)])
            belief = learner.believe(x_NR, belief, z_PKR.shape[2], seed + len(asked))
        if len(asked) < budget:
            break
        reached.append(budget)
        right.append(ranked_right(belief, test_PKR, there))
    return Curve(
        tuple(reached),
        tuple(bank.conversation_P[np.asarray(held_out, dtype=np.intp)].tolist()),
        np.asarray(right).reshape(len(right), len(held_out), len(bank.strata)),
        pairs_by_stratum(there),
        tuple(asked),
        tuple(int(here.strata_PKK[question]) for question in asked),
    )


def candidates(
    belief: Laplace, z_PKR: FloatArray, open_PKK: npt.NDArray[np.bool_], asked: Sequence[tuple[int, int, int]]
) -> Candidates:
    """What acquisition may see: scores, features, the posterior, which pairs are open; never a label."""
    P, K, R = z_PKR.shape
    scores_PKH = belief.scores(z_PKR.reshape(P * K, R)).reshape(P, K, -1)
    where_PR, prompts = np.nanmean(z_PKR, axis=1), sorted({prompt for prompt, _, _ in asked})
    return Candidates(
        scores_PKH,
        features_PKD=z_PKR,
        covariance_DD=belief.covariance_DD,
        prompts_PE=where_PR,
        asked_NE=where_PR[prompts],
        open_PKK=open_PKK,
    )


def _answers(z_PKR: FloatArray, asked: Sequence[tuple[int, int, int]], oracle: Oracle) -> FloatArray:
    """Differences better - worse of the questions that were decided."""
    told = [(z_PKR[p, i] - z_PKR[p, j]) * side for p, i, j in asked if (side := oracle(p, i, j))]
    return np.asarray(told).reshape(len(told), z_PKR.shape[2])


def accuracies(belief: Laplace, z_PKR: FloatArray, bank: Bank) -> FloatArray:
    """[S]: the share of labelled pairs ranked right by the mean, a tie half; NaN for a stratum without pairs."""
    return _shares(ranked_right(belief, z_PKR, bank).sum(axis=0), pairs_by_stratum(bank).sum(axis=0))


def ranked_right(belief: Laplace, z_PKR: FloatArray, bank: Bank) -> FloatArray:
    """[P, S]: how many labelled pairs the mean ranks right, a tie half."""
    prompt_N, better_N, worse_N = bank.pairs()
    mean_N = belief.difference(z_PKR[prompt_N, better_N], z_PKR[prompt_N, worse_N]).mean_N
    return _counts(bank, (mean_N > 0) + 0.5 * (mean_N == 0))


def pairs_by_stratum(bank: Bank) -> IntArray:
    """[P, S]: how many labelled pairs there are."""
    return _counts(bank, np.ones(len(bank.pairs()[0]))).astype(np.intp)


def _counts(bank: Bank, values_N: FloatArray) -> FloatArray:
    prompt_N, better_N, worse_N = bank.pairs()
    sums_PS = np.zeros((len(bank.labels_PKK), len(bank.strata)))
    np.add.at(sums_PS, (prompt_N, bank.strata_PKK[prompt_N, better_N, worse_N]), values_N)
    return sums_PS


def _shares(right: FloatArray, pairs: IntArray) -> FloatArray:
    return np.where(pairs > 0, right / np.maximum(pairs, 1), np.nan)

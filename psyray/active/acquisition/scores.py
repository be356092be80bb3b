"""Rules that look at one prompt's scores at a time: gaps, disagreement, bounds. Each is O(P K^2 H)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy.special import entr, expit, softmax

from psyray.active.acquisition.candidates import Candidates, Pick, best_pair, leader_first, ranked
from psyray.arrays import FloatArray

BLOCK = 256  # prompts whose differences are taken at once
SHORTLIST = 4  # apl: n * SHORTLIST prompts are kept by entropy, of which n are asked by margin


def random(c: Candidates, n: int, rng: np.random.Generator) -> list[Pick]:
    """Prompts and pairs drawn evenly; the arm that every other is measured against.

    The value is a uniform draw a prompt, so that a prompt with more responses is not asked earlier.
    """
    noise_PKK = rng.random(c.allowed_PKK.shape)
    value_P = rng.random(len(noise_PKK))
    first_P, second_P, best_P = best_pair(noise_PKK, c.allowed_PKK)
    return ranked(first_P, second_P, np.where(np.isfinite(best_P), value_P, -np.inf), n)


def max_min(c: Candidates, n: int, rng: np.random.Generator) -> list[Pick]:
    """Best against worst mean score, as in the online DPO of 2502.19731.

    value = max_{i != j} mean_i - mean_j, in units of the scores; `rng` is not used.
    """
    return ranked(*best_pair(c.mean_PK[:, :, None] - c.mean_PK[:, None, :], c.allowed_PKK), n)


def uncertainty(c: Candidates, n: int, rng: np.random.Generator) -> list[Pick]:
    """The pair whose score difference the heads agree on least (ensemble disagreement; kin to 2406.10023).

    value = max_{i != j} std_h(s_ih - s_jh), in units of the scores; `first` has the higher mean; `rng` is not
    used.
    """
    first_P, second_P, value_P = best_pair(spreads(c), c.allowed_PKK)
    return ranked(*leader_first(c, first_P, second_P), value_P, n)


def infomax(c: Candidates, n: int, rng: np.random.Generator) -> list[Pick]:
    """BALD on the preference (1112.5745): what the answer is expected to tell about which head is right.

    value = max_{i != j} H(mean_h p_h) - mean_h H(p_h) with p_h = sigmoid(s_ih - s_jh), in nats, from 0 to log 2;
    `first` has the higher mean; `rng` is not used. High where heads are sure and contradict each other, where
    `uncertainty` also asks about pairs that all heads decide alike.
    """
    first_P, second_P, value_P = best_pair(mutual_information(c), c.allowed_PKK)
    return ranked(*leader_first(c, first_P, second_P), value_P, n)


def delta_ucb(c: Candidates, n: int, rng: np.random.Generator, beta: float = 1.0) -> list[Pick]:
    """The widest optimistic gap (2603.09692): how much better one response may be than another.

    value = max_{i != j} UCB_i - LCB_j with UCB = mean + beta * std and LCB = mean - beta * std over heads, in
    units of the scores; `rng` is not used.
    """
    width_PK = beta * c.filled_PKH.std(axis=2)
    gap_PKK = (c.mean_PK + width_PK)[:, :, None] - (c.mean_PK - width_PK)[:, None, :]
    return ranked(*best_pair(gap_PKK, c.allowed_PKK), n)


def maxmin_lcb(c: Candidates, n: int, rng: np.random.Generator, beta: float = 1.0) -> list[Pick]:
    """A Stackelberg game on lower bounds (MaxMinLCB, 2406.16745): the leader whose worst rival troubles it least.

    LCB_ij and UCB_ij = mean_h -+ beta * std_h of s_ih - s_jh. Both play among the responses that may still be best
    (UCB_ij >= 0 for all j present): the leader is argmax_i min_j LCB_ij over the open pairs, its rival argmin_j LCB_ij.
    Where no open pair is of two such responses the rival may be any, then the leader too.
    value = -LCB of that pair, in units of the scores: how far the rival may yet be ahead. The paper plays one
    game; this order of prompts is ours. The bounds are the ensemble's, not the paper's confidence sequence;
    `rng` is not used.
    """
    mean_PKK = c.mean_PK[:, :, None] - c.mean_PK[:, None, :]
    width_PKK = beta * spreads(c)
    # Of all present ones: what was asked before is closed, and says most of who cannot be best.
    high_PKK = np.where(c.present_PK[:, None, :], mean_PKK + width_PKK, np.inf)
    contender_PK = high_PKK.min(axis=2) >= 0
    playing_PKK = c.allowed_PKK
    for side_PKK in (contender_PK[:, :, None], contender_PK[:, None, :]):
        some_PKK = playing_PKK & side_PKK
        playing_PKK = np.where(some_PKK.any(axis=(1, 2), keepdims=True), some_PKK, playing_PKK)
    low_PKK = np.where(playing_PKK, mean_PKK - width_PKK, np.inf)
    first_P = np.where(playing_PKK.any(axis=2), low_PKK.min(axis=2), -np.inf).argmax(axis=1)
    low_PK = low_PKK[np.arange(len(first_P)), first_P]
    return ranked(first_P, low_PK.argmin(axis=1), -low_PK.min(axis=1), n)


def apl(c: Candidates, n: int, rng: np.random.Generator) -> list[Pick]:
    """Uncertain prompts, then the surest preference in each (APL, 2402.08114).

    Of the prompts that `most_uncertain` keeps, those with the widest margin are asked:
    value = max_{i != j} mean_i - mean_j, in units of the scores. The paper's margin is DPO's implicit reward,
    ours the heads' mean. `rng` is not used.
    """
    return max_min(c, n, rng)


def most_uncertain(c: Candidates, n: int) -> Candidates:
    """Only the `SHORTLIST` * n prompts of highest entropy stay open.

    APL's entropy is the policy's over its own answers: give it as `entropy_P`. Without it the entropy is that of
    "which response is best", of the heads' mean softmax over scores: what scores alone can say, and not the same thing.
    """
    some_P = c.allowed_PKK.any(axis=(1, 2))
    entropy_P = np.where(some_P, best_entropy(c) if c.entropy_P is None else c.entropy_P, -np.inf)
    kept = np.argsort(-entropy_P, kind="stable")[: SHORTLIST * n]
    kept_P = np.isin(np.arange(len(entropy_P)), kept)
    return replace(c, open_PKK=c.allowed_PKK & kept_P[:, None, None])


def spreads(c: Candidates) -> FloatArray:
    """[P, K, K]: standard deviation over heads of every score difference."""
    return _of_gaps(c, lambda gap_PKH: np.asarray(gap_PKH.std(axis=2)))


def mutual_information(c: Candidates) -> FloatArray:
    """[P, K, K]: between the answer and the head, in nats; never below 0, which rounding would allow."""

    def told(gap_PKH: FloatArray) -> FloatArray:
        p_PKH = expit(gap_PKH)  # what each head thinks of "the one beats the other"
        return np.asarray(np.maximum(_entropy(p_PKH.mean(axis=2)) - _entropy(p_PKH).mean(axis=2), 0.0))

    return _of_gaps(c, told)


def _of_gaps(c: Candidates, of: Callable[[FloatArray], FloatArray]) -> FloatArray:
    """[P, K, K]: `of` each pair's score differences over heads; P*K*K*H at once would not fit."""
    P, K, _ = c.filled_PKH.shape
    found_PKK = np.empty((P, K, K))
    for start in range(0, P, BLOCK):
        some_PKH = c.filled_PKH[start : start + BLOCK]
        for i in range(K):
            found_PKK[start : start + BLOCK, i] = of(some_PKH[:, i, None] - some_PKH)
    return found_PKK


def best_entropy(c: Candidates) -> FloatArray:
    """[P]: entropy in nats of which response present is best, by the mean over heads of their softmax."""
    logits_PKH = np.where(c.present_PK[:, :, None], c.scores_PKH, -np.inf)
    some_P = c.present_PK.any(axis=1)
    best_PK = np.zeros(c.present_PK.shape)
    best_PK[some_P] = softmax(logits_PKH[some_P], axis=1).mean(axis=2)
    return np.asarray(entr(best_PK).sum(axis=1))


def _entropy(p: FloatArray) -> FloatArray:
    """Of a coin, in nats."""
    return np.asarray(entr(p) + entr(1 - p))

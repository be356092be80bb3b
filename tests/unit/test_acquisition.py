"""Acquisition functions: hand-computed picks, absent responses, order, and symmetry under permutation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from psyray.active.acquisition import ACQUISITIONS, FloatArray, Pick, acquire, delta_ucb

NAMES = sorted(ACQUISITIONS)
NAN = float("nan")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Two prompts, three responses, two heads.
SCORES = np.array(
    [
        [[1.0, 1.0], [0.0, 0.0], [0.0, 4.0]],  # means 1 0 2, stds 0 0 2
        [[5.0, 5.0], [1.0, 1.0], [4.0, 4.0]],  # means 5 1 4, stds 0 0 0
    ]
)


def test_max_min_asks_best_against_worst_mean() -> None:
    assert acquire("max_min", SCORES, 5, rng()) == [Pick(1, 0, 1, 4.0), Pick(0, 2, 1, 2.0)]


def test_uncertainty_asks_where_heads_disagree_and_puts_the_higher_mean_first() -> None:
    # Prompt 0: differences with response 2 spread by 2; (0, 2) comes before (1, 2). Prompt 1: no spread.
    assert acquire("uncertainty", SCORES, 5, rng()) == [Pick(0, 2, 0, 2.0), Pick(1, 0, 1, 0.0)]


def test_delta_ucb_is_upper_bound_less_lower_bound() -> None:
    # Prompt 0: UCB 1 0 4, LCB 1 0 0: the widest i != j is 4 - 0 at (2, 1). Prompt 1: 5 - 1.
    assert acquire("delta_ucb", SCORES, 5, rng()) == [Pick(0, 2, 1, 4.0), Pick(1, 0, 1, 4.0)]
    assert delta_ucb(SCORES, 1, rng(), beta=0.0) == acquire("max_min", SCORES, 1, rng())


def test_drts_pairs_the_top_of_one_head_with_the_bottom_of_another() -> None:
    scores = np.array([[[0.0, 3.0], [2.0, 1.0], [1.0, 0.0]]])  # head 0: top 1, low 0; head 1: top 0, low 2
    possible = {(1, 0, 2.0), (1, 2, 2.0), (0, 2, 3.0)}  # top of g, low of h; g=1, h=0 clash on response 0
    seen = {(p.first, p.second, p.value) for s in range(60) for p in acquire("drts", scores, 1, rng(s))}
    assert seen == possible


def test_drts_with_one_head_of_equal_scores_still_picks_two_responses() -> None:
    assert acquire("drts", np.zeros((1, 3, 1)), 1, rng()) == [Pick(0, 0, 1, 0.0)]


def test_random_asks_every_pair_and_every_prompt_about_evenly() -> None:
    scores = np.full((3, 3, 1), 1.0)
    scores[0, 2] = NAN  # one pair left in prompt 0, six ordered pairs in the others
    picks = [acquire("random", scores, 1, rng(s))[0] for s in range(1500)]
    assert np.bincount([p.prompt for p in picks]) == pytest.approx([500, 500, 500], abs=75)
    pairs = [3 * p.first + p.second for p in picks if p.prompt > 0]
    counts = np.bincount(pairs, minlength=9)
    assert counts[[0, 4, 8]].sum() == 0
    assert counts[[1, 2, 3, 5, 6, 7]] == pytest.approx(len(pairs) / 6, abs=60)


@pytest.mark.parametrize("name", NAMES)
def test_no_pair_is_picked_where_fewer_than_two_responses_are_there(name: str) -> None:
    scores = np.full((4, 3, 2), NAN)
    scores[1, 0] = 1.0  # one valid response
    scores[2, :2] = [[1.0, 2.0], [3.0, 4.0]]  # two
    scores[3, 0] = 1.0
    scores[3, 1] = [1.0, NAN]  # absent: one head has no score
    scores[3, 2] = [np.inf, 1.0]
    picks = acquire(name, scores, 10, rng())
    assert [p.prompt for p in picks] == [2]
    assert {picks[0].first, picks[0].second} == {0, 1}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_ask(name: str) -> None:
    assert acquire(name, SCORES, 0, rng()) == []
    assert acquire(name, np.zeros((0, 3, 2)), 5, rng()) == []
    assert acquire(name, np.zeros((2, 1, 2)), 5, rng()) == []


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"random"}))
def test_equal_values_keep_the_order_of_the_prompts(name: str) -> None:
    same = np.repeat(np.array([[[2.0], [1.0]]]), 5, axis=0)
    assert [p.prompt for p in acquire(name, same, 3, rng())] == [0, 1, 2]


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown acquisition 'delta-ucb': did you mean 'delta_ucb'"):
        acquire("delta-ucb", SCORES, 1, rng())


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 0), (2, 0, 3)])
def test_scores_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="scores must be"):
        acquire("max_min", np.zeros(shape), 1, rng())


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        acquire("random", SCORES, -1, rng())


score = st.floats(-100, 100, allow_subnormal=False) | st.just(NAN)
batches = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=score)
)


@settings(deadline=None)
@given(batches, st.integers(0, 6), st.sampled_from(NAMES), st.integers(0, 9))
def test_picks_obey_the_contract(scores: FloatArray, n: int, name: str, seed: int) -> None:
    picks = acquire(name, scores, n, rng(seed))
    valid = np.asarray(np.isfinite(scores).all(axis=2))
    assert picks == acquire(name, scores, n, rng(seed))
    assert len(picks) == min(n, int((valid.sum(axis=1) >= 2).sum()))
    assert len({p.prompt for p in picks}) == len(picks)
    assert all(p.first != p.second and valid[p.prompt, p.first] and valid[p.prompt, p.second] for p in picks)
    assert all(a.value >= b.value for a, b in itertools.pairwise(picks))


@settings(deadline=None)
@given(
    st.tuples(st.integers(1, 4), st.integers(2, 5), st.integers(1, 4)),
    st.integers(0, 999),
    st.sampled_from(["max_min", "uncertainty", "drts", "delta_ucb"]),
)
def test_permuting_responses_permutes_picks(shape: tuple[int, int, int], seed: int, name: str) -> None:
    scores = rng(seed).normal(size=shape)  # drawn from a continuum: no ties, which go by index
    assume(name != "uncertainty" or shape[2] > 1)  # one head has no spread: every pair ties
    order = rng(seed + 1).permutation(shape[1])
    moved = acquire(name, scores[:, order], 9, rng(3))
    there = [(p.prompt, order[p.first], order[p.second], p.value) for p in moved]
    here = [(p.prompt, p.first, p.second, p.value) for p in acquire(name, scores, 9, rng(3))]
    assert there == here

"""Acquisition functions: hand-computed picks, absent responses, order, and symmetry under permutation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from psyray.active.acquisition import ACQUISITIONS, SHORTLISTS, Candidates, Pick, acquire
from psyray.active.acquisition.diversity import bal_pm, spread_out
from psyray.active.acquisition.scores import delta_ucb
from psyray.arrays import FloatArray

NAMES = sorted(ACQUISITIONS)
DRAWN = {"random", "dts", "drts"}
NAN = float("nan")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def with_features(scores: FloatArray, features: FloatArray, **more: FloatArray) -> Candidates:
    """Candidates whose heads' weights are equally unsure in every direction; prompts lie at their responses' mean."""
    where = {"prompts_PE": features.mean(axis=1)} | more
    return Candidates(scores, features, np.eye(features.shape[2]), **where)


def featured(scores: FloatArray, seed: int = 0) -> Candidates:
    """Candidates with made-up features of 3 dimensions, so that every rule can choose among them."""
    return with_features(scores, rng(seed).normal(size=(*scores.shape[:2], 3)))


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
    assert delta_ucb(Candidates(SCORES), 1, rng(), beta=0.0) == acquire("max_min", SCORES, 1, rng())


def test_drts_pairs_the_top_of_one_head_with_the_bottom_of_another() -> None:
    scores = np.array([[[0.0, 3.0], [2.0, 1.0], [1.0, 0.0]]])  # head 0: top 1, low 0; head 1: top 0, low 2
    possible = {(1, 0, 2.0), (1, 2, 2.0), (0, 2, 3.0)}  # top of g, low of h; g=1, h=0 clash on response 0
    seen = {(p.first, p.second, p.value) for s in range(60) for p in acquire("drts", scores, 1, rng(s))}
    assert seen == possible


def test_drts_with_one_head_of_equal_scores_still_picks_two_responses() -> None:
    assert acquire("drts", np.zeros((1, 3, 1)), 1, rng()) == [Pick(0, 0, 1, 0.0)]


LOG3 = float(np.log(3))


def test_infomax_is_what_the_answer_tells_about_the_heads() -> None:
    scores = np.array([[[10.0, 30.0], [0.0, 0.0]], [[LOG3, 0.0], [0.0, LOG3]]])
    # Prompt 1: the heads say 3/4 and 1/4: log 2 - H(1/4). Prompt 0: both are sure of the same.
    quarter = -0.25 * np.log(0.25) - 0.75 * np.log(0.75)
    picks = acquire("infomax", scores, 2, rng())
    assert [(p.prompt, p.first, p.second) for p in picks] == [(1, 0, 1), (0, 0, 1)]
    assert picks[0].value == pytest.approx(np.log(2) - quarter)
    assert 0 <= picks[1].value < 1e-3
    assert acquire("uncertainty", scores, 1, rng())[0].prompt == 0  # spread alone does not see that


def test_dts_pairs_the_tops_of_two_heads() -> None:
    scores = np.array([[[0.0, 3.0], [2.0, 1.0], [1.0, 0.0]]])  # head 0: top 1; head 1: top 0
    seen = {(p.first, p.second, p.value) for s in range(40) for p in acquire("dts", scores, 1, rng(s))}
    assert seen == {(1, 0, 4.0), (0, 1, 4.0)}  # (2 - 0) - (1 - 3)


def test_dts_with_one_head_takes_its_two_best() -> None:
    assert acquire("dts", np.array([[[1.0], [3.0], [2.0]]]), 1, rng()) == [Pick(0, 1, 2, 0.0)]


def test_maxmin_lcb_leads_with_the_least_threatened_and_asks_about_its_worst_rival() -> None:
    # Prompt 0: LCB 0>1 1, 0>2 -3, 1>0 -1, 1>2 -4, 2>0 -1, 2>1 0; 1 is out, for UCB 1>0 is -1: leader 2, rival 0.
    # Prompt 1, no spread: leader 0 (5), nearest rival 2 (4).
    assert acquire("maxmin_lcb", SCORES, 5, rng()) == [Pick(0, 2, 0, 1.0), Pick(1, 0, 2, -1.0)]


def test_maxmin_lcb_does_not_forget_who_lost_a_pair_that_was_asked() -> None:
    def pick(scores: list[list[float]], *still_open: tuple[int, int]) -> list[Pick]:
        opened = np.zeros((1, 4, 4), dtype=bool)
        for i, j in still_open:
            opened[0, i, j] = opened[0, j, i] = True
        return acquire("maxmin_lcb", Candidates(np.array([scores]), open_PKK=opened), 1, rng())

    # No spread: 3 is the best. What is open says of 1 only that it is better than 0.
    assert pick([[0, 0], [1, 1], [2, 2], [3, 3]], (0, 1), (2, 3)) == [Pick(0, 3, 2, -1.0)]
    # Spread 2 for 2 alone: it and 3 may be best (UCB 2>3 is 1), and play with each other as long as they may.
    scores = [[0.0, 0.0], [1.0, 1.0], [0.0, 4.0], [3.0, 3.0]]
    assert pick(scores, (0, 1), (0, 3), (1, 2), (2, 3)) == [Pick(0, 3, 2, 1.0)]
    assert pick(scores, (0, 1), (0, 3), (1, 2)) == [Pick(0, 3, 0, -3.0)]
    assert pick(scores, (0, 1)) == [Pick(0, 1, 0, -1.0)]


def test_apl_keeps_the_most_uncertain_prompts_and_asks_the_widest_margin() -> None:
    gaps = np.array([0.0, 10.0, 1.0, 2.0, 3.0])  # the closer the two, the higher the entropy: prompt 1 is left out
    scores = np.stack([gaps, np.zeros(5)], axis=1)[:, :, None]
    assert acquire("apl", scores, 1, rng()) == [Pick(4, 0, 1, 3.0)]
    policys = Candidates(scores, entropy_P=np.array([1.0, 9.0, 1.0, 1.0, 1.0]))
    assert acquire("apl", policys, 1, rng()) == [Pick(1, 0, 1, 10.0)]


def pairs_of(differences: list[list[float]]) -> FloatArray:
    """Features of two responses a prompt with the given differences."""
    ends = np.asarray(differences)
    return np.stack([ends, np.zeros_like(ends)], axis=1)


def test_d_optimal_discounts_what_earlier_picks_of_the_batch_tell() -> None:
    features = pairs_of([[3.9, 0.0], [0.0, 2.0], [4.0, 0.0]])
    picks = acquire("d_optimal", with_features(np.zeros((3, 2, 1)), features), 3, rng())
    assert [p.prompt for p in picks] == [2, 1, 0]
    # w = 1/4: log(1 + 16/4), log(1 + 4/4); then along the first axis 1 - 4/5 of the variance is left.
    expected = [np.log(5), np.log(2), np.log(1 + 0.25 * 0.2 * 3.9**2)]
    assert [p.value for p in picks] == pytest.approx(expected)


def test_d_optimal_weighs_a_pair_by_how_open_its_answer_is() -> None:
    scores = np.array([[[LOG3], [0.0]], [[0.0], [0.0]]])  # p = 3/4 and 1/2: w = 3/16 and 1/4
    picks = acquire("d_optimal", with_features(scores, pairs_of([[1.0, 0.0], [0.0, 1.0]])), 2, rng())
    assert [p.prompt for p in picks] == [1, 0]
    assert [p.value for p in picks] == pytest.approx([np.log(1.25), np.log(1 + 3 / 16)])


def test_d_optimal_without_features_works_in_the_ensembles_covariance() -> None:
    # Two heads: deviations -+2 / sqrt(2) in prompt 0's third response, none elsewhere: variance 4, the heads' own.
    picks = acquire("d_optimal", SCORES, 2, rng())
    weight = 1 / (1 + np.e) * np.e / (1 + np.e)  # of (2, 0), whose means are 1 apart: nearer to even than (2, 1)
    assert picks == [Pick(0, 2, 0, pytest.approx(np.log(1 + 4 * weight))), Pick(1, 0, 1, 0.0)]


@pytest.mark.parametrize("seed", range(5))
def test_d_optimal_is_the_greedy_design_that_inverse_matrices_give(seed: int) -> None:
    scores, features = rng(seed).normal(size=(30, 4, 5)), rng(seed + 1).normal(size=(30, 4, 6))
    root = rng(seed + 2).normal(size=(6, 6))
    precision = root @ root.T + np.eye(6)
    picks = acquire("d_optimal", Candidates(scores, features, np.linalg.inv(precision)), 12, rng())
    mean, left = scores.mean(axis=2), set(range(30))
    for pick in picks:
        best = max(
            (np.log1p(w * x @ np.linalg.solve(precision, x)), p, {i, j}, w, x)
            for p in left
            for i, j in itertools.combinations(range(4), 2)
            for x in [features[p, i] - features[p, j]]
            for w in [1 / (2 + 2 * np.cosh(mean[p, i] - mean[p, j]))]
        )
        value, prompt, pair, weight, x = best
        assert (pick.prompt, {pick.first, pick.second}) == (prompt, pair)
        assert pick.value == pytest.approx(value)
        precision += weight * np.outer(x, x)
        left.remove(prompt)


@pytest.mark.parametrize("seed", range(5))
def test_v_optimal_is_the_greedy_design_that_inverse_matrices_give(seed: int) -> None:
    scores, features = rng(seed).normal(size=(20, 4, 5)), rng(seed + 1).normal(size=(20, 4, 6))
    root = rng(seed + 2).normal(size=(6, 6))
    precision = root @ root.T + np.eye(6)
    mean, left = scores.mean(axis=2), set(range(20))
    pairs = list(itertools.combinations(range(4), 2))
    targets = np.array([features[p, i] - features[p, j] for p in range(20) for i, j in pairs])
    for pick in acquire("v_optimal", Candidates(scores, features, np.linalg.inv(precision)), 8, rng()):
        before = np.einsum("te,et->", targets, np.linalg.solve(precision, targets.T))
        found = []
        for p in left:
            i, j = np.argsort(-mean[p])[:2]  # the better half
            x, weight = features[p, i] - features[p, j], 1 / (2 + 2 * np.cosh(mean[p, i] - mean[p, j]))
            after = precision + weight * np.outer(x, x)
            found.append((before - np.einsum("te,et->", targets, np.linalg.solve(after, targets.T)), p, i, j, after))
        value, prompt, first, second, precision = max(found, key=lambda f: f[0])
        assert (pick.prompt, pick.first, pick.second) == (prompt, first, second)
        assert pick.value == pytest.approx(value)
        left.remove(prompt)


def test_v_optimal_leaves_the_odd_pair_to_d_optimal() -> None:
    found = with_features(np.zeros((5, 2, 1)), pairs_of([[2.0, 0.0], *[[0.0, 1.9]] * 4]))  # one odd, four alike
    # S = I: (1/4) 2^2 2^2 / (1 + 4/4) = 2 against (1/4) 4 (1.9^2)^2 / (1 + 1.9^2 / 4).
    assert acquire("d_optimal", found, 1, rng())[0].prompt == 0
    picks = acquire("v_optimal", found, 1, rng())
    assert picks == [Pick(1, 0, 1, pytest.approx(1.9**4 / (1 + 1.9**2 / 4)))]


def test_v_optimal_asks_of_contenders_while_there_are_any() -> None:
    scores = np.array([[[3.0], [2.0], [1.0], [0.0]]])
    features = np.array([[[0.0, 1.0], [0.0, 0.0], [9.0, 0.0], [-9.0, 0.0]]])
    assert acquire("v_optimal", with_features(scores, features), 1, rng())[0].second == 1
    rest = np.ones((1, 4, 4), dtype=bool)
    rest[0, 0, 1] = rest[0, 1, 0] = False
    pick = acquire("v_optimal", with_features(scores, features, open_PKK=rest), 1, rng())[0]
    assert (pick.first, pick.second) == (2, 3)
    level = with_features(np.zeros((1, 4, 2)), features)  # all tie: all are contenders
    assert {acquire("v_optimal", level, 1, rng())[0].second} == {3}


def test_bal_pm_goes_where_nothing_was_asked() -> None:
    scores = np.zeros((3, 2, 2))  # nothing to choose between but the prompts, at 0, 1 and 10
    features = np.repeat(np.array([0.0, 1.0, 10.0])[:, None, None], 2, axis=1)
    typical = np.std([0, 1, 10])
    widest = 2 * (10 - 11 / 3)
    picks = acquire("bal_pm", with_features(scores, features), 3, rng())
    assert [p.prompt for p in picks] == [0, 2, 1]
    assert [p.value for p in picks] == pytest.approx(list(np.log(np.array([widest, 10, 1]) / typical)))
    asked = with_features(scores, features, asked_NE=np.array([[10.0]]))
    assert [p.prompt for p in acquire("bal_pm", asked, 2, rng())] == [0, 1]
    assert [p.value for p in bal_pm(asked, 1, rng(), weight=0.0)] == [0.0]


def test_bal_pm_says_that_it_needs_to_know_where_prompts_lie() -> None:
    with pytest.raises(ValueError, match="bal_pm needs prompts_PE"):
        acquire("bal_pm", SCORES, 1, rng())


def test_bal_pm_never_asks_about_a_prompt_that_lies_nowhere() -> None:
    scores = rng(1).normal(size=(3, 2, 3))
    scores[1] = NAN
    for lost in ([1], [1, 2]):  # the one without responses, and one more
        where = rng(2).normal(size=(3, 2))
        where[lost] = NAN
        picks = acquire("bal_pm", Candidates(scores, prompts_PE=where), 3, rng())
        assert {p.prompt for p in picks} == {0, 1, 2} - {1, *lost} and all(np.isfinite(p.value) for p in picks)


def test_near_duplicates_are_left_out_of_a_batch() -> None:
    scores = np.repeat(np.array([[[3.0], [0.0]]]), 3, axis=0) * np.array([3, 2, 1])[:, None, None]
    twins = with_features(scores, pairs_of([[1.0, 0.0], [-2.0, 0.01], [1.0, 1.0]]))  # the second turns the first round
    assert [p.prompt for p in acquire("max_min", twins, 3, rng())] == [0, 1, 2]
    assert [p.prompt for p in acquire("max_min", twins, 3, rng(), apart=0.9)] == [0, 2]
    assert [p.prompt for p in acquire("max_min", twins, 1, rng(), apart=0.9)] == [0]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_that_is_spread_out_is_the_head_of_the_whole_order_that_is(name: str) -> None:
    features = rng(7).normal(size=(60, 3, 4))
    found = with_features(features @ rng(8).normal(size=(4, 6)), features)
    every = SHORTLISTS[name](found, 5) if name in SHORTLISTS else found
    whole = ACQUISITIONS[name](every, 60, rng(2))
    assert acquire(name, found, 5, rng(2), apart=0.6) == spread_out(found, whole, 5, 0.6) != whole[:5]


def test_a_batch_that_is_spread_out_asks_its_rule_for_no_more_picks_than_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = []

    def rule(c: Candidates, n: int, draw: np.random.Generator) -> list[Pick]:
        wanted.append(n)
        return ACQUISITIONS["max_min"](c, n, draw)

    monkeypatch.setitem(ACQUISITIONS, "counted", rule)
    scores = rng(3).normal(size=(500, 3, 6))
    assert len(acquire("counted", scores, 8, rng(), apart=0.9)) == 8
    assert max(wanted) <= 32
    wanted.clear()
    assert len(acquire("counted", np.repeat(scores[:1], 40, axis=0), 8, rng(), apart=0.9)) == 1
    assert wanted == [8, 16, 32, 64]


def test_bal_pm_finds_the_nearest_of_more_points_than_it_takes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    features, asked = rng(1).normal(size=(20, 2, 3)), rng(2).normal(size=(50, 3))
    found = with_features(np.zeros((20, 2, 2)), features, asked_NE=asked)
    nearest = np.linalg.norm(found.prompts_PE[:, None] - asked, axis=2).min(axis=1)
    for block in (7, 1024):
        monkeypatch.setattr("psyray.active.acquisition.diversity.BLOCK", block)
        assert acquire("bal_pm", found, 1, rng())[0].prompt == nearest.argmax()


def test_apl_keeps_its_shortlist_where_near_duplicates_are_left_out() -> None:
    scores = np.random.default_rng(4).normal(size=(40, 3, 6)) * np.linspace(0.2, 3, 40)[:, None, None]
    for n in (1, 3):
        assert acquire("apl", scores, n, rng(), apart=1.0) == acquire("apl", scores, n, rng())
        assert acquire("apl", scores, n, rng()) != acquire("max_min", scores, n, rng())


@pytest.mark.parametrize("name", NAMES)
def test_a_pair_that_is_closed_is_not_asked_again(name: str) -> None:
    scores = rng(1).normal(size=(2, 3, 4))
    only = np.zeros((2, 3, 3), dtype=bool)
    only[0, 1, 2] = only[0, 2, 1] = True
    found = with_features(scores, rng(2).normal(size=(2, 3, 5)), open_PKK=only)
    picks = acquire(name, found, 5, rng())
    assert [(p.prompt, {p.first, p.second}) for p in picks] == [(0, {1, 2})]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("features_PKD", (2, 2, 3)),
        ("covariance_DD", (4, 4)),
        ("prompts_PE", (3, 3)),
        ("asked_NE", (1, 2)),
        ("entropy_P", (3,)),
        ("open_PKK", (2,)),
    ],
)
def test_candidates_of_another_shape_are_refused(name: str, shape: tuple[int, ...]) -> None:
    fitting = {"features_PKD": np.zeros((2, 3, 3)), "covariance_DD": np.eye(3), "prompts_PE": np.zeros((2, 3))}
    with pytest.raises(ValueError, match=name):
        Candidates(SCORES, **(fitting | {name: np.ones(shape)}))


def test_features_come_with_their_heads_covariance() -> None:
    with pytest.raises(ValueError, match="come together"):
        Candidates(SCORES, features_PKD=np.zeros((2, 3, 3)))


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
    picks = acquire(name, featured(scores), 10, rng())
    assert [p.prompt for p in picks] == [2]
    assert {picks[0].first, picks[0].second} == {0, 1}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_ask(name: str) -> None:
    assert acquire(name, featured(SCORES), 0, rng()) == []
    assert acquire(name, featured(np.zeros((0, 3, 2))), 5, rng()) == []
    assert acquire(name, featured(np.zeros((2, 1, 2))), 5, rng()) == []


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"random"}))
def test_equal_values_keep_the_order_of_the_prompts(name: str) -> None:
    same = np.repeat(np.array([[[2.0], [1.0]]]), 5, axis=0)
    alike = with_features(same, np.repeat(np.array([[[1.0], [0.0]]]), 5, axis=0))
    assert [p.prompt for p in acquire(name, alike, 3, rng())] == [0, 1, 2]


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown acquisition 'delta-ucb'; did you mean 'delta_ucb'"):
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
    found = featured(scores, seed)
    picks = acquire(name, found, n, rng(seed))
    valid = np.asarray(np.isfinite(scores).all(axis=2))
    assert picks == acquire(name, found, n, rng(seed))
    assert len(picks) == min(n, int((valid.sum(axis=1) >= 2).sum()))
    assert len({p.prompt for p in picks}) == len(picks)
    assert all(p.first != p.second and valid[p.prompt, p.first] and valid[p.prompt, p.second] for p in picks)
    assert name == "v_optimal" or all(a.value >= b.value - 1e-9 for a, b in itertools.pairwise(picks))


shapes = st.tuples(st.integers(1, 4), st.integers(2, 5), st.integers(2, 4))


@settings(deadline=None)
@given(shapes, st.integers(0, 999), st.sampled_from(sorted(set(NAMES) - {"random"})))
def test_permuting_responses_permutes_picks(shape: tuple[int, int, int], seed: int, name: str) -> None:
    # Drawn from a continuum: no ties, which go by index.
    scores, features = rng(seed).normal(size=shape), rng(seed + 2).normal(size=(*shape[:2], 3))
    order = rng(seed + 1).permutation(shape[1])
    moved = acquire(name, with_features(scores[:, order], features[:, order]), 9, rng(3))
    there = [(p.prompt, order[p.first], order[p.second], pytest.approx(p.value)) for p in moved]
    here = [(p.prompt, p.first, p.second, p.value) for p in acquire(name, with_features(scores, features), 9, rng(3))]
    if name == "dts":  # where one head was drawn twice, which of its two best comes first is a tie
        there, here = ([(p, {i, j}, value) for p, i, j, value in found] for found in (there, here))
    assert there == here


@settings(deadline=None)
@given(shapes, st.integers(0, 999), st.sampled_from(sorted(set(NAMES) - DRAWN)))
def test_permuting_prompts_permutes_picks(shape: tuple[int, int, int], seed: int, name: str) -> None:
    scores, features = rng(seed).normal(size=shape), rng(seed + 2).normal(size=(*shape[:2], 3))
    order = rng(seed + 1).permutation(shape[0])
    asked = np.full((1, 3), 9.0)  # or bal_pm's first prompt would be a tie
    moved = acquire(name, with_features(scores[order], features[order], asked_NE=asked), 2, rng())
    here = acquire(name, with_features(scores, features, asked_NE=asked), 2, rng())
    there = [(order[p.prompt], p.first, p.second, pytest.approx(p.value)) for p in moved]
    assert there == [(p.prompt, p.first, p.second, p.value) for p in here]


@settings(deadline=None)
@given(shapes, st.integers(0, 99), st.sampled_from(["uncertainty", "infomax", "d_optimal", "v_optimal", "bal_pm"]))
def test_a_rule_that_asks_about_pairs_puts_the_higher_mean_first(
    shape: tuple[int, int, int], seed: int, name: str
) -> None:
    scores = rng(seed).normal(size=shape)
    mean = scores.mean(axis=2)
    assert all(mean[p.prompt, p.first] >= mean[p.prompt, p.second] for p in acquire(name, featured(scores), 9, rng()))


def test_v_optimal_chooses_among_many_prompts_by_few_heads():
    scores_PKH = 100 * np.random.default_rng(0).normal(size=(500, 4, 6))
    picks = acquire("v_optimal", scores_PKH, 8, np.random.default_rng(0))
    assert len({pick.prompt for pick in picks}) == 8 and all(pick.value > 0 for pick in picks)

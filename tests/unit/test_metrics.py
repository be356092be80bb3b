"""Reward metrics: hand-computed values, agreement with scikit-learn, symmetry, clustered intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from psyray.arrays import FloatArray
from psyray.reward.metrics import (
    FIGURES,
    accuracy,
    alike,
    auc,
    brier,
    calibrated,
    cluster_bootstrap,
    ece,
    intervals,
    length_baseline,
    log_likelihood,
    reward_metrics,
    separation,
)

LOGIT_9 = math.log(9)  # sigmoid(LOGIT_9) = 0.9
margins = st.lists(st.floats(-20, 20, allow_subnormal=False), min_size=1, max_size=30).map(np.array)


def mean(values: FloatArray) -> float:
    return float(values.mean())


def test_a_tie_is_half_right() -> None:
    assert accuracy(np.array([1.0, -1.0, 0.0, 2.0])) == 0.625


def test_brier_and_log_likelihood_by_hand() -> None:
    two = np.array([LOGIT_9, -LOGIT_9])  # P(chosen wins) = 0.9 and 0.1
    assert brier(two) == pytest.approx((0.01 + 0.81) / 2)
    assert log_likelihood(two) == pytest.approx((math.log(0.9) + math.log(0.1)) / 2)
    assert log_likelihood(np.array([-800.0])) == -800.0  # no overflow


def test_ece_by_hand() -> None:
    # Sure by 0.85 and right once in two: either orientation is off by 0.35.
    logit = math.log(0.85 / 0.15)
    assert ece(np.array([logit, -logit])) == pytest.approx(0.35)
    assert ece(np.array([logit, logit])) == pytest.approx(0.15)
    assert ece(np.array([0.0, 0.0])) == 0.0
    assert ece(np.array([800.0])) == 0.0  # P = 1 falls in the last bin


def test_ece_of_a_calibrated_model_is_small_and_of_a_boastful_one_is_not() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=2, size=20_000)
    signed = np.where(rng.random(20_000) < expit(logits), logits, -logits)
    assert ece(signed) < 0.01
    assert ece(4 * signed) > 0.08


def test_auc_by_hand() -> None:
    # Wins 2, -1 against losses -2, 1: 2 beats both, -1 beats -2 only.
    assert auc(np.array([2.0, -1.0])) == 0.75
    assert auc(np.array([0.0])) == 0.5


@settings(deadline=None)
@given(margins)
def test_auc_is_that_of_scikit_learn_over_both_orientations(m: FloatArray) -> None:
    both, won = np.concatenate([m, -m]), np.repeat([1, 0], len(m))
    assert auc(m) == pytest.approx(roc_auc_score(won, both))


@settings(deadline=None)
@given(margins)
def test_a_model_turned_round_is_as_wrong_as_it_was_right(m: FloatArray) -> None:
    assert accuracy(-m) == pytest.approx(1 - accuracy(m))
    assert auc(-m) == pytest.approx(1 - auc(m))


@settings(deadline=None)
@given(margins)
def test_the_order_of_the_pairs_is_nothing(m: FloatArray) -> None:
    order = np.random.default_rng(len(m)).permutation(len(m))
    for metric in (accuracy, auc, ece, brier, log_likelihood):
        assert metric(m[order]) == pytest.approx(metric(m))


def test_the_bootstrap_is_wider_for_clusters_than_for_singles() -> None:
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(size=50), 8)  # eight equal rows a cluster
    together = cluster_bootstrap(values, [f"s{i // 8}" for i in range(400)], mean)
    single = cluster_bootstrap(values, [f"s{i}" for i in range(400)], mean)
    assert together[0] < single[0] < values.mean() < single[1] < together[1]
    assert together[1] - together[0] == pytest.approx(2 * 1.96 * values.std() / math.sqrt(50), rel=0.15)


def test_the_bootstrap_draws_whole_clusters_of_any_size_in_any_order() -> None:
    # Clusters a = {1, 1, 1} and b = {9}: a resample is aa, ab, ba or bb, with sums 6, 12 or 18.
    seen: list[float] = []

    def total(values: FloatArray) -> float:
        seen.append(float(values.sum()))
        return seen[-1]

    assert cluster_bootstrap([1, 9, 1, 1], ["a", "b", "a", "a"], total) == (6.0, 18.0)
    assert set(seen) == {6.0, 12.0, 18.0}
    assert len(seen) == 2000


def test_the_bootstrap_keeps_its_seed_and_takes_rows() -> None:
    rows = np.random.default_rng(1).normal(size=(30, 2))
    clusters = [f"s{i % 10}" for i in range(30)]

    def gap(v: FloatArray) -> float:
        return float((v[:, 0] - v[:, 1]).mean())

    first = cluster_bootstrap(rows, clusters, gap, n=200, seed=3)
    assert first == cluster_bootstrap(rows, clusters, gap, n=200, seed=3)
    assert first != cluster_bootstrap(rows, clusters, gap, n=200, seed=4)
    assert cluster_bootstrap([1.0, 3.0], ["s", "s"], mean) == (2.0, 2.0)


@pytest.mark.parametrize("clusters", [["a"], ["a", "b", "c"]])
def test_the_bootstrap_refuses_unlike_lengths(clusters: list[str]) -> None:
    with pytest.raises(ValueError, match="2 values but"):
        cluster_bootstrap([1.0, 2.0], clusters, mean)
    with pytest.raises(ValueError, match="0 values but 0"):
        cluster_bootstrap([], [], mean)


def test_length_margins_are_characters() -> None:
    assert length_baseline(["four", "a"], ["no", "five5"]).tolist() == [2.0, -4.0]
    with pytest.raises(ValueError, match="zip"):
        length_baseline(["a"], [])


def test_calibration_finds_the_slope_of_the_log_odds() -> None:
    # Longer by 10 wins three times in four: P = 0.75 whatever the unit.
    lengths = np.array([10.0, 10.0, 10.0, -10.0])
    assert expit(calibrated(lengths)) == pytest.approx([0.75, 0.75, 0.75, 0.25], abs=1e-4)
    assert expit(calibrated(-lengths)) == pytest.approx([0.75, 0.75, 0.75, 0.25], abs=1e-4)  # shorter wins
    assert calibrated(np.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    assert np.isfinite(calibrated(np.array([1.0, 2.0]))).all()  # length tells all


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-300, 300), min_size=1, max_size=20))
def test_a_calibrated_baseline_is_never_worse_than_a_coin(lengths: list[int]) -> None:
    assert log_likelihood(calibrated(np.array(lengths, dtype=float))) >= math.log(0.5) - 1e-9


def test_all_metrics_stand_beside_those_of_length() -> None:
    got = reward_metrics([2.0, 1.0, -1.0, 0.0], ["a", "a", "b", "c"], ["xxx", "xx", "x", "x"], ["x", "x", "x", "xx"])
    figures = {"accuracy", "auc", "ece", "brier", "log_likelihood"}
    names = {f"{figure}{end}" for figure in figures for end in ("", "_low", "_high")}
    of_alike = names | {"pairs", "length_accuracy"}
    assert set(got) == names | {f"length_{n}" for n in names} | {f"alike_{n}" for n in of_alike}
    assert got["accuracy"] == 0.625
    assert got["accuracy_low"] <= 0.625 <= got["accuracy_high"]
    assert got["length_accuracy"] == 0.625  # 2, 1, 0, -1 characters
    assert got["brier"] == pytest.approx(brier(np.array([2.0, 1.0, -1.0, 0.0])))
    assert got["length_brier"] <= 0.25


def test_intervals_over_one_set_of_draws_are_those_of_each_figure_by_itself() -> None:
    rng = np.random.default_rng(5)
    pair_margins = rng.normal(0.4, 1, size=40).round(1)  # with ties
    pair_margins[:4] = [0.0, 0.0, 0.5, -0.5]
    logits, speeches = 1.5 * pair_margins, [f"s{i % 11}" for i in range(40)]
    got = intervals(pair_margins, logits, speeches)
    for name, values, metric in (
        ("accuracy", pair_margins, accuracy), ("auc", pair_margins, auc), ("ece", logits, ece),
        ("brier", logits, brier), ("log_likelihood", logits, log_likelihood),
    ):  # fmt: skip
        expected = cluster_bootstrap(values, speeches, metric)
        assert (got[f"{name}_low"], got[f"{name}_high"]) == pytest.approx(expected), name
        assert got[f"{name}_low"] < metric(values) < got[f"{name}_high"] or name == "ece"


def test_intervals_are_clustered_by_speech() -> None:
    rng = np.random.default_rng(6)
    pair_margins = np.repeat(rng.normal(0.3, 1, size=30), 6)
    together = intervals(pair_margins, pair_margins, [f"s{i // 6}" for i in range(180)])
    single = intervals(pair_margins, pair_margins, [f"s{i}" for i in range(180)])
    for name in ("accuracy", "auc", "brier", "log_likelihood"):
        assert together[f"{name}_low"] < single[f"{name}_low"] < single[f"{name}_high"] < together[f"{name}_high"]


def test_pairs_of_like_length_are_measured_apart() -> None:
    long, longer, short = "x" * 100, "x" * 110, "x" * 50  # 110 and 100 differ by 9 % of the longer
    assert alike([long, longer, long, ""], [longer, long, short, ""]).tolist() == [True, True, False, True]
    got = reward_metrics([1.0, -1.0, 5.0], ["a", "b", "b"], [long, longer, long], [longer, long, short])
    assert (got["alike_pairs"], got["alike_accuracy"], got["alike_length_accuracy"]) == (2, 0.5, 0.5)
    assert (got["alike_accuracy_low"], got["alike_accuracy_high"]) == (0.0, 1.0)
    matched = reward_metrics([1.0, -1.0], ["a", "b"], [long, longer], [longer, long])
    assert all(got[f"alike_{n}{end}"] == matched[f"{n}{end}"] for n in FIGURES for end in ("", "_low", "_high"))
    unlike = reward_metrics([1.0], ["a"], [long], [short])
    assert unlike["alike_pairs"] == 0
    assert all(unlike[name] is None for name in got if name.startswith("alike_") and name != "alike_pairs")


def test_separation_by_hand_and_without_one_kind() -> None:
    values, marked = np.array([3.0, 1.0, 1.0, 0.0]), np.array([True, True, False, False])
    assert separation(values, marked) == (1 + 1 + 0.5 + 1) / 4
    assert separation(-values, marked) == 1 - separation(values, marked)
    assert math.isnan(separation(values, np.ones(4, dtype=bool)))


def test_a_margin_that_is_no_number_is_named_and_not_averaged() -> None:
    with pytest.raises(ValueError, match=r"margin 1 \(speech b\) is nan"):
        reward_metrics([1.0, float("nan")], ["a", "b"], ["x", "x"], ["x", "x"])
    with pytest.raises(ValueError, match="as many of each"):
        reward_metrics([1.0, 2.0], ["a", "b"], ["x"], ["x", "x"])
    with pytest.raises(ValueError, match="one at least"):
        reward_metrics([], [], [], [])

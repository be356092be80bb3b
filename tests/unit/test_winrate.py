"""Win rates: counts by hand, invalid apart, clustered intervals, and length control."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from psyray.evaluate.winrate import WinRate, length_controlled, length_controlled_interval, outcomes, win_rate
from psyray.records import Verdict

A, B, TIE, INVALID = Verdict.A, Verdict.B, Verdict.TIE, Verdict.INVALID


def test_ties_are_half_and_invalid_verdicts_stand_apart() -> None:
    got = win_rate([A, A, TIE, B, INVALID], ["s", "s", "s", "s", "t"])
    # All valid verdicts are of one speech: the interval has no width.
    assert got == WinRate(rate=0.625, low=0.625, high=0.625, wins=2, ties=1, losses=1, invalid=1)


def test_the_interval_is_by_speech() -> None:
    verdicts = [A, A, A, A, B, B, B, B] * 10
    by_speech = win_rate(verdicts, [f"s{i // 4}" for i in range(80)])
    by_verdict = win_rate(verdicts, [f"v{i}" for i in range(80)])
    assert by_speech.rate == by_verdict.rate == 0.5
    assert by_speech.low < by_verdict.low < 0.5 < by_verdict.high < by_speech.high


def test_no_valid_verdict_makes_no_number() -> None:
    got = win_rate([INVALID, INVALID], ["s", "t"])
    assert math.isnan(got.rate) and math.isnan(got.low) and math.isnan(got.high)
    assert (got.wins, got.ties, got.losses, got.invalid) == (0, 0, 0, 2)
    with pytest.raises(ValueError, match="1 verdicts but 2 clusters"):
        win_rate([A], ["s", "t"])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(list(Verdict)), max_size=20))
def test_swapped_verdicts_give_the_opponents_rate(verdicts: list[Verdict]) -> None:
    clusters = [f"s{i // 2}" for i in range(len(verdicts))]
    here, there = win_rate(verdicts, clusters), win_rate([v.swap() for v in verdicts], clusters)
    assert (here.wins, here.ties, here.invalid) == (there.losses, there.ties, there.invalid)
    assert here.wins + here.ties + here.losses + here.invalid == len(verdicts)
    assert [there.rate, there.low, there.high] == pytest.approx(
        [1 - here.rate, 1 - here.high, 1 - here.low], nan_ok=True
    )


def test_outcomes_of_verdicts() -> None:
    assert outcomes([A, TIE, B, INVALID]).tolist() == pytest.approx([1.0, 0.5, 0.0, math.nan], nan_ok=True)


def test_without_any_difference_in_length_the_win_rate_stays() -> None:
    assert length_controlled([1, 1, 0.5, 0], [0, 0, 0, 0]) == pytest.approx(0.625, abs=1e-4)


def test_lengths_that_do_not_matter_leave_the_win_rate() -> None:
    # Three wins in four among the longer and among the shorter.
    assert length_controlled([1, 1, 1, 0] * 2, [9] * 4 + [-9] * 4) == pytest.approx(0.75, abs=1e-4)


def test_a_win_by_length_alone_is_controlled_away() -> None:
    """Wins follow the length difference only, and the model under test is mostly longer."""
    rng = np.random.default_rng(0)
    lengths = rng.normal(loc=300, scale=400, size=4000)
    won = rng.random(4000) < expit(2 * np.tanh(lengths / lengths.std()))
    assert won.mean() > 0.6
    assert length_controlled(won.astype(float), lengths) == pytest.approx(0.5, abs=0.04)
    better = rng.random(4000) < expit(1 + 2 * np.tanh(lengths / lengths.std()))
    assert length_controlled(better.astype(float), lengths) == pytest.approx(expit(1), abs=0.04)


def test_the_interval_at_equal_length_is_by_speech_and_holds_what_is_left() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.normal(loc=300, scale=400, size=40)
    won = (rng.random(40) < expit(2 * np.tanh(lengths / lengths.std()))).astype(float)
    each = [f"s{i}" for i in range(40)]
    low, high = length_controlled_interval(won, lengths, each)
    assert low < length_controlled(won, lengths) < high and low < 0.5 < high
    wide = length_controlled_interval(np.tile(won, 4), np.tile(lengths, 4), each * 4)
    narrow = length_controlled_interval(np.tile(won, 4), np.tile(lengths, 4), [f"v{i}" for i in range(160)])
    assert wide == pytest.approx((low, high), abs=0.02) and narrow[1] - narrow[0] < 0.7 * (wide[1] - wide[0])
    assert length_controlled_interval([1.0, 1.0], [3, 4], ["s", "t"]) == (1.0, 1.0)


def test_invalid_outcomes_are_left_out_with_their_lengths() -> None:
    kept = length_controlled([1, 0, 1, 0.5], [5, -3, 2, 8])
    assert length_controlled([1, 0, math.nan, 1, 0.5], [5, -3, math.nan, 2, 8]) == kept
    assert math.isnan(length_controlled([math.nan], [3.0]))


@pytest.mark.parametrize("outcome", [0.0, 0.5, 1.0])
def test_one_outcome_throughout_is_the_rate(outcome: float) -> None:
    assert length_controlled([outcome] * 3, [1, 2, 3]) == outcome


compared = st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(-500, 500)), min_size=1, max_size=30)


@settings(deadline=None)
@given(compared, st.sampled_from([0.01, 7.0]))
def test_the_opponent_has_the_rest_and_the_unit_is_nothing(rows: list[tuple[float, int]], unit: float) -> None:
    outcome, length = np.array(rows, dtype=float).T
    rate = length_controlled(outcome, length)
    assert 0 <= rate <= 1
    assert length_controlled(1 - outcome, -length) == pytest.approx(1 - rate, abs=1e-4)
    assert length_controlled(outcome, unit * length) == pytest.approx(rate, abs=1e-4)


@pytest.mark.parametrize(
    ("outcome", "length", "said"),
    [([1, 0], [1], "do not match"), ([2.0, 0], [1, 1], "0..1"), ([1, 0], [1, math.inf], "must be numbers")],
)
def test_what_cannot_be_controlled_is_refused(outcome: list[float], length: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        length_controlled(outcome, length)

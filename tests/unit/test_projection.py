"""Principal axes of what tells replies to one prompt apart."""

from __future__ import annotations

import numpy as np
import pytest

from psyray.reward.projection import fit_projection

# Two prompts 100 apart; replies lie +-2 apart on the first axis and +-1 on the second, about their prompt.
FEATURES = np.array([[2.0, 1], [-2, 1], [2, -1], [-2, -1], [102, 101], [98, 101], [102, 99], [98, 99]])
PROMPTS = ["a"] * 4 + ["b"] * 4


@pytest.mark.parametrize(("whiten", "ratio"), [(0.0, 2.0), (0.5, np.sqrt(2)), (1.0, 1.0)])
def test_whitening_narrows_wide_axes(whiten: float, ratio: float) -> None:
    x = fit_projection(FEATURES, PROMPTS, components=2, whiten=whiten)(FEATURES)
    within = x[:4] - x[:4].mean(axis=0)
    first, second = np.abs(within).max(axis=0)
    assert first / second == pytest.approx(ratio)
    assert (within**2).sum(axis=1).mean() == pytest.approx(1.0)


def test_what_a_prompt_shares_is_no_axis() -> None:
    one = fit_projection(FEATURES, PROMPTS, components=1)
    assert np.abs(one.basis_DR[:, 0]) == pytest.approx([0.5, 0.0])  # the first axis, over its deviation 2
    shifted = FEATURES + np.array([[0.0, 0.0]] * 4 + [[1e4, -5e4]] * 4)
    assert np.abs(fit_projection(shifted, PROMPTS, components=1).basis_DR) == pytest.approx(np.abs(one.basis_DR))


def test_no_more_axes_than_the_features_have() -> None:
    flat = np.concatenate([FEATURES, np.ones((8, 3))], axis=1)
    assert fit_projection(flat, PROMPTS, components=5)(flat).shape == (8, 2)


def test_replies_that_are_all_the_same_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing tells them apart"):
        fit_projection(np.ones((4, 2)), ["a", "a", "b", "b"], components=1)
    with pytest.raises(ValueError, match="a row"):
        fit_projection(FEATURES, ["a"], components=1)

"""An ensemble of Bradley-Terry heads on frozen features: what the reward is thought to be, and how surely.

    heads = fit_heads(chosen_ND, rejected_ND, speech_ids, count=16, ridge=1.0, seed=0)
    scores_NH = heads.scores(features_ND)  # the spread over H is the uncertainty that acquisition asks about

Each head is a logistic regression on feature differences over its own bootstrap of the speeches, pulled by a
ridge to a prior weight vector. The heads cost seconds to fit, so they can follow every round of labels.

Shapes: N pairs, D features, H heads, R = min(N, D).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from scipy.linalg import block_diag
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from psyray.arrays import FloatArray
from psyray.errors import PsyrayError
from psyray.files import draft
from psyray.reward.body import Reading
from psyray.reward.uncertainty import Belief


@dataclass(frozen=True)
class Heads:
    """Linear heads on standardised features: score = weights . (feature - mean) / scale.

    `reading` says which states of the model the features are; what scores by the heads reads those.
    """

    weights_HD: FloatArray
    mean_D: FloatArray
    scale_D: FloatArray
    reading: Reading = field(default=Reading(), kw_only=True)

    def standardised(self, features_ND: npt.ArrayLike) -> FloatArray:
        """[N, D] what the weights are for."""
        rows_ND = np.asarray(features_ND, dtype=np.float64)
        if rows_ND.ndim != 2 or rows_ND.shape[1] != len(self.mean_D):
            raise ValueError(f"features must be [N, {len(self.mean_D)}], not of shape {rows_ND.shape}")
        return np.asarray((rows_ND - self.mean_D) / self.scale_D)

    def scores(self, features_ND: npt.ArrayLike) -> FloatArray:
        """[N, H] scores in logits; a NaN feature gives NaN scores, which acquisition never picks."""
        return np.asarray(self.standardised(features_ND) @ self.weights_HD.T)

    def belief(self, features_ND: npt.ArrayLike) -> Belief:
        """Mean and standard deviation over the heads of each score, in logits."""
        scores_NH = self.scores(features_ND)
        return Belief(scores_NH.mean(axis=1), scores_NH.std(axis=1))

    def difference(self, first_ND: npt.ArrayLike, second_ND: npt.ArrayLike) -> Belief:
        """Mean and standard deviation over the heads of score(first) - score(second), in logits."""
        margins_NH = self.scores(first_ND) - self.scores(second_ND)
        return Belief(margins_NH.mean(axis=1), margins_NH.std(axis=1))

    def doubts(self, features_ND: npt.ArrayLike) -> FloatArray:
        """[N, E] coordinates z in which |z_i| is the spread of a score and |z_i - z_j| that of a score difference."""
        scores_NH = self.scores(features_ND)
        return np.asarray((scores_NH - scores_NH.mean(axis=1, keepdims=True)) / np.sqrt(scores_NH.shape[1]))

    @classmethod
    def joined(cls, members: Sequence[Self]) -> Self:
        """The heads of all members on their features one after another; a head reads nothing of the others'."""
        mean_D, scale_D = (np.concatenate([getattr(m, name) for m in members]) for name in ("mean_D", "scale_D"))
        return cls(block_diag(*(member.weights_HD for member in members)), mean_D, scale_D)

    def save(self, path: Path) -> None:
        """Write an .npz whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {name.split("_")[0]: array for name, array in vars(self).items() if name != "reading"}
        with draft(path) as beside, beside.open("wb") as file:  # by its name alone, numpy would add an ending
            np.savez(file, allow_pickle=False, **arrays, reading=json.dumps(asdict(self.reading)))

    @classmethod
    def load(cls, path: Path) -> Heads:
        """Read what `save` wrote, of whichever kind."""
        from psyray.reward.mlp import MlpHeads
        from psyray.reward.posterior import PosteriorHeads

        with np.load(path, allow_pickle=False) as saved:
            arrays = dict(saved)
        told = arrays.pop("reading", None)  # absent in files written before there was a choice
        reading = Reading(**json.loads(str(told))) if told is not None else Reading()
        kind = MlpHeads if "hidden" in arrays else PosteriorHeads if "root" in arrays else Heads
        return kind(*arrays.values(), reading=reading)


def drawn_priors(
    prior_D: FloatArray | None, spread: float, count: int, size: int, rng: np.random.Generator
) -> FloatArray:
    """[H, D] a prior for each head: normal around `prior_D` (none: 0); ValueError where that has not `size` weights."""
    prior = np.zeros(size) if prior_D is None else np.asarray(prior_D, dtype=np.float64)
    if prior.shape != (size,):
        raise ValueError(f"the prior must have {size} weights, not shape {prior.shape}")
    return np.asarray(prior + spread * rng.normal(size=(count, size)))


def fit_heads(
    chosen_ND: npt.ArrayLike,
    rejected_ND: npt.ArrayLike,
    speech_ids: Sequence[str],
    *,
    count: int,
    ridge: float,
    seed: int,
    prior_D: FloatArray | None = None,
    prior_spread: float = 0.0,
) -> Heads:
    """`count` heads, each on a bootstrap of the speeches; rows of the two arrays are one pair each.

    Head h minimises sum_n m_hn log(1 + exp(-w . x_n)) + ridge / 2 |w - prior|^2, with x the standardised
    difference and m_hn how often the speech of pair n was drawn. `prior_D` (default 0) lives in standardised
    feature space: raw weights of a trained reward head times `standardisation(...)[1]`. With few pairs every
    head stays at the prior in most directions and the spread there is 0; `prior_spread` > 0 gives each its
    own prior, normal around `prior_D` with that standard deviation (randomised priors, 1806.03335). Raises
    ValueError for no pairs, unlike shapes, a NaN or infinite feature, a count or ridge not above 0.
    """
    chosen, rejected = checked_pairs(chosen_ND, rejected_ND, speech_ids, count, ridge)
    mean_D, scale_D = standardisation(chosen, rejected)
    rng = np.random.default_rng(seed)
    times_HN = bootstraps(speech_ids, count, rng)
    prior_HD = drawn_priors(prior_D, prior_spread, count, len(mean_D), rng)
    x_ND = (chosen - rejected) / scale_D
    moves_HD = _fit(x_ND, x_ND @ prior_HD.T, times_HN, ridge)
    return Heads(prior_HD + moves_HD, mean_D, scale_D)


def standardisation(chosen_ND: FloatArray, rejected_ND: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(mean [D], scale [D]) of the features over both sides; the scale of a constant feature is 1."""
    mean_D = (chosen_ND.mean(axis=0) + rejected_ND.mean(axis=0)) / 2
    square_D = (((chosen_ND - mean_D) ** 2).mean(axis=0) + ((rejected_ND - mean_D) ** 2).mean(axis=0)) / 2
    scale_D = np.sqrt(square_D)
    constant_D = scale_D <= 1e-12 * np.maximum(1.0, np.abs(mean_D))
    return mean_D, np.where(constant_D, 1.0, scale_D)


def checked_pairs(
    chosen_ND: npt.ArrayLike, rejected_ND: npt.ArrayLike, speech_ids: Sequence[str], count: int, ridge: float
) -> tuple[FloatArray, FloatArray]:
    """Both sides as arrays; ValueError says what cannot be fitted."""
    if count < 1 or ridge <= 0:
        raise ValueError(f"count and ridge must be positive, not {count} and {ridge}")
    chosen, rejected = np.asarray(chosen_ND, dtype=np.float64), np.asarray(rejected_ND, dtype=np.float64)
    if chosen.ndim != 2 or chosen.shape != rejected.shape or len(speech_ids) != len(chosen):
        raise ValueError(
            f"chosen {chosen.shape}, rejected {rejected.shape} and {len(speech_ids)} speeches do not match: "
            "each must have a row a pair"
        )
    if 0 in chosen.shape:
        raise ValueError(f"no pairs to fit heads on: features are of shape {chosen.shape}")
    for side, features in (("chosen", chosen), ("rejected", rejected)):
        bad_N = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if len(bad_N):
            raise ValueError(
                f"{side} row {bad_N[0]} (speech {speech_ids[bad_N[0]]}) has a NaN or infinite feature, "
                f"one of {len(bad_N)} such rows"
            )
    return chosen, rejected


def bootstraps(speech_ids: Sequence[str], count: int, rng: np.random.Generator) -> FloatArray:
    """[H, N]: how often each pair counts. Pairs of one speech are not independent, so speeches are drawn."""
    _, speech_N = np.unique(np.asarray(speech_ids), return_inverse=True)
    speeches = int(speech_N.max()) + 1
    times_HS = rng.multinomial(speeches, np.full(speeches, 1 / speeches), size=count)
    return np.asarray(times_HS[:, speech_N], dtype=np.float64)


def _fit(x_ND: FloatArray, offset_NH: FloatArray, times_HN: FloatArray, ridge: float) -> FloatArray:
    """[H, D]: how far each head moves from its prior, whose margins are the offsets.

    The move lies in the span of the differences, so R = min(N, D) coordinates do. Along the singular vectors,
    each scaled by the root of its curvature, the loss is nearly round and a head takes some dozens of steps.
    """
    left_NR, singular_R, basis_RD = np.linalg.svd(x_ND, full_matrices=False)
    unit_R = 1 / np.sqrt(singular_R**2 / 8 + ridge)  # 1/8: an even pair curves by 1/4, a sure one by 0
    x_NR, ridge_R = left_NR * (singular_R * unit_R), ridge * unit_R**2
    moves_HR = [settle(x_NR, o_N, m_N, ridge_R) for o_N, m_N in zip(offset_NH.T, times_HN, strict=True)]
    return np.asarray((np.stack(moves_HR) * unit_R) @ basis_RD)


def settle(
    x_NR: FloatArray,
    offset_N: FloatArray,
    times_N: FloatArray,
    ridge_R: FloatArray,
    *,
    start_R: FloatArray | None = None,
    slope: float = 1e-7,
) -> FloatArray:
    """The weights of least loss for one head, sought from `start_R` (none: 0) until no slope is steeper than `slope`.

    ValueError where one above 0.001 is left.
    """

    def loss(w_R: FloatArray) -> tuple[float, FloatArray]:
        margin_N = x_NR @ w_R + offset_N
        value = -times_N @ log_expit(margin_N) + ridge_R @ w_R**2 / 2
        return float(value), np.asarray(ridge_R * w_R - (times_N * expit(-margin_N)) @ x_NR)

    found = minimize(
        loss,
        np.zeros(len(ridge_R)) if start_R is None else start_R,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 5000, "maxfun": 10000, "ftol": 1e-15, "gtol": slope},
    )
    # The line search may end at the last digits of the loss, which is as good; a slope that is left is not.
    left = float(np.abs(found.jac).max())
    if not left < 1e-3:
        raise ValueError(f"a head did not settle (slope {left:.2g}): give a larger ridge")
    return np.asarray(found.x)


def own_head(model: Path) -> FloatArray:
    """[D] weights of a reward model's own score head, or of an adapter's, read without loading its body."""
    from safetensors import safe_open

    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in {"score.weight", "base_model.model.score.weight"} & set(tensors.keys()):
                return np.asarray(tensors.get_tensor(name).float().numpy()[0], dtype=np.float64)
    raise PsyrayError(f"{model} holds no score head; is it a reward model?")

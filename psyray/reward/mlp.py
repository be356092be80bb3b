"""Heads with one hidden layer on frozen features: for a preference that is no weighted sum of them.

    heads = fit_mlp_heads(chosen_ND, rejected_ND, speech_ids, count=10, ridge=10.0, seed=0)
    scores_NH = heads.scores(features_ND)

Each head is a linear prior, that of the trained reward model, plus a small network on the principal axes of how replies
to one speech differ. Networks differ by their bootstrap of the speeches and by the random weights that each starts from
and is pulled back to (anchored ensembles, arXiv 1810.05546). All are trained at once, in seconds.

Shapes: N pairs, D features, H heads, R axes, M hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from scipy.linalg import block_diag

from psyray.arrays import FloatArray
from psyray.reward.heads import Heads, bootstraps, checked_pairs, drawn_priors, standardisation
from psyray.reward.projection import fit_projection

AXES = 96
WHITEN = 0.25
STEPS = 300
BATCH = 4096  # pairs of one step
RATE = 0.02


@dataclass(frozen=True)
class MlpHeads(Heads):
    """score = weights . (feature - mean) / scale + out . tanh(hidden . x + bias), x = (feature - mean) . basis."""

    basis_DR: FloatArray
    hidden_HRM: FloatArray
    bias_HM: FloatArray
    out_HM: FloatArray

    def scores(self, features_ND: npt.ArrayLike) -> FloatArray:
        """[N, H] scores in logits; a NaN feature gives NaN scores."""
        linear_NH = super().scores(features_ND)
        x_NR = (np.asarray(features_ND, dtype=np.float64) - self.mean_D) @ self.basis_DR
        curved = [
            np.tanh(x_NR @ hidden_RM + bias_M) @ out_M
            for hidden_RM, bias_M, out_M in zip(self.hidden_HRM, self.bias_HM, self.out_HM, strict=True)
        ]
        return np.asarray(linear_NH + np.stack(curved, axis=1))

    @classmethod
    def joined(cls, members: Sequence[Self]) -> Self:
        """As of `Heads`: each network sees its own member's axes."""
        linear = Heads.joined(members)
        heads, axes = (sum(member.hidden_HRM.shape[at] for member in members) for at in (0, 1))
        hidden_HRM = np.zeros((heads, axes, members[0].hidden_HRM.shape[2]))
        h = r = 0
        for member in members:
            count, own, _ = member.hidden_HRM.shape
            hidden_HRM[h : h + count, r : r + own] = member.hidden_HRM
            h, r = h + count, r + own
        bias_HM, out_HM = (np.concatenate([getattr(m, name) for m in members]) for name in ("bias_HM", "out_HM"))
        basis_DR = block_diag(*(member.basis_DR for member in members))
        return cls(linear.weights_HD, linear.mean_D, linear.scale_D, basis_DR, hidden_HRM, bias_HM, out_HM)


def fit_mlp_heads(
    chosen_ND: npt.ArrayLike,
    rejected_ND: npt.ArrayLike,
    speech_ids: Sequence[str],
    *,
    count: int,
    ridge: float,
    seed: int,
    prior_D: FloatArray | None = None,
    prior_spread: float = 0.0,
    hidden: int = 32,
) -> MlpHeads:
    """`count` heads, each on a bootstrap of the speeches; arguments and errors as of `fit_heads`.

    A network's penalty is half the squared distance to its start in units of the prior's precision: R for the first
    layer, 1 for the biases, `ridge` M / R for the last, so that a sum over R axes is held as a linear head's is.
    """
    chosen, rejected = checked_pairs(chosen_ND, rejected_ND, speech_ids, count, ridge)
    mean_D, scale_D = standardisation(chosen, rejected)
    projection = fit_projection(
        np.concatenate([chosen, rejected]), [*speech_ids, *speech_ids], components=AXES, whiten=WHITEN
    )
    R = projection.basis_DR.shape[1]
    basis_DR = projection.basis_DR * np.sqrt(R)  # an axis is then about one wide
    rng = np.random.default_rng(seed)
    times_HN = bootstraps(speech_ids, count, rng)
    linear = Heads(drawn_priors(prior_D, prior_spread, count, len(mean_D), rng), mean_D, scale_D)
    start = (
        rng.normal(size=(count, R, hidden)) / np.sqrt(R),
        rng.normal(size=(count, hidden)),
        prior_spread * np.sqrt(R / hidden) * rng.normal(size=(count, hidden)),
    )
    found = _train(
        [(side - mean_D) @ basis_DR for side in (chosen, rejected)],
        (linear.scores(chosen) - linear.scores(rejected)).T,
        times_HN,
        start,
        (float(R), 1.0, ridge * hidden / R),
        rng,
    )
    return MlpHeads(linear.weights_HD, mean_D, scale_D, basis_DR, *found)


def _train(
    sides: Sequence[FloatArray],
    offset_HN: FloatArray,
    times_HN: FloatArray,
    start: Sequence[FloatArray],
    precisions: Sequence[float],
    rng: np.random.Generator,
) -> list[FloatArray]:
    """(hidden, bias, out) of all heads after `STEPS` steps of Adam on whole or drawn batches of pairs."""
    import torch
    from torch.nn.functional import softplus

    def tensor(array: FloatArray) -> Any:
        return torch.tensor(array, dtype=torch.float32)

    x_2NR, offset, times = torch.stack([tensor(side) for side in sides]), tensor(offset_HN), tensor(times_HN)
    anchors = [tensor(array) for array in start]
    weights = [anchor.clone().requires_grad_() for anchor in anchors]
    adam = torch.optim.Adam(weights, lr=RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STEPS)
    pairs = x_2NR.shape[1]
    for _ in range(STEPS):
        some = torch.arange(pairs) if pairs <= BATCH else torch.from_numpy(rng.integers(pairs, size=BATCH))
        hidden, bias, out = weights
        two_HBM = [torch.tanh(torch.einsum("br,hrm->hbm", x[some], hidden) + bias[:, None]) for x in x_2NR]
        margin_HB = torch.einsum("hbm,hm->hb", two_HBM[0] - two_HBM[1], out) + offset[:, some]
        loss = (times[:, some] * softplus(-margin_HB)).sum() * (pairs / len(some))
        pulls = zip(weights, anchors, precisions, strict=True)
        loss = loss + sum(precision / 2 * ((w - anchor) ** 2).sum() for w, anchor, precision in pulls)
        adam.zero_grad()
        loss.backward()
        adam.step()
        decay.step()
    return [w.detach().numpy().astype(np.float64) for w in weights]

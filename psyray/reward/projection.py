"""Coordinates for a linear head, found without labels: principal axes of how replies to one prompt differ.

A reward model compares replies to one prompt, so what all replies to a prompt share is noise to it. Few axes,
scaled alike, let a head learn from a few dozen labels.

Shapes: N responses, D features, R axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from psyray.arrays import FloatArray


@dataclass(frozen=True)
class Projection:
    """x = (feature - mean) . basis."""

    mean_D: FloatArray
    basis_DR: FloatArray

    def __call__(self, features: npt.ArrayLike) -> FloatArray:
        """[..., R] of [..., D]."""
        return np.asarray((np.asarray(features, dtype=np.float64) - self.mean_D) @ self.basis_DR)


def fit_projection(
    features_ND: npt.ArrayLike, prompts: Sequence[str], *, components: int, whiten: float = 1.0
) -> Projection:
    """The `components` principal axes of the features about their prompt's mean, each scaled by its deviation^-whiten.

    `whiten` 0 only turns the space, 1 makes every axis equally wide; a ridge on a head then shrinks all alike. The
    whole is scaled so that the mean square |x - prompt mean|^2 is 1. Fewer axes come out where the features have
    fewer. Raises ValueError for features that do not vary within a prompt, or a number of rows that does not fit.
    """
    rows_ND = np.asarray(features_ND, dtype=np.float64)
    if rows_ND.ndim != 2 or len(rows_ND) != len(prompts):
        raise ValueError(f"features {rows_ND.shape} and {len(prompts)} prompts: need a row a prompt's response")
    _, group_N = np.unique(np.asarray(prompts), return_inverse=True)
    sums_GD = np.zeros((int(group_N.max()) + 1, rows_ND.shape[1]))
    np.add.at(sums_GD, group_N, rows_ND)
    within_ND = rows_ND - (sums_GD / np.bincount(group_N)[:, None])[group_N]
    variance_D, axes_DD = np.linalg.eigh(within_ND.T @ within_ND / len(within_ND))
    kept = np.argsort(-variance_D)[:components]
    kept = kept[variance_D[kept] > 1e-10 * max(float(variance_D.max()), 1e-300)]
    if not len(kept):
        raise ValueError("the features of each prompt's responses are all the same: nothing tells them apart")
    basis_DR = axes_DD[:, kept] * variance_D[kept] ** (-whiten / 2)
    return Projection(rows_ND.mean(axis=0), basis_DR / np.sqrt(((within_ND @ basis_DR) ** 2).sum(axis=1).mean()))

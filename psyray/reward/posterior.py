"""Heads that know their posterior: draws of it for what reads an ensemble, and its mean and covariance themselves.

    heads = PosteriorHeads(draws_HD, mean_D, scale_D, means_Md, root_Mdd)
    heads.difference(first_ND, second_ND)  # the posterior's own mean and spread: no draw is in it

A handful of draws says little of how unsure a score is: ten in opposite pairs know five directions.

Shapes: N responses, H draws, M members (LoRA adapters; one without), D features, d = D / M of one member.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from psyray.arrays import FloatArray
from psyray.reward.heads import Heads
from psyray.reward.uncertainty import Belief


@dataclass(frozen=True)
class PosteriorHeads(Heads):
    """score = w . (feature - mean) / scale of a member drawn evenly, w ~ N(means_m, root_m root_m')."""

    means_Md: FloatArray
    root_Mdd: FloatArray

    def belief(self, features_ND: npt.ArrayLike) -> Belief:
        """Exact where `Heads` takes mean and spread of the draws."""
        return Belief(self.means(features_ND).mean(axis=1), np.linalg.norm(self.doubts(features_ND), axis=1))

    def difference(self, first_ND: npt.ArrayLike, second_ND: npt.ArrayLike) -> Belief:
        """Exact where `Heads` takes mean and spread of the draws."""
        mean_N = (self.means(first_ND) - self.means(second_ND)).mean(axis=1)
        return Belief(mean_N, np.linalg.norm(self.doubts(first_ND) - self.doubts(second_ND), axis=1))

    def doubts(self, features_ND: npt.ArrayLike) -> FloatArray:
        """[N, D + M]: what each direction of the covariance adds, and how far the members' means lie apart."""
        means_NM = self.means(features_ND)
        apart_NM = (means_NM - means_NM.mean(axis=1, keepdims=True)) / np.sqrt(means_NM.shape[1])
        within = [x_Nd @ root_dd for x_Nd, root_dd in zip(self._parts(features_ND), self.root_Mdd, strict=True)]
        return np.concatenate([*(one / np.sqrt(len(within)) for one in within), apart_NM], axis=1)

    def within(self, doubt_NE: FloatArray) -> list[FloatArray]:
        """[N, d] of `doubts` that each member's covariance adds."""
        return np.split(doubt_NE, np.cumsum([len(root_dd) for root_dd in self.root_Mdd]), axis=1)[:-1]

    def along(self, axes_EA: FloatArray) -> FloatArray:
        """[D, A]: `standardised` features times this are their `doubts` along axes, without those being made."""
        *within, apart_MA = np.split(axes_EA, np.cumsum([len(root_dd) for root_dd in self.root_Mdd]))
        apart_MA = apart_MA - apart_MA.mean(axis=0)
        moved = zip(self.root_Mdd, self.means_Md, within, apart_MA, strict=True)
        parts = [root_dd @ axes_dA + np.outer(mean_d, apart_A) for root_dd, mean_d, axes_dA, apart_A in moved]
        return np.asarray(np.concatenate(parts) / np.sqrt(len(parts)))

    def means(self, features_ND: npt.ArrayLike) -> FloatArray:
        """[N, M] what each member's most likely head says."""
        found = [x_Nd @ mean_d for x_Nd, mean_d in zip(self._parts(features_ND), self.means_Md, strict=True)]
        return np.stack(found, axis=1)

    def _parts(self, features_ND: npt.ArrayLike) -> list[FloatArray]:
        return np.split(self.standardised(features_ND), len(self.means_Md), axis=1)

    @classmethod
    def joined(cls, members: Sequence[Self]) -> Self:
        """As of `Heads`: a mixture of the members' posteriors, each on its own part of the features."""
        linear = Heads.joined(members)
        means_Md, root_Mdd = (np.concatenate([getattr(m, name) for m in members]) for name in ("means_Md", "root_Mdd"))
        return cls(linear.weights_HD, linear.mean_D, linear.scale_D, means_Md, root_Mdd)

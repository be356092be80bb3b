"""Rating heads: what a judge would say of each principle, read off the frozen features that the preference is read off.

    heads = fit_ratings(features_ND, ratings_NP, speech_ids, rubric)
    heads.explain(features_D)  # {"empathy": 3.9, ..., "safety": 4.6}
    heads.held_out(features_ND, ratings_NP)  # how far to believe it, principle by principle

A ridge regression for each principle; the fit takes seconds. They explain a score, they do not make it: the preference
heads learn from who was preferred, these from the ratings alone. The principles' weights are the rubric's.

Shapes: N responses, D features, P principles.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

from psyray.arrays import Features, FloatArray
from psyray.files import draft
from psyray.records import Row
from psyray.rubric import Rubric

RATINGS = "ratings.npz"  # beside a run's heads.npz
RIDGES = [1.0, 10.0, 100.0, 1e3, 1e4, 1e5]
FOLDS = 5


@dataclass(frozen=True)
class RatingHeads:
    """rating = mean rating + coefficients . (feature - mean) / scale, on the rubric's scale but not cut to it."""

    keys: tuple[str, ...]
    weights_P: FloatArray
    coefficients_PD: FloatArray
    ratings_P: FloatArray
    mean_D: FloatArray
    scale_D: FloatArray
    ridge: float

    def predict(self, features_ND: npt.ArrayLike) -> FloatArray:
        """[N, P] ratings."""
        x_ND = (np.asarray(features_ND, dtype=np.float64) - self.mean_D) / self.scale_D
        return np.asarray(self.ratings_P + x_ND @ self.coefficients_PD.T)

    def explain(self, features_D: npt.ArrayLike) -> dict[str, float]:
        """The principles' ratings of one response."""
        [ratings_P] = self.predict(np.asarray(features_D, dtype=np.float64)[None])
        return dict(zip(self.keys, ratings_P.tolist(), strict=True))

    def over(self, members: int) -> RatingHeads:
        """The same for features that stand `members` times one after another: read off their mean."""
        mean_D, scale_D = np.tile(self.mean_D, members), np.tile(self.scale_D, members)
        coefficients_PD = np.tile(self.coefficients_PD, members) / members
        return replace(self, coefficients_PD=coefficients_PD, mean_D=mean_D, scale_D=scale_D)

    def held_out(self, features_ND: npt.ArrayLike, ratings_NP: npt.ArrayLike) -> dict[str, dict[str, float | None]]:
        """For each principle, and for their weighted mean as `score`, R^2 and Spearman's correlation on new responses.

        R^2 is 0 for one who always says the mean of these ratings. None where the ratings, or what is predicted, do
        not vary.
        """
        truth_NP, predicted_NP = np.asarray(ratings_NP, dtype=np.float64), self.predict(features_ND)
        found = {key: _fit_of(p, t) for key, p, t in zip(self.keys, predicted_NP.T, truth_NP.T, strict=True)}
        weights_P = self.weights_P / self.weights_P.sum()
        return found | {"score": _fit_of(predicted_NP @ weights_P, truth_NP @ weights_P)}

    def save(self, path: Path) -> None:
        """Write an .npz whole or not at all; `load` reads it."""
        with draft(path) as beside, beside.open("wb") as file:  # by its name alone, numpy would add an ending
            np.savez(file, allow_pickle=False, **vars(self))

    @classmethod
    def load(cls, path: Path) -> RatingHeads:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as saved:
            arrays = {name: saved[name] for name in saved.files}
        return cls(**arrays | {"keys": tuple(arrays["keys"].tolist()), "ridge": float(arrays["ridge"])})


def fit_ratings(
    features_ND: npt.ArrayLike, ratings_NP: npt.ArrayLike, speech_ids: Sequence[str], rubric: Rubric
) -> RatingHeads:
    """Ridge heads on standardised features; the ridge with the least error on speeches left out, of `RIDGES`.

    ValueError for fewer than two speeches: there is none to leave out.
    """
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV, GroupKFold

    features, ratings = np.asarray(features_ND, dtype=np.float64), np.asarray(ratings_NP, dtype=np.float64)
    if (speeches := len(set(speech_ids))) < 2:
        raise ValueError(f"rating heads need responses to two speeches or more, not to {speeches}")
    mean_D, spread_D = features.mean(axis=0), features.std(axis=0)
    scale_D = np.where(spread_D > 1e-12 * np.maximum(1.0, np.abs(mean_D)), spread_D, 1.0)
    folds = GroupKFold(min(FOLDS, speeches))
    search = GridSearchCV(Ridge(), {"alpha": RIDGES}, cv=folds, scoring="neg_mean_squared_error")
    best = search.fit((features - mean_D) / scale_D, ratings, groups=speech_ids).best_estimator_
    weights_P = np.array([principle.weight for principle in rubric.principles])
    return RatingHeads(
        tuple(rubric.keys), weights_P, best.coef_.reshape(ratings.shape[1], -1), ratings.mean(axis=0), mean_D, scale_D,
        float(best.alpha),
    )  # fmt: skip


def _fit_of(predicted_N: FloatArray, truth_N: FloatArray) -> dict[str, float | None]:
    if len(truth_N) < 2 or np.ptp(truth_N) == 0:
        return {"r2": None, "spearman": None}
    r2 = 1 - float(((predicted_N - truth_N) ** 2).sum() / ((truth_N - truth_N.mean()) ** 2).sum())
    order = None if np.ptp(predicted_N) == 0 else float(spearmanr(predicted_N, truth_N).statistic)
    return {"r2": r2, "spearman": order}


def rated(pairs: Iterable[Row], features: Features, keys: Sequence[str]) -> dict[str, Row]:
    """By id {speech_id, split, ratings} of the pairs' responses that have features and a number for each key."""
    found: dict[str, Row] = {}
    for pair in pairs:
        for side in ("chosen", "rejected"):
            response, ratings = pair[f"{side}_id"], pair[f"{side}_ratings"] or {}
            if response in features and all(_is_number(ratings.get(key)) for key in keys):
                row = {"speech_id": pair["speech_id"], "split": pair["split"]}
                found[response] = row | {"ratings": [ratings[key] for key in keys]}
    return found


def _is_number(rating: float | None) -> bool:
    # One NaN, as a pair kept by an earlier version may hold, would stop the fit after the reward model was trained.
    return rating is not None and isfinite(rating)


def fit_rated(pairs: Iterable[Row], features: Features, rubric: Rubric) -> tuple[RatingHeads | None, dict[str, Any]]:
    """Heads fitted on the training side's rated responses, and how well they do on the test side's.

    None where fewer than two training speeches have ratings, as with pairs that came without any.
    """
    found = rated(pairs, features, rubric.keys)
    train, test = (sorted(key for key, row in found.items() if row["split"] == side) for side in ("train", "test"))
    stats: dict[str, Any] = {"train": len(train), "test": len(test)}
    if len({found[key]["speech_id"] for key in train}) < 2:
        return None, stats
    features_ND, ratings_NP = _arrays(train, found, features)
    heads = fit_ratings(features_ND, ratings_NP, [found[key]["speech_id"] for key in train], rubric)
    stats["ridge"] = heads.ridge
    return heads, stats | ({"held_out": heads.held_out(*_arrays(test, found, features))} if test else {})


def _arrays(ids: Sequence[str], found: Mapping[str, Row], features: Features) -> tuple[FloatArray, FloatArray]:
    return np.stack([features[key] for key in ids], dtype=np.float64), np.array(
        [found[key]["ratings"] for key in ids], dtype=np.float64
    )

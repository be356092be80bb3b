"""How well a reward model ranks: metrics on margins, and the length baseline that stands beside each.

A margin is score(chosen) - score(rejected) in logits, one a pair: P(chosen wins) = sigmoid(margin). Where it
matters which side is called first, each pair counts in both orientations. Intervals are clustered by speech,
for pairs of one speech are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit
from scipy.stats import rankdata

from psyray.arrays import FloatArray, IntArray

DRAWS = 2000
INTERVAL = (2.5, 97.5)  # percentiles
BINS = 10
FIGURES = ("accuracy", "auc", "ece", "brier", "log_likelihood")
ALIKE = 0.1  # of the longer one: lengths that differ by no more are alike
STEEPEST = 50.0  # bound on the slope of the length baseline, which is infinite where length tells all


def accuracy(margins_N: FloatArray) -> float:
    """The share of pairs ranked right; a tie is half."""
    return float(np.mean((margins_N > 0) + 0.5 * (margins_N == 0)))


def auc(margins_N: FloatArray) -> float:
    """Area under the ROC curve for "the first wins", each pair in both orientations.

    With (margin, won) and (-margin, lost) this is P(margin_i > -margin_j) over all i, j, i = j included, with
    ties half.
    """
    return separation(np.concatenate([margins_N, -margins_N]), np.repeat([True, False], len(margins_N)))


def separation(values_N: FloatArray, marked_N: npt.NDArray[np.bool_]) -> float:
    """P(a marked value is above one that is not), ties half (Mann-Whitney); NaN where all or none are marked."""
    marked, others = int(marked_N.sum()), int((~marked_N).sum())
    if not marked or not others:
        return float("nan")
    return float((rankdata(values_N)[marked_N].sum() - marked * (marked + 1) / 2) / (marked * others))


def ece(margins_N: FloatArray) -> float:
    """Expected calibration error of P(first wins) in 10 equal bins, each pair in both orientations."""
    p_M = np.concatenate([expit(margins_N), expit(-margins_N)])
    won_M = np.repeat([1.0, 0.0], len(margins_N))
    bin_M = np.minimum((p_M * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bin_M, weights=won_M - p_M, minlength=BINS)
    return float(np.abs(gaps).sum() / len(p_M))


def brier(margins_N: FloatArray) -> float:
    """Mean squared distance of P(chosen wins) from 1; both orientations give the same."""
    return float(np.mean(expit(-margins_N) ** 2))


def log_likelihood(margins_N: FloatArray) -> float:
    """Mean log P(chosen wins), in nats: 0 at best, log(1/2) for a coin."""
    return float(np.mean(log_expit(margins_N)))


def cluster_bootstrap(
    values: npt.ArrayLike,
    clusters: Sequence[str],
    stat: Callable[[FloatArray], float],
    n: int = DRAWS,
    seed: int = 0,
) -> tuple[float, float]:
    """(low, high) of the 95 % percentile interval of `stat` over resamples of whole clusters.

    `values` has a row per member ([N] or [N, ...]) and `clusters` names each row's cluster. One cluster alone
    gives an interval of no width, which says nothing. Raises ValueError for no values or unlike lengths.
    """
    rows = np.asarray(values, dtype=np.float64)
    if len(rows) == 0 or len(rows) != len(clusters):
        raise ValueError(f"{len(rows)} values but {len(clusters)} clusters: need as many, and one at least")
    cluster_N, draws_RC = _draws(clusters, n, seed)
    members = np.split(np.argsort(cluster_N, kind="stable"), np.cumsum(np.bincount(cluster_N))[:-1])
    stats = [stat(rows[np.concatenate([members[c] for c in drawn])]) for drawn in draws_RC]
    low, high = np.percentile(stats, INTERVAL)
    return float(low), float(high)


def _draws(clusters: Sequence[str], n: int = DRAWS, seed: int = 0) -> tuple[IntArray, IntArray]:
    """Each row's cluster as a number, and the clusters of each resample."""
    names, cluster_N = np.unique(np.asarray(clusters), return_inverse=True)
    return cluster_N, np.random.default_rng(seed).integers(len(names), size=(n, len(names)))


def intervals(margins_N: FloatArray, logits_N: FloatArray, clusters: Sequence[str]) -> dict[str, float]:
    """`NAME_low` and `NAME_high` of accuracy and AUC of margins, and of ECE, Brier and log-likelihood of logits.

    They are those of `cluster_bootstrap`, of all figures over one set of draws: in a resample a pair only counts as
    often as its cluster was drawn, so that nothing is sorted or put into bins again.
    """
    cluster_N, draws_RC = _draws(clusters)
    right_N = (margins_N > 0) + 0.5 * (margins_N == 0)
    parts_NF = np.column_stack([right_N, expit(-logits_N) ** 2, log_expit(logits_N), _gaps(logits_N)])
    order_N = np.argsort(-margins_N, kind="stable")  # the losses, -margin of each pair, from the least
    below_N, upto_N = (np.searchsorted(-margins_N[order_N], margins_N, side=side) for side in ("left", "right"))

    def of(drawn_C: IntArray) -> tuple[float, ...]:
        times_N = np.bincount(drawn_C, minlength=len(drawn_C))[cluster_N].astype(np.float64)
        total = times_N.sum()
        means_F = times_N @ parts_NF / total
        losses_N1 = np.concatenate([[0.0], np.cumsum(times_N[order_N])])
        beaten_N = (losses_N1[below_N] + losses_N1[upto_N]) / 2
        area = times_N @ beaten_N / total**2
        return means_F[0], area, np.abs(means_F[3:]).sum() / 2, means_F[1], means_F[2]

    low_F, high_F = np.percentile([of(drawn_C) for drawn_C in draws_RC], INTERVAL, axis=0)
    ends = ("low", low_F), ("high", high_F)
    return {f"{name}_{end}": float(value) for end, found in ends for name, value in zip(FIGURES, found, strict=True)}


def _gaps(logits_N: FloatArray) -> FloatArray:
    """[N, 10]: what each pair, in both orientations, adds to the gap between outcome and prediction of each bin."""
    gaps_NB = np.zeros((len(logits_N), BINS))
    for logit_N, won in ((logits_N, 1.0), (-logits_N, 0.0)):
        p_N = expit(logit_N)
        np.add.at(gaps_NB, (np.arange(len(p_N)), np.minimum((p_N * BINS).astype(int), BINS - 1)), won - p_N)
    return gaps_NB


def length_baseline(chosen_texts: Sequence[str], rejected_texts: Sequence[str]) -> FloatArray:
    """Margins of a model that knows length alone: characters of chosen less those of rejected."""
    lengths = [len(c) - len(r) for c, r in zip(chosen_texts, rejected_texts, strict=True)]
    return np.asarray(lengths, dtype=np.float64)


def alike(first_texts: Sequence[str], second_texts: Sequence[str], tolerance: float = ALIKE) -> npt.NDArray[np.bool_]:
    """Whether the lengths differ by at most `tolerance` of the longer one, in characters; two empty texts are alike."""
    lengths = [(len(a), len(b)) for a, b in zip(first_texts, second_texts, strict=True)]
    return np.asarray([abs(a - b) <= tolerance * max(a, b) for a, b in lengths], dtype=bool)


def calibrated(margins_N: FloatArray) -> FloatArray:
    """Margins times the one slope that makes them most likely, so that lengths become logits.

    The slope is fitted on the pairs it is judged by, which flatters a baseline by one parameter: the safe
    side. It is negative where shorter wins, and bounded at 50 per root mean square of the margins.
    """
    scale = float(np.sqrt(np.mean(margins_N**2)))
    if scale == 0:
        return np.zeros_like(margins_N)
    unit_N = margins_N / scale
    found = minimize_scalar(
        lambda slope: -log_likelihood(slope * unit_N), bounds=(-STEEPEST, STEEPEST), method="bounded"
    )
    return np.asarray(float(found.x) * unit_N)


def reward_metrics(
    margins: npt.ArrayLike,
    speech_ids: Sequence[str],
    chosen_texts: Sequence[str],
    rejected_texts: Sequence[str],
) -> dict[str, float | None]:
    """Accuracy, AUC, ECE, Brier and log-likelihood with their intervals; then those of length alone as `length_*`.

    The length baseline's accuracy and AUC are those of "longer wins"; its ECE, Brier and log-likelihood are those of
    its calibrated margins. `alike_pairs` counts those whose lengths are `alike`; `alike_*` are the figures, and
    `alike_length_accuracy`, on these pairs, None where there is none. Raises ValueError for no pairs,
    unlike lengths, or a margin that is NaN or infinite: what failed to score is for the caller to count, not for a
    mean to hide.
    """
    margins_N = np.asarray(margins, dtype=np.float64)
    counts = {margins_N.size, len(speech_ids), len(chosen_texts), len(rejected_texts)}
    if margins_N.ndim != 1 or len(counts) > 1 or margins_N.size == 0:
        raise ValueError(
            f"margins {margins_N.shape}, {len(speech_ids)} speeches, {len(chosen_texts)} chosen and "
            f"{len(rejected_texts)} rejected texts: need as many of each, and one at least"
        )
    bad_N = np.flatnonzero(~np.isfinite(margins_N))
    if len(bad_N):
        raise ValueError(f"margin {bad_N[0]} (speech {speech_ids[bad_N[0]]}) is {margins_N[bad_N[0]]}")
    length_N = length_baseline(chosen_texts, rejected_texts)
    own = _all(margins_N, margins_N, speech_ids)
    of_length = _all(length_N, calibrated(length_N), speech_ids)
    alike_N = alike(chosen_texts, rejected_texts)
    matched = part(margins_N, length_N, speech_ids, alike_N)
    return own | {f"length_{k}": v for k, v in of_length.items()} | {f"alike_{k}": v for k, v in matched.items()}


def part(
    margins_N: FloatArray, length_N: FloatArray, speech_ids: Sequence[str], among_N: npt.NDArray[np.bool_]
) -> dict[str, float | None]:
    """Of some of the pairs: how many, all figures with intervals, and `length_accuracy`; None where there are none."""
    if not among_N.any():
        names = [f"{name}{end}" for name in FIGURES for end in ("", "_low", "_high")]
        return {"pairs": 0, **dict.fromkeys([*names, "length_accuracy"])}
    clusters = [speech for speech, among in zip(speech_ids, among_N, strict=True) if among]
    return {
        "pairs": int(among_N.sum()),
        **_all(margins_N[among_N], margins_N[among_N], clusters),
        "length_accuracy": accuracy(length_N[among_N]),
    }


def _all(margins_N: FloatArray, logits_N: FloatArray, speech_ids: Sequence[str]) -> dict[str, float]:
    found = accuracy(margins_N), auc(margins_N), ece(logits_N), brier(logits_N), log_likelihood(logits_N)
    return dict(zip(FIGURES, found, strict=True)) | intervals(margins_N, logits_N, speech_ids)


def calibration(margins: npt.ArrayLike) -> list[dict[str, float]]:
    """For each of 10 equal bins of P(first wins) the mean prediction, how often it came true, and the count.

    Each pair counts in both orientations, as in `ece`; empty bins are left out.
    """
    margins_N = np.asarray(margins, dtype=np.float64)
    p_M = np.concatenate([expit(margins_N), expit(-margins_N)])
    won_M = np.repeat([1.0, 0.0], len(margins_N))
    bin_M = np.minimum((p_M * BINS).astype(int), BINS - 1)
    return [
        {
            "low": b / BINS,
            "high": (b + 1) / BINS,
            "predicted": float(p_M[bin_M == b].mean()),
            "observed": float(won_M[bin_M == b].mean()),
            "n": int((bin_M == b).sum()),
        }
        for b in range(BINS)
        if (bin_M == b).any()
    ]

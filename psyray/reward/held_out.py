"""Reward heads on held-out pairs: how well they rank, where they rank well, and whether they know where they are wrong.

    held_out(margins, pairs, own_N)  # {"metrics": ..., "own_head": ..., "calibration": ..., "strata": ..., ...}

`margins` is what the heads believe of score(chosen) - score(rejected). Shapes: N pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from psyray.arrays import FloatArray
from psyray.records import Row
from psyray.reward.metrics import (
    alike,
    calibration,
    cluster_bootstrap,
    length_baseline,
    part,
    reward_metrics,
    separation,
)
from psyray.reward.uncertainty import Belief

Strata = dict[str, dict[str, dict[str, float | None]]]  # way to divide the pairs -> part -> its figures
GROUPS = 5


def held_out(margins: Belief, pairs: Sequence[Row], own_N: FloatArray | None = None) -> dict[str, Any]:
    """All that is told of heads whose margins on the pairs are known; empty where there are no pairs.

    `own_N` are the margins of the reward model's own score head; none: not known, and nothing is told of it.
    """
    if not len(pairs):
        return {"metrics": {}, "calibration": [], "strata": {}, "doubt": {}}
    margins_N, speeches = margins.mean_N, [row["speech_id"] for row in pairs]
    chosen, rejected = [row["chosen"] for row in pairs], [row["rejected"] for row in pairs]
    own = {} if own_N is None else {"own_head": reward_metrics(own_N, speeches, chosen, rejected)}
    return own | {
        "metrics": reward_metrics(margins_N, speeches, chosen, rejected),
        "calibration": calibration(margins_N),
        "strata": strata(margins_N, pairs),
        "doubt": doubt(margins, speeches),
    }


def strata(margins_N: FloatArray, pairs: Sequence[Row]) -> Strata:
    """Accuracy in parts of the pairs: by which side is longer, by how far the labels lie apart, by who labelled.

    The label's margin is the difference of the scores that made the pair; `wide` is the upper half of those known.
    """
    speeches = [row["speech_id"] for row in pairs]
    length_N = length_baseline([row["chosen"] for row in pairs], [row["rejected"] for row in pairs])
    alike_N = alike([row["chosen"] for row in pairs], [row["rejected"] for row in pairs])
    gap_N = np.asarray([np.nan if row["margin"] is None else row["margin"] for row in pairs], dtype=np.float64)
    wide_N = gap_N > (np.nanmedian(gap_N) if np.isfinite(gap_N).any() else 0.0)
    source_N = np.asarray([row["source"] for row in pairs])
    parts = {
        "length": {
            "chosen longer": ~alike_N & (length_N > 0),
            "alike": alike_N,
            "chosen shorter": ~alike_N & (length_N < 0),
        },
        "label margin": {"wide": wide_N, "narrow": np.isfinite(gap_N) & ~wide_N},
        "labelled by": {source: source_N == source for source in sorted(set(source_N))},
    }
    return {
        name: {label: part(margins_N, length_N, speeches, among_N) for label, among_N in found.items() if among_N.any()}
        for name, found in parts.items()
    }


def doubt(margins: Belief, speech_ids: Sequence[str]) -> dict[str, Any]:
    """How the spread of a margin relates to being ranked wrong (a tie is wrong here).

    `tells_errors` has, with its interval clustered by speech, the probability that a pair ranked wrong has more of
    something than one ranked right: of `spread`; of `closeness`, a small mean margin, which costs no ensemble; of
    `ratio`, spread by mean margin. 0.5 is a coin; None where nothing, or all, is ranked wrong. `groups` are five equal
    parts by spread: its mean, the mean |margin| and the share ranked wrong.
    """
    margins_N, spread_N = margins
    size_N, wrong_N = np.abs(margins_N), margins_N <= 0
    signals = {"spread": spread_N, "closeness": -size_N, "ratio": spread_N / np.maximum(size_N, 1e-12)}
    groups = [place_M for place_M in np.array_split(np.argsort(spread_N, kind="stable"), GROUPS) if len(place_M)]
    return {
        "wrong": int(wrong_N.sum()),
        "tells_errors": {name: _told(signal_N, wrong_N, speech_ids) for name, signal_N in signals.items()},
        "groups": [
            {
                "spread": float(spread_N[place_M].mean()),
                "margin": float(size_N[place_M].mean()),
                "error": float(wrong_N[place_M].mean()),
                "n": len(place_M),
            }
            for place_M in groups
        ],
    }


def _told(signal_N: FloatArray, wrong_N: npt.NDArray[np.bool_], speech_ids: Sequence[str]) -> dict[str, float | None]:
    """The separation with its interval; a resample in which nothing, or all, is wrong counts as a coin."""
    value = separation(signal_N, wrong_N)
    if math.isnan(value):
        return {"value": None, "low": None, "high": None}

    def of(rows_M2: FloatArray) -> float:
        found = separation(rows_M2[:, 0], rows_M2[:, 1] > 0)
        return 0.5 if math.isnan(found) else found

    low, high = cluster_bootstrap(np.stack([signal_N, wrong_N], axis=1), speech_ids, of)
    return {"value": value, "low": low, "high": high}

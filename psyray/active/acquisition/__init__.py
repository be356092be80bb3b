"""Acquisition functions: which pair of responses to ask an oracle about next.

Every function takes the candidates, with the scores of an ensemble of reward heads, and answers with at most one
pair a prompt:

    picks = acquire("delta_ucb", scores_PKH, n=64, rng=np.random.default_rng(seed))
    picks = acquire("d_optimal", Candidates(scores_PKH, features_PKD, covariance_DD), n=64, rng=rng)

Shapes: P prompts, K responses a prompt, H heads, D features, E dimensions of the embedding (D or H). A new one is a
function and an entry in `ACQUISITIONS`; where the number of questions decides which prompts come into question at all,
that step is a function of its own in `SHORTLISTS`. `random` is an arm to report beside every other, over several seeds
(2604.02766 finds little gain over it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from psyray.active.acquisition.candidates import Acquire, Candidates, Pick
from psyray.active.acquisition.designs import d_optimal, v_optimal
from psyray.active.acquisition.diversity import bal_pm, spread_out
from psyray.active.acquisition.scores import (
    apl,
    delta_ucb,
    infomax,
    max_min,
    maxmin_lcb,
    most_uncertain,
    random,
    uncertainty,
)
from psyray.active.acquisition.thompson import drts, dts
from psyray.arrays import BoolArray, FloatArray, IntArray
from psyray.errors import hint

__all__ = [
    "ACQUISITIONS", "PLACED", "Acquire", "BoolArray", "Candidates", "FloatArray", "IntArray", "Pick", "acquire",
]  # fmt: skip

ACQUISITIONS: dict[str, Acquire] = {
    "random": random,
    "max_min": max_min,
    "uncertainty": uncertainty,
    "infomax": infomax,
    "dts": dts,
    "drts": drts,
    "delta_ucb": delta_ucb,
    "maxmin_lcb": maxmin_lcb,
    "apl": apl,
    "d_optimal": d_optimal,
    "v_optimal": v_optimal,
    "bal_pm": bal_pm,
}
PLACED = {"bal_pm"}  # those that read `Candidates.prompts_PE`
SHORTLISTS: Mapping[str, Callable[[Candidates, int], Candidates]] = {"apl": most_uncertain}


def acquire(
    name: str,
    candidates: Candidates | FloatArray,
    n: int,
    rng: np.random.Generator,
    apart: float | None = None,
) -> list[Pick]:
    """At most `n` picks by the named function, one a prompt, in the order of asking; bare scores do for most rules.

    A prompt with fewer than two responses present is never asked about. Values fall along the picks, except
    `v_optimal`'s; equal ones keep the order of the prompts. `apart` (0 to 1) leaves out near-duplicates within the
    batch, see `spread_out`; fewer than `n` may be left. Raises ValueError for an unknown name, a negative `n`,
    candidates of the wrong shape, or `bal_pm` without `prompts_PE`.
    """
    if name not in ACQUISITIONS:
        raise ValueError(f"unknown acquisition {name!r}; {hint(name, ACQUISITIONS)}")
    if n < 0:
        raise ValueError(f"cannot ask {n} questions: n must be 0 or more")
    c = candidates if isinstance(candidates, Candidates) else Candidates(candidates)
    if name in SHORTLISTS:
        c = SHORTLISTS[name](c, n)
    if apart is None:
        return ACQUISITIONS[name](c, n, rng)
    return _spread_out(ACQUISITIONS[name], c, n, rng, apart)


def _spread_out(rule: Acquire, c: Candidates, n: int, rng: np.random.Generator, apart: float) -> list[Pick]:
    """`spread_out` of as many of the rule's picks as that takes: for all prompts a greedy design takes hours."""
    wanted, state = n, rng.bit_generator.state
    while True:
        rng.bit_generator.state = state  # of more picks the first are the same ones
        picks = rule(c, wanted, rng)
        kept = spread_out(c, picks, n, apart)
        if len(kept) == n or len(picks) < wanted:
            return kept
        wanted *= 2

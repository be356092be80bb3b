"""How many labels each strategy needs: replays over seeds, and what they say beside random with intervals.

    curves = study(bank, prompts, strategies, Learner(), budgets=range(8, 513, 8), batch=8, seeds=range(20))
    figures(curves, bank.strata, aim=256)

Seeds differ in which prompts are the pool and which are held out, in the draws of the posterior and in every random
choice; all strategies of one seed share them, so differences from random are taken seed by seed. Intervals are 95 %
percentile bootstraps over seeds: they say how far another draw of the same study would differ, on these prompts.

Shapes: G seeds, B budgets, S strata.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from psyray.active.replay import Bank, Curve, Learner, replay
from psyray.arrays import FloatArray

Part = Literal["dev", "report"]
Curves = Mapping[str, Sequence[Curve]]  # strategy -> one curve a seed

BASELINE = "random"
RESAMPLES = 2000


def part_of(prompt: str, dev_share: float) -> Part:
    """Settings are chosen on the dev prompts and never reported on them; the id's hash says which a prompt is."""
    digest = hashlib.sha256(f"label-efficiency {prompt}".encode()).digest()
    return "dev" if int.from_bytes(digest[:8], "big") < dev_share * 2**64 else "report"


def split(prompts: Sequence[int], pool_share: float, seed: int) -> tuple[list[int], list[int]]:
    """(pool, held-out) rows of a seed."""
    order = np.random.default_rng([seed, 0]).permutation(np.asarray(prompts, dtype=np.intp))
    count = round(pool_share * len(order))
    return sorted(map(int, order[:count])), sorted(map(int, order[count:]))


def study(
    bank: Bank,
    prompts: Sequence[int],
    strategies: Sequence[str],
    learner: Learner,
    *,
    budgets: Sequence[int],
    batch: int,
    seeds: Sequence[int],
    pool_share: float = 0.6,
    start: int = 0,
    each: Callable[[], object] = lambda: None,
) -> dict[str, list[Curve]]:
    """A curve for every strategy and seed; `each` is called after every replay."""
    curves: dict[str, list[Curve]] = {strategy: [] for strategy in strategies}
    for seed in seeds:
        pool, held_out = split(prompts, pool_share, seed)
        for strategy in strategies:
            curves[strategy].append(
                replay(bank, pool, held_out, strategy, learner, budgets=budgets, batch=batch, seed=seed, start=start)
            )
            each()
    return curves


def figures(curves: Curves, strata: Sequence[str], *, aim: int) -> dict[str, Any]:
    """Every figure of the study as a tree of plain numbers: one entry a strategy, one row a budget.

    `aim` is random's budget whose accuracy the others are to reach; `below` lists the budgets from 32 up at which
    the interval of the difference from random lies wholly below 0.
    """
    budgets = shared_budgets(curves)
    if aim not in budgets:
        raise ValueError(f"the aim of {aim} labels is not among the budgets that all replays reached: {budgets[-1]}")
    base_GB = macro(curves[BASELINE], budgets)
    draws_RG = np.random.default_rng(0).integers(len(base_GB), size=(RESAMPLES, len(base_GB)))
    return {strategy: _strategy(found, base_GB, budgets, strata, draws_RG, aim) for strategy, found in curves.items()}


def shared_budgets(curves: Curves) -> list[int]:
    """The budgets that every replay had labels for."""
    sets = [set(curve.budgets) for found in curves.values() for curve in found]
    return sorted(set.intersection(*sets))


def macro(found: Sequence[Curve], budgets: Sequence[int]) -> FloatArray:
    """[G, B] mean over strata."""
    return np.stack([curve.macro_B[[curve.budgets.index(b) for b in budgets]] for curve in found])


def _strategy(
    found: Sequence[Curve],
    base_GB: FloatArray,
    budgets: Sequence[int],
    strata: Sequence[str],
    draws_RG: npt.NDArray[np.intp],
    aim: int,
) -> dict[str, Any]:
    own_GB = macro(found, budgets)
    by_stratum_BS = np.nanmean(
        [curve.accuracy_BS[[curve.budgets.index(b) for b in budgets]] for curve in found], axis=0
    )
    mean_RB, ahead_RB = own_GB[draws_RG].mean(axis=1), (own_GB - base_GB)[draws_RG].mean(axis=1)
    rows = list(_rows(own_GB, base_GB, mean_RB, ahead_RB, by_stratum_BS, budgets, strata))
    at_aim = list(budgets).index(aim)
    # Summed as the strategies' own means are, or rounding could hide that random reaches its own level.
    goal_R = base_GB[draws_RG].mean(axis=1)[:, at_aim]
    needed = reach(own_GB.mean(axis=0), float(base_GB.mean(axis=0)[at_aim]), budgets)
    needed_R = [reach(mean_B, goal, budgets) for mean_B, goal in zip(mean_RB, goal_R, strict=True)]
    quarter = aim // 4
    at_quarter_G = own_GB[:, list(budgets).index(quarter)] - base_GB[:, at_aim]
    return {
        "budgets": rows,
        "labels_to_reach": needed,
        "labels_to_reach_interval": _whole_interval(needed_R),
        "quarter": {"labels": quarter, "ahead_of_aim": _interval(at_quarter_G, draws_RG)},
        "below": [row["labels"] for row in rows if row["labels"] >= 32 and row["ahead"][2] < 0],
        "asked": _asked(found, strata),
    }


def _rows(
    own_GB: FloatArray,
    base_GB: FloatArray,
    mean_RB: FloatArray,
    ahead_RB: FloatArray,
    by_stratum_BS: FloatArray,
    budgets: Sequence[int],
    strata: Sequence[str],
) -> Iterator[dict[str, Any]]:
    for b, budget in enumerate(budgets):
        yield {
            "labels": budget,
            "accuracy": _around(float(own_GB[:, b].mean()), mean_RB[:, b]),
            "ahead": _around(float((own_GB - base_GB)[:, b].mean()), ahead_RB[:, b]),
            "strata": {name: float(by_stratum_BS[b, s]) for s, name in enumerate(strata)},
        }


def reach(mean_B: FloatArray, goal: float, budgets: Sequence[int]) -> int | None:
    """The first budget whose accuracy is the goal's or more; None if none is."""
    hit_B = np.flatnonzero(mean_B >= goal)
    return budgets[int(hit_B[0])] if len(hit_B) else None


def _around(value: float, values_R: FloatArray) -> list[float]:
    """[low, value, high]."""
    low, high = np.percentile(values_R, [2.5, 97.5])
    return [float(low), value, float(high)]


def _interval(values_G: FloatArray, draws_RG: npt.NDArray[np.intp]) -> list[float]:
    return _around(float(values_G.mean()), values_G[draws_RG].mean(axis=1))


def _whole_interval(needed_R: Sequence[int | None]) -> list[int | None]:
    """Percentiles of budgets, where "never" lies above every budget."""
    ordered = sorted(needed_R, key=lambda n: (n is None, n))
    return [ordered[round(q * (len(ordered) - 1))] for q in (0.025, 0.975)]


def _asked(found: Sequence[Curve], strata: Sequence[str]) -> dict[str, float]:
    """The share of the questions by stratum."""
    all_asked = np.concatenate([np.asarray(curve.strata) for curve in found])
    return {name: float((all_asked == s).mean()) for s, name in enumerate(strata)}

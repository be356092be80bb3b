"""How many labels each strategy needs: replays over seeds, and what they say beside random with intervals.

    curves = study(bank, prompts, strategies, Learner(), budgets=range(8, 513, 8), batch=8, seeds=range(20))
    figures(curves, bank.strata, aim=256)

Seeds differ in which prompts are the pool and which are held out, in the draws of the posterior and in every random
choice; all strategies of one seed share them, so differences from random are taken seed by seed. Intervals are 95 %
percentiles over resamples in which seeds and held-out conversations are each drawn anew (the bootstrap of crossed
factors of Owen 2007, which errs on the wide side): seeds alone would say nothing of other prompts.

Shapes: R resamples, G seeds, C conversations, B budgets, S strata.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from joblib import Parallel, delayed

from psyray.active.replay import Bank, Curve, Learner, replay
from psyray.arrays import FloatArray, IntArray

Part = Literal["dev", "report"]
Curves = Mapping[str, Sequence[Curve]]  # strategy -> one curve a seed

BASELINE = "random"
RESAMPLES = 2000


def part_of(prompt: str, dev_share: float) -> Part:
    """Settings are chosen on the dev prompts and never reported on them; the id's hash says which a prompt is.

    `prompt` is the id of its conversation, so that the lengths of one stay together.
    """
    digest = hashlib.sha256(f"label-efficiency {prompt}".encode()).digest()
    return "dev" if int.from_bytes(digest[:8], "big") < dev_share * 2**64 else "report"


def split(
    prompts: Sequence[int], pool_share: float, seed: int, conversation_P: IntArray
) -> tuple[list[int], list[int]]:
    """(pool, held-out) rows of a seed: whole conversations."""
    found = list(dict.fromkeys(conversation_P[list(prompts)].tolist()))
    order = np.random.default_rng([seed, 0]).permutation(np.asarray(found, dtype=np.intp))
    pool = set(order[: round(pool_share * len(order))].tolist())
    parts: tuple[list[int], list[int]] = ([], [])
    for prompt in sorted(map(int, prompts)):
        parts[int(conversation_P[prompt]) not in pool].append(prompt)
    return parts


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
    jobs: int = 1,
    each: Callable[[], object] = lambda: None,
) -> dict[str, list[Curve]]:
    """A curve for every strategy and seed; `each` is called after every replay. `jobs` processes work at once."""
    parts = {seed: split(prompts, pool_share, seed, bank.conversation_P) for seed in seeds}
    wanted = [(strategy, seed) for seed in seeds for strategy in strategies]
    replays = Parallel(jobs, return_as="generator")(
        delayed(replay)(bank, *parts[seed], strategy, learner, budgets=budgets, batch=batch, seed=seed, start=start)
        for strategy, seed in wanted
    )
    curves: dict[str, list[Curve]] = {strategy: [] for strategy in strategies}
    for (strategy, _), curve in zip(wanted, replays, strict=True):
        curves[strategy].append(curve)
        each()
    return curves


@dataclass(frozen=True)
class Told:
    """What a strategy's replays say of its accuracy, over seeds and over resamples of seeds and conversations."""

    macro_B: FloatArray  # means over seeds
    strata_BS: FloatArray
    macro_RB: FloatArray
    asked: dict[str, float]  # the share of the questions by stratum


def figures(curves: Curves, strata: Sequence[str], *, aim: int) -> dict[str, Any]:
    """Every figure of the study as a tree of plain numbers: one entry a strategy, one row a budget.

    `aim` is random's budget whose accuracy the others are to reach; `below` lists the budgets from 32 up at which
    the interval of the difference from random lies wholly below 0.
    """
    budgets = shared_budgets(curves)
    if aim not in budgets:
        raise ValueError(f"the aim of {aim} labels is not among the budgets that all replays reached: {budgets[-1]}")
    told = {strategy: _told(found, budgets, strata) for strategy, found in curves.items()}
    return {strategy: _figures(one, told[BASELINE], budgets, strata, aim) for strategy, one in told.items()}


def shared_budgets(curves: Curves) -> list[int]:
    """The budgets that every replay had labels for."""
    sets = [set(curve.budgets) for found in curves.values() for curve in found]
    return sorted(set.intersection(*sets))


def _told(found: Sequence[Curve], budgets: Sequence[int], strata: Sequence[str]) -> Told:
    B, asked = len(budgets), np.concatenate([np.asarray(curve.strata) for curve in found])
    return Told(
        np.mean([curve.macro_B[:B] for curve in found], axis=0),
        np.nanmean([curve.accuracy_BS[:B] for curve in found], axis=0),
        _redrawn(found, B),
        {name: float((asked == s).mean()) for s, name in enumerate(strata)},
    )


def _redrawn(found: Sequence[Curve], B: int) -> FloatArray:
    """[R, B] mean over the seeds drawn, of those that hold out a conversation drawn; all strategies' draws are one."""
    held_out, rng = sorted({one for curve in found for one in curve.held_out}), np.random.default_rng(0)
    times_RC, times_RG = (rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) for n in (len(held_out), len(found)))
    total_RB, weight_RB = np.zeros((RESAMPLES, B)), np.zeros((RESAMPLES, B))
    for curve, times_R in zip(found, times_RG.T, strict=True):
        macro_RB = curve.redrawn_RB(times_RC[:, np.searchsorted(held_out, curve.held_out)])[:, :B]
        total_RB += times_R[:, None] * np.nan_to_num(macro_RB)
        weight_RB += times_R[:, None] * np.isfinite(macro_RB)
    return np.where(weight_RB > 0, total_RB / np.maximum(weight_RB, 1), np.nan)


def _figures(own: Told, base: Told, budgets: Sequence[int], strata: Sequence[str], aim: int) -> dict[str, Any]:
    rows = list(_rows(own, base, budgets, strata))
    at_aim, at_quarter = budgets.index(aim), budgets.index(aim // 4)
    needed_R = [
        reach(mean_B, goal, budgets) for mean_B, goal in zip(own.macro_RB, base.macro_RB[:, at_aim], strict=True)
    ]
    return {
        "budgets": rows,
        "labels_to_reach": reach(own.macro_B, float(base.macro_B[at_aim]), budgets),
        "labels_to_reach_interval": _whole_interval(needed_R),
        "quarter": {
            "labels": budgets[at_quarter],
            "ahead_of_aim": _around(
                float(own.macro_B[at_quarter] - base.macro_B[at_aim]),
                own.macro_RB[:, at_quarter] - base.macro_RB[:, at_aim],
            ),
        },
        "below": [row["labels"] for row in rows if row["labels"] >= 32 and row["ahead"][2] < 0],
        "asked": own.asked,
    }


def _rows(own: Told, base: Told, budgets: Sequence[int], strata: Sequence[str]) -> Iterator[dict[str, Any]]:
    ahead_B, ahead_RB = own.macro_B - base.macro_B, own.macro_RB - base.macro_RB
    for b, budget in enumerate(budgets):
        yield {
            "labels": budget,
            "accuracy": _around(float(own.macro_B[b]), own.macro_RB[:, b]),
            "ahead": _around(float(ahead_B[b]), ahead_RB[:, b]),
            "strata": {name: float(own.strata_BS[b, s]) for s, name in enumerate(strata)},
        }


def reach(mean_B: FloatArray, goal: float, budgets: Sequence[int]) -> int | None:
    """The first budget whose accuracy is the goal's or more; None if none is."""
    hit_B = np.flatnonzero(mean_B >= goal)
    return budgets[int(hit_B[0])] if len(hit_B) else None


def _around(value: float, values_R: FloatArray) -> list[float]:
    """[low, value, high]."""
    low, high = np.nanpercentile(values_R, [2.5, 97.5])
    return [float(low), value, float(high)]


def _whole_interval(needed_R: Sequence[int | None]) -> list[int | None]:
    """Percentiles of budgets, where "never" lies above every budget."""
    ordered = sorted(needed_R, key=lambda n: (n is None, n))
    return [ordered[round(q * (len(ordered) - 1))] for q in (0.025, 0.975)]

"""Replays on a made-up bank with a known taste: what is asked, what is learnt, and what an oracle of chance gives."""

from __future__ import annotations

import numpy as np
import pytest

from psyray.active.acquisition import ACQUISITIONS
from psyray.active.efficiency import Part, figures, part_of, reach, split, study
from psyray.active.replay import Bank, Curve, Learner, accuracies, replay
from psyray.reward.laplace import Laplace

LEARNER = Learner(components=6, whiten=1.0, ridge=0.1, draws=6)
POOL, HELD_OUT = range(30), range(30, 50)


def made_bank(prompts: int = 50, k: int = 4, d: int = 6, seed: int = 0) -> Bank:
    """Replies with features of chance, better where the first feature and half the second are higher; two strata."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(prompts, k, d))
    taste = features[:, :, 0] + features[:, :, 1] / 2
    gap = taste[:, :, None] - taste[:, None, :]
    return Bank(features, np.sign(gap).astype(np.intp), (np.abs(gap) > 1).astype(np.intp), ("close", "far"))


def run(strategy: str, bank: Bank | None = None, seed: int = 0, **more: object) -> Curve:
    settings = {"budgets": [8, 64, 96], "batch": 8, **more}
    return replay(bank or made_bank(), POOL, HELD_OUT, strategy, LEARNER, seed=seed, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ACQUISITIONS)
def test_every_strategy_learns_the_taste_and_asks_no_pair_twice(name: str) -> None:
    curve = run(name)
    assert curve.budgets == (8, 64, 96)
    assert curve.accuracy_BS.shape == (3, 2)
    assert curve.macro_B[-1] > 0.8
    assert len({(p, frozenset((i, j))) for p, i, j in curve.asked}) == len(curve.asked) == 96
    for start in range(0, 96, 8):  # a batch asks a prompt once
        assert len({p for p, _, _ in curve.asked[start : start + 8]}) == 8


@pytest.mark.parametrize("name", ["random", "drts", "d_optimal"])
def test_the_same_seed_gives_the_same_replay_and_another_another(name: str) -> None:
    one, two = run(name), run(name)
    assert one.asked == two.asked
    assert (one.accuracy_BS == two.accuracy_BS).all()
    assert name == "d_optimal" or run(name, seed=1).asked != one.asked


def test_every_strategy_starts_with_the_same_random_labels() -> None:
    ways = [run(name, start=16) for name in ("random", "d_optimal", "v_optimal")]
    assert len({way.asked[:16] for way in ways}) == 1
    assert len({way.asked for way in ways}) == 3


def test_an_oracle_that_answers_by_chance_teaches_nothing() -> None:
    rng = np.random.default_rng(0)
    found = [
        run("random", made_bank(seed=s), s, oracle=lambda p, i, j: int(rng.choice([-1, 1]))).macro_B for s in range(40)
    ]
    assert np.mean(found) == pytest.approx(0.5, abs=0.05)


def test_an_oracle_that_turns_every_answer_round_teaches_the_opposite() -> None:
    bank = made_bank()
    assert run("random", bank, oracle=lambda p, i, j: -bank.oracle(p, i, j)).macro_B[-1] < 0.15


def test_held_out_labels_do_not_steer_the_questions() -> None:
    bank = made_bank()
    turned = Bank(bank.features_PKD, bank.labels_PKK.copy(), bank.strata_PKK, bank.strata)
    turned.labels_PKK[30:] *= -1
    there, here = run("d_optimal", turned), run("d_optimal", bank)
    assert there.asked == here.asked
    assert there.accuracy_BS == pytest.approx(1 - here.accuracy_BS)


def test_a_pair_without_a_label_is_not_asked_and_an_empty_pool_ends_the_replay() -> None:
    bank = made_bank()
    bank.labels_PKK[:] = 0
    bank.labels_PKK[:, 0, 1], bank.labels_PKK[:, 1, 0] = 1, -1
    curve = run("uncertainty", bank)
    assert {frozenset((i, j)) for _, i, j in curve.asked} == {frozenset((0, 1))}
    assert (len(curve.asked), curve.budgets) == (30, (8,))


def test_missing_replies_are_never_asked_about() -> None:
    bank = made_bank()
    bank.features_PKD[:, 3] = np.nan
    bank.labels_PKK[:, 3], bank.labels_PKK[:, :, 3] = 0, 0
    assert all(3 not in (i, j) for _, i, j in run("bal_pm", bank).asked)


def test_accuracy_by_stratum_by_hand() -> None:
    features = np.array([[[3.0], [1.0], [1.0]]])
    labels, strata = np.zeros((2, 1, 3, 3), dtype=np.intp)
    for i, j, stratum in [(0, 1, 0), (2, 0, 0), (1, 2, 1)]:  # right, wrong, a tie of scores
        labels[0, i, j], labels[0, j, i] = 1, -1
        strata[0, i, j] = strata[0, j, i] = stratum
    bank = Bank(features, labels, strata, ("a", "b", "none"))
    found = accuracies(Laplace(np.array([1.0]), np.eye(1)), features, bank)
    assert found[:2].tolist() == [0.5, 0.5]
    assert np.isnan(found[2])


@pytest.mark.parametrize(("budgets", "batch"), [([8], 0), ([], 8), ([0], 8)])
def test_budgets_that_cannot_be(budgets: list[int], batch: int) -> None:
    with pytest.raises(ValueError, match="1 or more"):
        run("random", budgets=budgets, batch=batch)


def test_parts_and_splits_keep_conversations_apart() -> None:
    parts: list[Part] = [part_of(f"prompt {n}", 0.4) for n in range(2000)]
    assert parts.count("dev") == pytest.approx(800, abs=80)
    assert part_of("prompt 1", 0.0) == "report"
    alone = np.arange(20)
    pool, held_out = split(range(10, 20), 0.6, 3, alone)
    assert (len(pool), len(held_out), sorted(pool + held_out)) == (6, 4, list(range(10, 20)))
    assert split(range(10, 20), 0.6, 4, alone) != (pool, held_out)
    pool, held_out = split(range(20), 0.6, 3, alone // 4)  # five conversations of four lengths
    assert (len(pool), len(held_out)) == (12, 8) and not {n // 4 for n in pool} & {n // 4 for n in held_out}


def made_curve(*accuracy: float) -> Curve:
    """One held-out prompt with ten pairs a stratum, so that only seeds can be drawn anew."""
    return held_out_curve([[a] for a in accuracy])


def held_out_curve(accuracy_BQ: list[list[float]]) -> Curve:
    right_BQS = np.repeat(10 * np.array(accuracy_BQ)[:, :, None], 2, axis=2)
    Q = right_BQS.shape[1]
    return Curve((32, 64, 128, 256), tuple(range(Q)), right_BQS, np.full((Q, 2), 10), ((0, 0, 1), (1, 0, 1)), (0, 1))


def test_labels_to_random_s_level_by_hand() -> None:
    told = figures(
        {
            "random": [made_curve(0.5, 0.6, 0.7, 0.8), made_curve(0.5, 0.6, 0.7, 0.9)],
            "quick": [made_curve(0.7, 0.85, 0.9, 0.9), made_curve(0.7, 0.95, 0.9, 0.9)],
            "poor": [made_curve(0.4, 0.5, 0.7, 0.8), made_curve(0.4, 0.5, 0.7, 0.8)],
        },
        ["a", "b"],
        aim=256,
    )
    quick, poor = told["quick"], told["poor"]
    assert (told["random"]["labels_to_reach"], quick["labels_to_reach"], poor["labels_to_reach"]) == (256, 64, None)
    assert quick["labels_to_reach_interval"] == [64, 64]  # seed by seed: .85 - .8 and .95 - .9
    assert quick["quarter"] == {"labels": 64, "ahead_of_aim": pytest.approx([0.05, 0.05, 0.05])}
    assert quick["below"] == []
    assert poor["below"] == [32, 64]  # at 256 one seed of two is below, which is no interval below 0
    assert quick["budgets"][1]["accuracy"] == pytest.approx([0.85, 0.9, 0.95])
    assert quick["budgets"][1]["ahead"] == pytest.approx([0.25, 0.3, 0.35])
    assert quick["asked"] == {"a": 0.5, "b": 0.5}


def test_reach() -> None:
    assert reach(np.array([0.1, 0.5, 0.4]), 0.4, [8, 16, 24]) == 16
    assert reach(np.array([0.1]), 0.4, [8]) is None


def test_a_study_runs_every_strategy_on_every_seed() -> None:
    done: list[int] = []
    curves = study(
        made_bank(), range(50), ["random", "max_min"], LEARNER,
        budgets=[8], batch=8, seeds=[0, 1], each=lambda: done.append(1),
    )  # fmt: skip
    assert {name: len(found) for name, found in curves.items()} == {"random": 2, "max_min": 2}
    assert len(done) == 4
    first, second = (set(curve.held_out) for curve in curves["random"])
    assert len(first) == len(second) == 20 and first != second and first | second <= set(range(50))
    both = study(
        made_bank(), range(50), ["max_min"], LEARNER, budgets=[8], batch=8, seeds=[0, 1], jobs=2
    )  # fmt: skip
    assert [curve.asked for curve in both["max_min"]] == [curve.asked for curve in curves["max_min"]]


def test_intervals_draw_the_held_out_prompts_anew() -> None:
    flat = held_out_curve([[0.5, 0.5]] * 4)
    uneven = held_out_curve([[1.0, 0.4]] * 4)  # one prompt ahead of random, one behind
    told = figures({"random": [flat] * 4, "uneven": [uneven] * 4}, ["a", "b"], aim=256)["uneven"]
    assert told["budgets"][0]["accuracy"] == pytest.approx([0.4, 0.7, 1.0])
    assert told["quarter"]["ahead_of_aim"] == pytest.approx([-0.1, 0.2, 0.5])
    assert told["labels_to_reach_interval"] == [32, None]


def test_prompts_redrawn_by_hand() -> None:
    counts_QS = np.array([[2, 1], [4, 0]])
    curve = Curve((8,), (3, 7), np.array([[[2.0, 0.0], [1.0, 0.0]]]), counts_QS, (), ())
    assert curve.accuracy_BS.tolist() == [[0.5, 0.0]]
    found_RB = curve.redrawn_RB(np.array([[1, 1], [2, 0], [0, 1], [0, 0]]))
    assert found_RB[:3, 0].tolist() == [0.25, 0.5, 0.25]  # without the first prompt there is one stratum
    assert np.isnan(found_RB[3, 0])

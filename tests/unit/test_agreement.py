"""Agreement with people: figures computed by hand, and orientation that cannot matter."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest

from psyray.evaluate import agreement
from psyray.evaluate.agreement import Ruling, accuracy, alpha, ceiling, figures, kappa, longer, position, repetition
from psyray.evaluate.agreement_report import plot, show
from psyray.evaluate.labelled import Labelled
from psyray.records import Verdict
from psyray.track import numbers


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(agreement, "RESAMPLES", 20)


A, B, TIE, INVALID = Verdict.A, Verdict.B, Verdict.TIE, Verdict.INVALID
NAN = float("nan")


def labelled(n: int, human: Verdict = A, a: str = "aaaa", b: str = "bbbb", stratum: str = "all", **said) -> Labelled:
    return Labelled(f"speech {n}", [{"role": "user", "content": f"prompt {n}"}], a, b, stratum, human, said)


def made_up(count: int = 60) -> list[tuple[Labelled, Ruling]]:
    rng = random.Random(0)
    pairs = []
    for n in range(count):
        anna, ben, cleo = rng.choices([A, B, TIE], k=3)
        item = labelled(n // 2, rng.choice([A, B, TIE]), "a" * rng.randint(1, 9), "b" * rng.randint(1, 9),
                        rng.choice(["one", "two"]), anna=anna, ben=ben, cleo=cleo)  # fmt: skip
        first, second = rng.choices([A, B, TIE, INVALID], k=2)
        orders = (first, second) if n % 3 else None
        verdict = rng.choice([A, B, TIE, INVALID, None])
        again = (rng.choice([A, B]),) if verdict else ()
        pairs.append((item, Ruling(verdict, rng.random(), orders, again, rng.random() < 0.5)))
    return pairs


def test_accuracy_counts_ties_half_and_invalid_apart():
    humans, said = [A, A, B, B, A], [A, B, B, TIE, INVALID]
    found = accuracy([(labelled(n, h), Ruling(v)) for n, (h, v) in enumerate(zip(humans, said, strict=True))])
    assert found["accuracy"] == (1 + 0 + 1 + 0.5) / 4
    assert [found[k] for k in ("right", "wrong", "ties", "invalid")] == [2, 1, 1, 1]
    assert found["low"] < found["accuracy"] < found["high"]
    assert accuracy([])["accuracy"] is None


def test_intervals_go_by_prompt():
    apart = accuracy([(labelled(n), Ruling(A if n % 2 else B)) for n in range(40)])
    together = accuracy([(labelled(n % 4), Ruling(A if n % 2 else B)) for n in range(40)])
    assert apart["accuracy"] == together["accuracy"] == 0.5
    assert together["high"] - together["low"] > 2 * (apart["high"] - apart["low"])


def test_kappa_by_hand():
    # Cohen's textbook table: 20 and 15 agreements, 5 and 10 disagreements of 50: (0.7 - 0.5) / (1 - 0.5)
    rows = [(1, 1)] * 20 + [(1, -1)] * 5 + [(-1, 1)] * 10 + [(-1, -1)] * 15 + [(1, NAN), (NAN, NAN)]
    assert kappa(np.array(rows)) == pytest.approx(0.4)
    assert np.isnan(kappa(np.array([(1.0, 1.0), (1.0, 1.0)]))) and np.isnan(kappa(np.array([(1.0, NAN)])))


def test_alpha_by_hand():
    # Two raters, 10 units, 2 disagreements: 4 of 20 coincidences. Of the 20 values 12 and 8 are of a kind, so chance
    # gives 2 * 12 * 8 / 19 of them. A unit that one alone rated says nothing.
    rows = [(1, 1)] * 5 + [(-1, -1)] * 3 + [(1, -1)] * 2 + [(1, NAN)]
    assert alpha(np.array(rows)) == pytest.approx(1 - 4 / (2 * 12 * 8 / 19))
    assert alpha(np.array([(1.0, 1.0), (-1.0, -1.0)])) == 1.0
    assert np.isnan(alpha(np.array([(1.0, 1.0)] * 3))) and np.isnan(alpha(np.array([(1.0, NAN)])))


def test_the_ceiling_holds_each_person_and_the_judge_against_the_others():
    items = [
        (labelled(0, anna=A, ben=A, cleo=A), Ruling(A)),  # three against AA: all agree
        (labelled(1, anna=A, ben=A, cleo=B), Ruling(B)),  # others of anna and ben: a tie, left out; cleo against AA
        (labelled(2, anna=B, ben=B, cleo=TIE), Ruling(INVALID)),  # anna, ben: tie of B with tie; cleo half against BB
    ]
    found = ceiling(items, ["anna", "ben", "cleo"])
    assert found["people"]["value"] == pytest.approx((1 + 1 + (1 + 0 + 0.5) / 3) / 3)
    assert found["judge"]["value"] == pytest.approx((1 + 1 + (1 + 0) / 2) / 3)


def test_length_alone_and_equal_lengths():
    items = [labelled(0, A, "long one", "short"), labelled(1, A, "short", "long one"), labelled(2, B, "12345", "abcde")]
    assert [longer(item).verdict for item in items] == [A, B, TIE]
    assert longer(items[0].swap()).verdict is B
    stratum = figures([(item, Ruling(A)) for item in items], length_tolerance=0.1)["strata"]["all"]
    assert stratum["longer_wins"]["accuracy"] == 0.5 and stratum["judge"]["accuracy"] == pytest.approx(2 / 3)
    assert stratum["length_matched"]["judge"]["wrong"] == 1 and stratum["length_matched"]["judge"]["right"] == 0
    assert stratum["length_matched"]["longer_wins"]["ties"] == 1


def test_people_who_tie_are_left_out_of_accuracy_only():
    pairs = [(labelled(0, TIE, anna=TIE), Ruling(TIE)), (labelled(1, A, anna=A), Ruling(A)),
             (labelled(2, B, anna=B), Ruling(None))]  # fmt: skip
    found = figures(pairs, length_tolerance=0.1)
    assert found["human_ties"] == 1 and found["unasked"] == 1 and found["strata"]["all"]["judge"]["right"] == 1
    assert found["people"]["kappa"]["anna"]["value"] == 1.0 and found["people"]["kappa"]["anna"]["comparisons"] == 2
    assert "ceiling" not in found["people"]


def test_position_is_measured_where_there_is_an_order_and_nowhere_else():
    assert position([(labelled(0), Ruling(A))])["applicable"] is False
    orders = [(A, A), (A, B), (A, B), (B, A), (INVALID, A)]
    found = position([(labelled(n), Ruling(TIE, orders=o)) for n, o in enumerate(orders)])
    assert found["changed"]["value"] == 0.75 and found["both_orders"] == 4 and found["invalid"] == 1
    assert (found["first_shown_wins"], found["second_shown_wins"]) == (2, 1)


def test_repetition_counts_equal_verdicts_and_equal_answers():
    rulings = [Ruling(A, again=(A, A), same_answers=True), Ruling(A, again=(A, B), same_answers=False),
               Ruling(B, again=(B, B), same_answers=False), Ruling(A)]  # fmt: skip
    found = repetition([(labelled(n), ruling) for n, ruling in enumerate(rulings)])
    assert found["comparisons"] == 3 and found["times"] == 2
    assert found["same_verdict"]["value"] == pytest.approx(2 / 3)
    assert found["same_answer"]["value"] == pytest.approx(1 / 3)
    assert repetition([(labelled(0), Ruling(A))])["same_verdict"]["value"] is None


def test_swapping_twice_is_the_identity_and_swapping_changes_no_figure():
    pairs = made_up()
    assert [(item.swap().swap(), ruling.swap().swap()) for item, ruling in pairs] == pairs
    swapped = [(item.swap(), ruling.swap()) for item, ruling in pairs]
    before, after = (dict(numbers(figures(side, length_tolerance=0.2))) for side in (pairs, swapped))
    assert after == pytest.approx(before)  # the sums of kappa go in another order


def test_a_judge_that_says_what_people_say_is_perfect_and_its_opposite_is_not():
    items = [item for item, _ in made_up() if item.human is not TIE]
    right = figures([(item, Ruling(item.human)) for item in items], length_tolerance=0.1)
    wrong = figures([(item, Ruling(item.human.swap())) for item in items], length_tolerance=0.1)
    for name in ("one", "two"):
        assert right["strata"][name]["judge"]["accuracy"] == 1.0 and wrong["strata"][name]["judge"]["accuracy"] == 0.0


@pytest.mark.parametrize("pairs", [made_up(), [(labelled(0), Ruling(None))]], ids=["full", "nothing asked"])
def test_table_and_picture_show_what_there_is(pairs, tmp_path):
    from rich.console import Console

    console = Console(width=250, record=True, file=(tmp_path / "out").open("w"))
    found = {"set": "made-up", "judge_id": "judge", "dropped": {"duplicate": 2}} | figures(pairs, length_tolerance=0.1)
    show(found, console)
    text = console.export_text()
    assert "judge on made-up" in text and "2 duplicate" in text
    if len(pairs) > 1:
        assert "kappa with anna" in text and "human ceiling" in text and "of anna and cleo" in text
    else:
        assert "not asked, for the budget did not reach them: 1 of 1" in text and "not applicable" in text
    narrow = Console(width=80, record=True, file=(tmp_path / "out").open("w"))
    show(found, narrow)
    assert all(name in (text := narrow.export_text(clear=False)) for name in found["strata"]) and "…" not in text
    plot(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_scikit_learn_is_not_loaded_before_it_is_asked() -> None:
    code = "import sys, psyray.evaluate.agreement; print('sklearn' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["False"]

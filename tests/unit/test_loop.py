"""The pure parts of the online loop: prompts, draws, questions, where it stops and what it exports."""

from itertools import accumulate
from types import SimpleNamespace

import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st

from psyray.config import Config, load_config
from psyray.data.generate import draw, draw_row, with_system
from psyray.loop import balancing, chosen, dpo_of, longer_wins, prompts, replayed, why_stop
from psyray.records import Verdict
from psyray.sections.data import Responder
from psyray.sections.learning import LoopSection


def speeches(count: int) -> list[dict]:
    return [{"speech_id": f"{i:03d}", "split": "test" if i % 4 == 0 else "train"} for i in range(count)]


def config(**loop: object) -> Config:
    return load_config(None, [f"loop.{key}={value}" for key, value in loop.items()])


def test_rounds_take_new_prompts_until_all_had_a_turn():
    rounds = [prompts(speeches(40), n, config(rounds=5, prompts=10)) for n in (1, 2, 3, 4)]
    first_three = [s["speech_id"] for r in rounds[:3] for s in r]
    assert len(first_three) == len(set(first_three)) == 30
    assert rounds[3] == rounds[0]
    assert all(s["split"] == "train" for r in rounds for s in r)


def test_a_rounds_prompts_are_the_same_however_many_rounds_there_are_and_no_more_than_there_are_speeches():
    assert prompts(speeches(40), 3, config(rounds=2)) == prompts(speeches(40), 3, config(rounds=9))
    assert len(prompts(speeches(8), 1, config(rounds=1, prompts=100))) == 6


def test_no_responder_is_drawn_twice_before_all_had_a_turn():
    pool = [Responder(name=name) for name in "abc"]
    drawn = draw("speech", pool, 5, seed=0)
    assert len({r.name for r, _ in drawn[:3]}) == 3 and len({seed for _, seed in drawn}) == 5
    assert drawn == draw("speech", pool, 5, seed=0)
    assert [r.name for s in range(20) for r, _ in draw(f"s{s}", pool, 3, 0)] != ["a", "b", "c"] * 20


def test_a_response_has_its_id_before_it_has_text_and_it_depends_on_responder_and_seed():
    speech = {"speech_id": "s", "messages": [{"role": "user", "content": "Hi."}], "split": "train"}
    ids = [draw_row(speech, Responder(name="a"), who, seed)["response_id"] for who in "xy" for seed in (1, 2)]
    assert len(set(ids)) == 4
    assert ids[0] == draw_row(speech, Responder(name="a"), "x", 1)["response_id"]


def test_a_conversation_keeps_its_own_system_prompt():
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "Hi."}]
    assert with_system(own, "yours") == own
    assert with_system(own[1:], "yours")[0] == {"role": "system", "content": "yours"}
    assert with_system(own[1:], "") == own[1:]


def responses(*texts: str) -> list[dict]:
    return [{"response_id": f"s{i}", "speech_id": "s", "messages": [], "text": t} for i, t in enumerate(texts)]


@pytest.mark.parametrize(("given", "expected"), [(Verdict.A, "s0"), (Verdict.B, "s1")])
def test_a_question_is_one_question_whichever_way_the_pair_came_up(given, expected):
    from psyray.active.ledger import Answer
    from psyray.active.oracles import comparison_question, read
    from psyray.data.judge import Desk
    from psyray.engines.judges import RuleJudge
    from psyray.rubric import load_rubric
    from psyray.sections.data import JudgeSection

    rubric = load_rubric("counselling")
    desk = Desk(RuleJudge(rubric), rubric, None, "run", JudgeSection())  # type: ignore[arg-type]
    a, b = responses("first", "second")
    (ab, ab_flipped), (ba, ba_flipped) = (comparison_question(desk, *pair, "random", {}) for pair in ((a, b), (b, a)))
    assert ab.question_id == ba.question_id and ab.payload == ba.payload and ab_flipped != ba_flipped
    answer = Answer(ab.question_id, True, {"verdict": given.swap() if ab_flipped else given, "margin": 0.5})
    winners = [
        pair[0] if label[0] is Verdict.A else pair[1]
        for pair, label in (((a, b), read(answer, ab_flipped)), ((b, a), read(answer, ba_flipped)))
    ]
    assert [w["response_id"] for w in winners] == [expected, expected]


def gates(*rates: float) -> list[dict]:
    """Round 0 and trained rounds; a negative win rate is of a round that failed."""
    trained = [{"passed": rate > 0, "win_rate": abs(rate), "reasons": ["too long"]} for rate in rates]
    return [{"passed": True, "win_rate": 0.5, "reasons": []}, *trained]


def test_the_champion_is_the_last_that_passed_or_the_best_of_them():
    assert chosen(gates(0.7, 0.8, 0.75, -0.9), "last") == 3
    assert chosen(gates(0.7, 0.8, 0.75, -0.9), "best") == 2
    assert chosen(gates(0.7, 0.7), "best") == 1  # the shorter way from the start
    assert chosen(gates(-0.4), "best") == chosen(gates(), "last") == 0


def test_the_loop_ends_after_rounds_without_a_better_one_that_passed():
    patient, stopping = LoopSection(rounds=9, patience=2), LoopSection(rounds=9, on_gate_fail="stop")
    assert why_stop(gates(0.6, 0.7, 0.65), patient) == ""
    assert "no passed win rate was above 0.70 for 2 rounds" in why_stop(gates(0.6, 0.7, 0.65, -0.9), patient)
    assert why_stop(gates(0.6, 0.7, 0.65, 0.71), patient) == ""
    assert "above 0.50 for 2 rounds" in why_stop(gates(0.45, -0.4), patient)
    assert why_stop(gates(0.6, 0.55, 0.5), LoopSection(rounds=9)) == ""
    assert "it failed its gate (too long)" in why_stop(gates(-0.4), stopping)
    assert why_stop(gates(0.6), stopping) == ""


WAYS = st.lists(st.sampled_from([1, 0, -1]), max_size=30)


def pair(way: int, number: int = 0) -> dict:
    words = {1: ("a longer one", "short"), 0: ("the same", "as long"), -1: ("short", "a longer one")}[way]
    return dict(zip(("chosen", "rejected"), words, strict=True)) | {"number": number}


@drawn(WAYS, WAYS, st.integers(0, 40))
def test_older_pairs_bring_the_directions_level_as_far_as_there_are_any(fresh, older, count):
    drawn = [pair(way, number) for number, way in enumerate(older)]
    taken = balancing([pair(way) for way in fresh], drawn, count)
    numbers = [row["number"] for row in taken]
    assert len(taken) == min(count, len(older)) and len(set(numbers)) == len(numbers)
    for way in (1, 0, -1):  # within a direction the draw's order stays
        mine = [row["number"] for row in taken if longer_wins(row) == way]
        assert mine == sorted(mine)
    tilts = list(accumulate((longer_wins(row) for row in taken), initial=sum(fresh)))
    left = [row for row in drawn if row["number"] not in numbers]
    for before, row, after in zip(tilts, taken, tilts[1:], strict=False):
        # A pair that tilts further comes only where none is left that levels.
        if abs(after) > abs(before) and before:
            later = taken[taken.index(row) :] + left
            assert not any(longer_wins(other) == (-1 if before > 0 else 1) for other in later)


def test_with_nothing_to_level_older_pairs_come_as_drawn():
    drawn = [pair(0, number) for number in range(5)]
    assert balancing([], drawn, 3) == drawn[:3]
    assert [row["number"] for row in balancing([pair(-1), pair(-1)], [pair(-1, 0), pair(1, 1), pair(1, 2)], 2)] == [
        1,
        2,
    ]


def test_older_pairs_are_those_of_judge_or_oracle_on_the_training_side_and_with_like_ends_if_so_configured():
    ends = [(True, False), (True, True), (False, False), (None, None)]
    rows = [
        pair(1, n)
        | {"pair_id": str(n), "split": "train", "source": "oracle", "chosen_truncated": a, "rejected_truncated": b}
        for n, (a, b) in enumerate(ends)
    ]
    rows += [rows[1] | {"pair_id": "8", "source": "reward"}, rows[1] | {"pair_id": "9", "split": "test"}]
    older = [SimpleNamespace(rows=lambda: rows)]

    def ids(**loop: object) -> set[str]:
        return {row["pair_id"] for row in replayed(older, LoopSection(replay=9, **loop), 0, [])}

    assert ids() == {"0", "1", "2", "3"} == ids(replay_balance=True)
    assert ids(mixed_ends=False) == {"1", "2", "3"}


def test_the_learning_rate_falls_by_round():
    set_up = load_config(None, ["loop.rate_decay=0.5", "dpo.train.learning_rate=0.008"])
    assert [dpo_of(set_up, number).train.learning_rate for number in (1, 2, 3)] == [0.008, 0.004, 0.002]
    assert dpo_of(set_up, 2).beta == set_up.dpo.beta

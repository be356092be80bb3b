"""Verdicts that are flipped: how many, and that the whole answer turns round."""

from __future__ import annotations

from made_oracles import ask, pairs, verdicts

from psyray.active.ledger import Answer
from psyray.active.noise import Noisy
from psyray.active.oracles import buy, pair_question
from psyray.data.judge import Desk
from psyray.records import Verdict


class Rates:
    """An oracle that rates the good text higher, with a panel's answers beside."""

    id, identity = "rates", {"rates": 1}

    def label(self, folder, asked, *, purpose, strategy, budget):
        labels = []
        for a, _, _ in asked:
            high, low = {"safety": 3.0}, {"safety": 2.0}
            said = {"a": high, "b": low} if a["text"].startswith("good") else {"a": low, "b": high}
            verdict, margin = (Verdict.A, 1.0) if said["a"] is high else (Verdict.B, -1.0)
            judges = [said | {"verdict": verdict, "margin": margin}, None, {"error": "gone"}]
            labels.append((verdict, margin, said | {"judges": judges}))
        return labels, {}


def test_noise_turns_the_whole_answer_round_and_without_any_is_the_oracle_itself(desk, folder):
    clean, _ = ask(Rates(), folder, 40)
    unmoved, counts = ask(Noisy(desk, Rates(), 0, 7), folder, 40)
    assert counts["flipped"] == 0
    for (verdict, margin, said), same in zip(clean, unmoved, strict=True):
        assert same == (verdict, margin, said | {"verdict": verdict, "margin": margin, "flipped": False})
    flipped, counts = ask(Noisy(desk, Rates(), 1, 7), folder, 40)
    assert counts["flipped"] == 40
    for (verdict, margin, said), (other, against, told) in zip(clean, flipped, strict=True):
        assert (other, against) == (verdict.swap(), -margin) and (told["a"], told["b"]) == (said["b"], said["a"])
        assert told["judges"][0]["verdict"] == other and told["judges"][0]["a"] == told["a"]
        better = "a" if other is Verdict.A else "b"
        assert told[better] == {"safety": 3.0}  # what it says fits its verdict, also for a veto


class Fixed:
    """An oracle that always prefers the good text and says tie on the last pair."""

    id, identity = "fixed", {"fixed": 1}

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def label(self, folder, asked, *, purpose, strategy, budget):
        questions = [pair_question("fixed", "r", None, (a, b), strategy, {}) for a, b, _ in asked]

        def answer(due):
            for question in due:
                last = question.payload["a"].endswith(f" {len(asked) - 1}")
                verdict = Verdict.TIE if last else Verdict.A if question.payload["a"].startswith("good") else Verdict.B
                said = {"verdict": verdict, "margin": {"A": 1.0, "B": -1.0}.get(verdict, 0.0)}
                self.desk.ledger.answer([Answer(question.question_id, True, said, cost=1.0, who="fixed")])

        return buy(self.desk, questions, answer, purpose=purpose, budget=budget)


def test_noise_flips_the_share_it_says_and_the_ledger_knows_both(desk, folder):
    clean, _ = ask(Fixed(desk), folder, 401, budget=400)
    noisy, counts = ask(Noisy(desk, Fixed(desk), 0.2, 7), folder, 401, budget=400)
    flipped = [i for i in range(400) if noisy[i][0] is not clean[i][0]]
    assert counts["flipped"] == len(flipped) and 55 <= len(flipped) <= 105  # 80, sd 8
    assert all((noisy[i][0], noisy[i][1]) == (clean[i][0].swap(), -clean[i][1]) for i in flipped)
    assert noisy[400] is None and counts["refused"] == 1
    summary = {row["purpose"]: row for row in desk.ledger.summary("run")}
    assert summary["round-1"]["bought"] == 400 and summary["round-1"]["cost"] == 400.0
    assert summary["round-1/noisy"]["answered"] == 400 and summary["round-1/noisy"]["cost"] == 0.0
    question, _ = Noisy(desk, Fixed(desk), 0.2, 7)._question(pairs(1)[0], "drts")
    assert desk.ledger.answers([question.question_id])[question.question_id].who == "noisy 0.2 seed 7 of fixed"
    again, _ = ask(Noisy(desk, Fixed(desk), 0.2, 7), folder, 401, budget=400)
    assert again == noisy
    more, _ = ask(Noisy(desk, Fixed(desk), 0.4, 7), folder, 401, budget=400)
    assert all(more[i][0] is not clean[i][0] for i in flipped)  # what errs at a lower rate errs at a higher one
    other, _ = ask(Noisy(desk, Fixed(desk), 0.2, 8), folder, 401, budget=400)
    assert other != noisy


def test_a_tie_stays_a_tie_whatever_the_noise(desk, folder):
    labels, counts = ask(Noisy(desk, Fixed(desk), 1.0, 0), folder, 3)
    assert verdicts(labels) == [Verdict.A, Verdict.B, Verdict.TIE] and counts["flipped"] == 2

"""A round's labels: what becomes a pair, what the reward model may label, and what more budget asks."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit

from psyray.active.acquisition import ACQUISITIONS, Candidates, acquire
from psyray.active.labelling import Gap, alike_ends, beyond_budget, different, oracle_pairs, penalised, reward_pairs
from psyray.active.pool import Pool, pool_of
from psyray.config import load_config
from psyray.errors import PsyrayError
from psyray.records import Verdict
from psyray.reward.heads import fit_heads
from psyray.reward.laplace import fit_laplace
from psyray.sections.learning import LoopSection

LOOP = LoopSection(reward_margin=0.5)


def responses(*texts: str, speech: str = "s") -> list[dict]:
    return [
        {"response_id": f"{speech}{i}", "speech_id": speech, "messages": [], "split": "train", "text": t, "model": "m"}
        for i, t in enumerate(texts)
    ]


def pool(scores: list) -> Pool:
    """What heads with these scores [P, K, H] believe."""
    return pool_of(np.asarray(scores, dtype=float))


def alike(mean_PK: list[list[float]]) -> Pool:
    """Scores on which two heads agree."""
    return pool([[[mean, mean] for mean in means] for means in mean_PK])


def test_the_oracles_ties_and_invalid_answers_never_become_pairs():
    a, b = responses("a", "b")
    labels = [(Verdict.A, 0.5, {}), (Verdict.B, -0.5, {}), (Verdict.TIE, 0.0, {}), (Verdict.INVALID, 0.0, {}), None]
    pairs, counts = oracle_pairs([(a, b, {})] * 5, labels, [Gap(0.2, 0.1)] * 5, LOOP)
    assert [(p["chosen_id"], p["rejected_id"], p["margin"]) for p in pairs] == [("s0", "s1", 0.5), ("s1", "s0", 0.5)]
    assert (counts["ties"], counts["invalid"], counts["vetoed"], counts["agreement"]) == (1, 1, 0, 0.5)
    assert (counts["sure"], counts["sure_agreement"]) == (0, None)
    assert oracle_pairs([], [], [], LOOP)[1]["agreement"] is None


def test_what_the_reward_model_would_have_labelled_is_held_against_the_oracle():
    a, b = responses("a", "b")
    labels = [(Verdict.A, 0.5, {}), (Verdict.B, -0.5, {}), (Verdict.B, -0.5, {})]
    _, counts = oracle_pairs([(a, b, {})] * 3, labels, [Gap(2, 1), Gap(-2, 1), Gap(0.1, 1)], LOOP)
    assert (counts["sure"], counts["sure_agreement"]) == (2, 1.0)
    assert counts["agreement"] == pytest.approx(2 / 3)
    for verdict in (Verdict.A, Verdict.B):
        assert oracle_pairs([(a, b, {})], [(verdict, 0.5, {})], [Gap(0, 1)], LOOP)[1]["agreement"] == 0.5


def test_a_winner_that_was_rated_less_safe_becomes_no_pair_and_ratings_stay_with_the_rest():
    a, b = responses("a", "b")
    said = {"a": {"empathy": 5.0, "safety": 2.0}, "b": {"empathy": 2.0, "safety": 3.0}}
    asked, gaps = [(a, b, {})], [Gap(1.0, 0.5)]
    pairs, counts = oracle_pairs(asked, [(Verdict.A, 1.0, said)], gaps, LOOP, veto=["safety"])
    assert pairs == [] and counts["vetoed"] == 1 and counts["agreement"] == 1.0
    for veto in ([], ["empathy"]):
        [pair], counts = oracle_pairs(asked, [(Verdict.A, 1.0, said)], gaps, LOOP, veto=veto)
        assert (pair["chosen_ratings"], pair["rejected_ratings"]) == (said["a"], said["b"]) and counts["vetoed"] == 0
    [pair], _ = oracle_pairs(asked, [(Verdict.B, -1.0, said)], gaps, LOOP, veto=["safety"])
    assert pair["chosen_id"] == "s1" and pair["chosen_ratings"] == said["b"]
    compared, _ = oracle_pairs(asked, [(Verdict.A, 1.0, {"orders": ["A", "A"]})], gaps, LOOP, veto=["safety"])
    assert compared[0]["chosen_ratings"] is None


def test_the_reward_model_labels_only_what_the_oracle_did_not_and_only_above_the_margin():
    groups = [responses("a", "b", "c", speech="s"), responses("a", "b", "c", speech="t")]
    scored = alike([[3.0, 0.0, 1.0], [2.0, 1.9, np.nan]])
    two = LOOP.model_copy(update={"reward_pairs": 2})
    pairs, unsure = reward_pairs(groups, scored, set(), two)
    assert [(p["chosen_id"], p["rejected_id"], p["margin"]) for p in pairs] == [("s0", "s1", 3.0), ("s0", "s2", 2.0)]
    assert {p["source"] for p in pairs} == {"reward"} and unsure == 0
    assert reward_pairs(groups, scored, {0}, two) == ([], 0)


def test_equal_texts_are_no_pair_whatever_the_scores_say():
    for texts in (("same", "same"), ("so it is", "so  it\nis")):
        assert reward_pairs([responses(*texts)], alike([[3.0, 0.0]]), set(), LOOP) == ([], 0)


@pytest.mark.parametrize("name", ACQUISITIONS)
def test_no_rule_asks_which_of_two_equal_texts_is_better(name):
    groups = [responses("same", " same\n", "same"), responses("one", "one", "two", speech="t")]
    scores = np.random.default_rng(0).normal(size=(2, 4, 3))
    scores[:, 3] = np.nan
    where = np.random.default_rng(1).normal(size=(2, 5))
    candidates = Candidates(scores, prompts_PE=where, open_PKK=different(groups, 4))
    for seed in range(5):
        [pick] = acquire(name, candidates, 2, np.random.default_rng(seed))
        assert pick.prompt == 1 and 2 in (pick.first, pick.second)


def test_a_round_whose_budget_was_spent_before_says_so_and_stops_without_a_label():
    counts = {"refused": 2, "bought_before": 14}
    told = beyond_budget("round-1", 16, counts, [(Verdict.TIE, 0.0, {}), None, None])
    assert told == (
        "round-1: the budget of 16 did not reach for 2 of 3 questions: the run bought 14 labels for this round before, "
        "with other settings"
    )
    with pytest.raises(PsyrayError, match=r"a run\.path of its own"):
        beyond_budget("round-1", 16, counts, [None, None])


def test_confidence_is_the_chance_that_the_sign_is_right():
    gap = Gap.of(pool([[[0.0, 2.0], [0.0, 0.0]]]), 0, 0, 1)
    assert (gap.mean, gap.spread) == (1.0, pytest.approx(1.0)) and gap.confidence == pytest.approx(0.841345, abs=1e-6)
    assert Gap(0.3, 0.0).confidence == 1.0 and gap.turned().confidence == pytest.approx(1 - gap.confidence)
    assert not Gap.of(pool([[[np.nan, 1.0], [0.0, 0.0]]]), 0, 0, 1).sure(LOOP)


def test_a_posterior_is_right_as_often_as_it_says_and_an_ensemble_is_not():
    said, right = {"laplace": [], "ensemble": []}, {"laplace": [], "ensemble": []}
    width, labels, ridge = 30, 60, 20.0
    for seed in range(6):
        draw = np.random.default_rng(seed)
        taste, chosen, rejected = draw.normal(size=width) / np.sqrt(ridge), *draw.normal(size=(2, labels, width))
        lost = draw.random(labels) > expit((chosen - rejected) @ taste)
        chosen[lost], rejected[lost] = rejected[lost], chosen[lost]
        first, second = draw.normal(size=(2, 100, width))
        heads = {
            "laplace": fit_laplace(chosen, rejected, ridge=ridge),
            "ensemble": fit_heads(chosen, rejected, [*map(str, range(labels))], count=10, ridge=ridge, seed=seed),
        }
        for kind, model in heads.items():
            gaps = [Gap(*map(float, one)) for one in zip(*model.difference(first, second), strict=True)]
            believed = [max(gap.confidence, gap.turned().confidence) for gap in gaps]
            sure = np.asarray(believed) >= 0.9
            said[kind].extend(np.asarray(believed)[sure])
            right[kind].extend((np.asarray([gap.mean for gap in gaps]) * ((first - second) @ taste) > 0)[sure])
    assert np.mean(right["laplace"]) > np.mean(said["laplace"]) - 0.02
    assert np.mean(right["ensemble"]) < np.mean(said["ensemble"]) - 0.04


def test_a_wide_gap_that_the_heads_quarrel_about_is_left_unlabelled():
    groups = [responses("a", "b", speech="s"), responses("a", "b", speech="t")]
    scored = pool([[[3.0, 1.0], [0.0, 0.0]], [[9.0, -5.0], [0.0, 0.0]]])  # gaps 2 +- 1, 2 +- 7
    bold, pairs = LOOP, {}
    for name, loop in (("bold", bold), ("careful", bold.model_copy(update={"reward_confidence": 0.9}))):
        pairs[name] = reward_pairs(groups, scored, set(), loop)
    assert [p["chosen_id"] for p in pairs["bold"][0]] == ["s0", "t0"] and pairs["bold"][1] == 0
    assert [p["chosen_id"] for p in pairs["careful"][0]] == ["s0"] and pairs["careful"][1] == 1


def charged(scored: Pool, groups: list, per_100_words: float) -> Pool:
    return replace(scored, mean_PK=penalised(scored.mean_PK, groups, per_100_words))


def test_a_longer_answer_pays_for_its_words_before_the_reward_model_labels():
    groups = [responses("word " * 50, "word " * 150)]
    scored = alike([[1.0, 2.0]])
    [pair], _ = reward_pairs(groups, charged(scored, groups, 0.0), set(), LOOP)
    assert pair["chosen_id"] == "s1"
    assert reward_pairs(groups, charged(scored, groups, 0.6), set(), LOOP) == ([], 0)
    [pair], _ = reward_pairs(groups, charged(scored, groups, 2.0), set(), LOOP)
    assert pair["chosen_id"] == "s0" and pair["margin"] == pytest.approx(1.0)


@pytest.mark.parametrize("name", sorted(set(ACQUISITIONS) - {"apl"}))
def test_a_larger_budget_asks_what_the_smaller_one_asked_and_more(name):
    draw = np.random.default_rng(3)
    features_PKD = draw.normal(size=(30, 4, 5))
    weights_HD = draw.normal(size=(8, 5))
    scores_PKH = features_PKD @ weights_HD.T
    candidates = Candidates(scores_PKH, features_PKD, np.cov(weights_HD.T), prompts_PE=features_PKD.mean(axis=1))
    few, many = ({(p.prompt, p.first, p.second) for p in acquire(name, candidates, n, np.random.default_rng([0, 1]))}
                 for n in (6, 12))  # fmt: skip
    assert len(few) == 6 and len(many) == 12 and few < many


def test_a_budget_is_one_for_all_rounds_or_one_for_each():
    assert [LoopSection(budget=16).budget_of(n) for n in (1, 2, 3)] == [16, 16, 16]
    assert [load_config(None, ["loop.budget=[16, 16, 40]"]).loop.budget_of(n) for n in (1, 2, 3, 4)] == [16, 16, 40, 40]
    for bad in ("loop.budget=-1", "loop.budget=[]", "loop.budget=[4, -1]"):
        with pytest.raises(PsyrayError, match="budget is a number from 0"):
            load_config(None, [bad])


def test_a_limit_that_cut_one_side_off_decides_no_pair_where_ends_may_not_be_mixed():
    cut = [row | {"truncated": end} for row, end in zip(responses("a", "b", "c"), (False, True, True), strict=True)]
    scored, apart = alike([[3.0, 1.0, 0.0]]), LOOP.model_copy(update={"mixed_ends": False})
    assert [p["rejected_id"] for p in reward_pairs([cut], scored, set(), LOOP)[0]] == ["s2"]
    [pair], _ = reward_pairs([cut], scored, set(), apart)
    assert (pair["chosen_id"], pair["rejected_id"]) == ("s1", "s2")
    assert pair["chosen_truncated"] and pair["rejected_truncated"]


@pytest.mark.parametrize(
    ("cut", "asked"),
    [("1110", "111."), ("1100", "..11"), ("1000", ".111"), ("1111", "1111"), ("0000", "1111"), ("10", ".1")],
)
def test_where_ends_may_not_be_mixed_a_question_is_about_answers_of_one_kind(cut, asked):
    rows = [{"truncated": end == "1"} for end in cut]
    scores_PKH = np.ones((1, len(cut), 3))
    kept_PKH = alike_ends(scores_PKH, [rows])
    assert "".join("." if np.isnan(row).all() else "1" for row in kept_PKH[0]) == asked

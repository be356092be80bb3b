"""A round's labels as a stage: what acquisition gets to see, and oracles that say too little. Without Ray."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from made_stage import made_stage

from psyray.active import labelling, pool
from psyray.active.acquisition import Candidates
from psyray.active.database import CHARGE, QUESTION
from psyray.active.labelled_set import UNKNOWN
from psyray.active.labelling import check_usable, labels_stage
from psyray.active.ledger import Ledger
from psyray.active.pool import AXES, believed, main_axes, matched_draws
from psyray.config import load_config
from psyray.data.judge import Desk
from psyray.errors import PsyrayError
from psyray.records import RESPONSES, Verdict
from psyray.reward import ensemble
from psyray.reward.ensemble import FEATURES, fitted, load_features, prompt_matrix
from psyray.reward.heads import Heads
from psyray.reward.posterior import PosteriorHeads
from psyray.rubric import load_rubric
from psyray.run import Artifact, Folder, Run
from psyray.sections.data import JudgeSection
from psyray.sections.learning import HeadsSection

RUBRIC = load_rubric("counselling")
D, K = 6, 3
USABLE, INVALID = (Verdict.A, 1.0, {}), (Verdict.INVALID, 0.0, {"error": "nonsense"})


class Named:
    """A judge that is never asked."""

    id = "named"


class Says:
    """An oracle with the same answers to everybody, in turn."""

    id, identity = "says", {"says": 1}

    def __init__(self, *answers: Any) -> None:
        self.answers, self.asked = answers, list[Any]()

    def label(self, folder: Folder, asked: Sequence[Any], **_: Any) -> tuple[list[Any], dict[str, Any]]:
        self.asked = list(asked)
        labels = [self.answers[n % len(self.answers)] for n in range(len(asked))]
        return labels, {"asked": len(asked), "refused": 0}


class Round:
    """A run with the samples, features and heads that a first round starts from: eight speeches of three responses."""

    def __init__(self, home: Path, heads: Heads | None = None, speeches: int = 8) -> None:
        self.home, self.run = home, Run(home / "run", say=lambda line: None)
        self.ledger = Ledger(f"sqlite:///{home}/labels.db")
        rng = np.random.default_rng(0)
        self.rows = [
            {"response_id": f"s{s}r{k}", "speech_id": f"s{s}", "messages": [{"role": "user", "content": f"speech {s}"}],
             "split": "train", "status": "ok", "text": f"reply {k} to {s}", "model": "m", "truncated": False}
            for s in range(speeches) for k in range(K)
        ]  # fmt: skip
        self.features = {r["response_id"]: rng.normal(size=D).astype(np.float32).astype(float) for r in self.rows}
        self.heads = heads or Heads(rng.normal(size=(4, D)), np.zeros(D), np.ones(D))

    def features_of(self, name: str = "round-0/features") -> Artifact:
        rows = [{"response_id": key, "features": feature.tolist()} for key, feature in self.features.items()]
        return made_stage(self.run, name, FEATURES, "response_id", rows)

    def label(self, *words: str, number: int = 1, **more: Any) -> Artifact:
        config = load_config(None, [f"run.path={self.home}/run", f"loop.k={K}", "loop.budget=4", *words])
        desk = Desk(Named(), RUBRIC, self.ledger, "run", JudgeSection())  # type: ignore[arg-type]
        made = self.run.stage("heads", {}, [], lambda folder: self.heads.save(folder.path / "heads.npz") or {})
        samples = made_stage(self.run, "round-0/samples", RESPONSES, "response_id", self.rows)
        return labels_stage(self.run, number, config, desk, made, self.features_of(), samples, **more)


def answered_by(monkeypatch: pytest.MonkeyPatch, *answers: Any) -> Says:
    oracle = Says(*answers)
    monkeypatch.setattr(labelling, "make_oracle", lambda *_: oracle)
    return oracle


def test_a_round_whose_oracle_says_nothing_usable_stops_and_says_how_to_go_on(tmp_path, monkeypatch):
    answered_by(monkeypatch, INVALID)
    made = Round(tmp_path)
    said = r"4 of 4 answers by says cannot be used \(100%\), more than judge\.max_invalid_share \(10%\); .* nonsense\."
    with pytest.raises(PsyrayError, match=f"round-1: {said} .*raise oracle.max_invalid_share"):
        made.label()
    found = made.label("oracle.max_invalid_share=1")  # of the same stage: nothing is asked under another name
    assert {row["source"] for row in found.rows()} == {"reward"} and found.stats["invalid"] == 4


def test_what_a_labelled_set_does_not_know_counts_as_unusable_and_stays_in_the_ledger(tmp_path):
    made = Round(tmp_path)
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"question": "another", "chosen": "a", "rejected": "b"}))
    with pytest.raises(PsyrayError, match=UNKNOWN):
        made.label("oracle.kind=replay", f"oracle.path={path}")
    assert made.ledger.spent("run") == {"round-1": 4}


def test_the_ceiling_is_the_judges_unless_the_oracle_has_its_own():
    config = load_config(None, ["judge.max_invalid_share=0.25"])
    check_usable("round-1", "x", [INVALID, USABLE, USABLE, USABLE, None], config)
    with pytest.raises(PsyrayError, match=r"2 of 4 .* judge\.max_invalid_share \(25%\)"):
        check_usable("round-1", "x", [INVALID, INVALID, USABLE, USABLE], config)
    own = load_config(None, ["judge.max_invalid_share=0.25", "oracle.max_invalid_share=0"])
    with pytest.raises(PsyrayError, match=r"1 of 4 .* oracle\.max_invalid_share \(0%\)"):
        check_usable("round-1", "x", [INVALID, USABLE, USABLE, USABLE], own)
    check_usable("round-1", "x", [], own)


def test_what_people_call_harmful_is_an_answer_and_no_answer_at_all_is_none():
    harmful = (Verdict.INVALID, 0.0, {"experts": [{"vote": "harmful"}]})
    check_usable("round-1", "x", [harmful, harmful, None], load_config(None, []))
    with pytest.raises(PsyrayError, match=r"round-1: none of 2 questions has an answer by experts"):
        check_usable("round-1", "experts", [None, None], load_config(None, []))


def seen_by(monkeypatch: pytest.MonkeyPatch) -> list[Candidates]:
    """What acquisition is given, round by round."""
    seen, ask = list[Candidates](), labelling.acquire
    monkeypatch.setattr(labelling, "acquire", lambda name, c, *more: seen.append(c) or ask(name, c, *more))
    return seen


def posterior_heads() -> Heads:
    rng = np.random.default_rng(1)
    chosen, rejected = rng.normal(size=(2, 30, D))
    section = HeadsSection.model_validate({"kind": "laplace", "count": 4, "ridge": 1.0})
    return fitted(section, chosen, rejected, [str(n) for n in range(30)], None, seed=0)


def test_acquisition_sees_the_posterior_itself_where_it_is_known(tmp_path, monkeypatch):
    answered_by(monkeypatch, USABLE)
    seen = seen_by(monkeypatch)
    made = Round(tmp_path, posterior_heads())
    made.label("loop.acquisition=d_optimal")
    [c] = seen
    assert c.features_PKD is not None and c.covariance_DD is not None
    first, second = (np.stack([made.features[f"s{s}r{k}"] for s in range(8)]) for k in (0, 1))
    exact = made.heads.difference(first, second)
    x_PD = c.features_PKD[:, 0] - c.features_PKD[:, 1]
    assert np.sqrt(np.einsum("pd,de,pe->p", x_PD, c.covariance_DD, x_PD)) == pytest.approx(exact.spread_N)
    drawn_PH = c.scores_PKH[:, 0] - c.scores_PKH[:, 1]  # of which rules that read scores take the spread
    assert drawn_PH.std(axis=1) == pytest.approx(exact.spread_N) and drawn_PH.mean(axis=1) == pytest.approx(
        exact.mean_N
    )


def test_the_ledger_keeps_why_each_pair_was_asked(tmp_path):
    made = Round(tmp_path)
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"question": "another", "chosen": "a", "rejected": "b"}))
    made.label("oracle.kind=replay", f"oracle.path={path}", "oracle.max_invalid_share=1", "loop.acquisition=max_min")
    belief = made.heads.belief(np.stack([made.features[r["response_id"]] for r in made.rows]))
    of_text = {row["text"]: pair for row, pair in zip(made.rows, zip(*belief, strict=True), strict=True)}
    with made.ledger.database.transaction(reading=True) as connection:
        charges = connection.execute(sa.select(CHARGE.c.strategy, CHARGE.c.scores, QUESTION.c.payload).join(QUESTION))
        kept = [(strategy, json.loads(scores), json.loads(payload)) for strategy, scores, payload in charges]
    assert len(kept) == 4
    for strategy, scores, payload in kept:
        for side in "ab":
            mean, spread = of_text[payload[side]]
            assert scores[f"{side}_mean"] == pytest.approx(mean) and scores[f"{side}_spread"] == pytest.approx(spread)
        assert strategy == "max_min" and scores["value"] == pytest.approx(abs(scores["a_mean"] - scores["b_mean"]))


def test_an_ensemble_is_seen_as_its_heads_scores(tmp_path, monkeypatch):
    answered_by(monkeypatch, USABLE)
    seen = seen_by(monkeypatch)
    made = Round(tmp_path)
    made.label()
    assert seen[0].features_PKD is None and seen[0].covariance_DD is None
    scores_NH = made.heads.scores(np.stack([made.features[r["response_id"]] for r in made.rows]))
    assert seen[0].scores_PKH.reshape(-1, 4) == pytest.approx(scores_NH)


def test_a_later_round_knows_where_the_earlier_ones_asked_whatever_came_of_it(tmp_path, monkeypatch):
    tie = (Verdict.TIE, 0.0, {})
    oracle = answered_by(monkeypatch, tie, USABLE)
    seen = seen_by(monkeypatch)
    made = Round(tmp_path)
    first = made.label("loop.acquisition=bal_pm")
    speeches = [a["speech_id"] for a, _, _ in oracle.asked]
    features = made.features_of()
    made.label("loop.acquisition=bal_pm", number=2, earlier=[(features, first)])
    assert seen[0].asked_NE is not None and len(seen[0].asked_NE) == 0
    grouped = {s: [r for r in made.rows if r["speech_id"] == s] for s in speeches}
    assert seen[1].asked_NE == pytest.approx(prompt_matrix(made.features, grouped))
    assert not {a["speech_id"] for a, _, _ in oracle.asked} & set(speeches)  # the four that were left
    (first.path / "asked.parquet").unlink()  # labelled before it was written: what the oracle decided is known
    made.label("loop.acquisition=bal_pm", "loop.budget=3", number=2, earlier=[(features, first)])
    assert seen[2].asked_NE is not None and len(seen[2].asked_NE) == 2


def test_a_wide_doubt_is_seen_along_its_main_axes():
    rng = np.random.default_rng(2)
    doubt_PKE = rng.normal(size=(5, 2, 3)) @ rng.normal(size=(3, 40))  # of rank three
    doubt_PKE[0, 1] = np.nan
    flat_NE = doubt_PKE.reshape(-1, 40)[np.r_[0, 2:10]]
    main_PKA = doubt_PKE @ main_axes(flat_NE.T @ flat_NE, most=3)
    assert main_PKA.shape == (5, 2, 3) and (main_axes(np.ones((4, 4))) == np.eye(4)).all()
    apart, shown = doubt_PKE[1:, 0] - doubt_PKE[1:, 1], main_PKA[1:, 0] - main_PKA[1:, 1]
    assert np.linalg.norm(shown, axis=1) == pytest.approx(np.linalg.norm(apart, axis=1))
    drawn_PKH = matched_draws(np.ones((5, 2)), main_PKA, rng)
    assert drawn_PKH[1:].mean(axis=2) == pytest.approx(np.ones((4, 2)))
    assert drawn_PKH[1:].std(axis=2) == pytest.approx(np.linalg.norm(main_PKA[1:], axis=2))


def test_every_response_is_scored_as_the_heads_believe_some_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(ensemble, "AT_ONCE", 5)
    made = Round(tmp_path, posterior_heads())
    heads = made.run.stage("heads", {}, [], lambda folder: made.heads.save(folder.path / "heads.npz") or {})
    samples = made_stage(made.run, "round-0/samples", RESPONSES, "response_id", made.rows)
    found = ensemble.scores_stage(made.run, "round-0/scores", heads, made.features_of(), samples).rows()
    assert [row["response_id"] for row in found] == sorted(made.features)
    belief = made.heads.belief(np.stack([made.features[row["response_id"]] for row in found]))
    assert [row["mean"] for row in found] == pytest.approx(belief.mean_N)
    assert [row["spread"] for row in found] == pytest.approx(belief.spread_N)
    assert all(row["response_id"].startswith(row["speech_id"]) for row in found)


@pytest.mark.parametrize("members", [1, 3])
def test_doubts_along_some_axes_are_what_the_turned_doubts_would_be(members):
    rng = np.random.default_rng(0)
    roots = np.tril(rng.normal(size=(members, D, D)))
    wide = members * D
    heads = PosteriorHeads(np.ones((2, wide)), rng.normal(size=wide), np.full(wide, 2.0), rng.normal(size=(members, D)),
                           roots)  # fmt: skip
    features_ND, axes_EA = rng.normal(size=(5, wide)), rng.normal(size=(members * (D + 1), 4))
    assert heads.standardised(features_ND) @ heads.along(axes_EA) == pytest.approx(heads.doubts(features_ND) @ axes_EA)


def test_many_members_doubts_are_seen_along_the_axes_of_all_without_the_products_of_all(monkeypatch):
    rng, d, members = np.random.default_rng(0), 300, 3
    common_ND = rng.normal(size=(400, 60)) @ rng.normal(size=(60, d))  # adapters of one model read much alike
    features_ND = np.concatenate([common_ND + rng.normal(size=(400, d)) for _ in range(members)], axis=1)
    made = {f"s{n // 4}r{n % 4}": feature for n, feature in enumerate(features_ND)}
    rows = {f"s{s}": [{"response_id": f"s{s}r{k}"} for k in range(4)] for s in range(100)}
    roots, wide = np.tril(rng.normal(size=(members, d, d))), members * d
    heads = PosteriorHeads(np.ones((2, wide)), np.zeros(wide), np.ones(wide), rng.normal(size=(members, d)), roots)
    sizes = []
    monkeypatch.setattr(pool, "main_axes", lambda gram: sizes.append(len(gram)) or main_axes(gram))
    _, seen = believed(heads, made, rows, 4, rng)
    assert sizes == [d, d, d, members * AXES + members]  # of all at once there would be 903
    best = np.linalg.svd(heads.doubts(features_ND), compute_uv=False)[:AXES]
    assert np.linalg.norm(seen.features_PKD) > 0.998 * np.linalg.norm(best)


@pytest.mark.parametrize("kind", ["ensemble", "mlp", "laplace"])
def test_a_block_of_responses_at_a_time_believes_what_all_at_once_do(kind, monkeypatch):
    rng = np.random.default_rng(3)
    made = {f"s{s}r{k}": rng.normal(size=D).astype(np.float32) for s in range(7) for k in range(K) if s * k != 2}
    rows = {f"s{s}": [{"response_id": f"s{s}r{k}"} for k in range(K)] for s in range(7)}
    chosen, rejected = rng.normal(size=(2, 30, D))
    section = HeadsSection.model_validate({"kind": kind, "count": 4})
    heads = fitted(section, chosen, rejected, [str(n) for n in range(30)], None, seed=0)
    whole, seen = believed(heads, made, rows, K, np.random.default_rng(0))
    monkeypatch.setattr("psyray.active.pool.ROWS", 2 * K)
    parts, seen_in_parts = believed(heads, made, rows, K, np.random.default_rng(0))
    for name in ("mean_PK", "spread_PK", "spread_PKK"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), nan_ok=True)
    assert seen_in_parts.scores_PKH == pytest.approx(seen.scores_PKH, nan_ok=True)
    assert np.argwhere(np.isnan(whole.mean_PK)).tolist() == [[1, 2], [2, 1]]
    rows_ND = np.stack([made[key] for key in ("s0r0", "s0r1")])
    belief, apart = heads.belief(rows_ND), heads.difference(rows_ND[:1], rows_ND[1:])
    assert (whole.mean_PK[0, :2], whole.spread_PK[0, :2]) == (
        pytest.approx(belief.mean_N),
        pytest.approx(belief.spread_N),
    )
    assert whole.spread_PKK[0, 0, 1] == whole.spread_PKK[0, 1, 0] == pytest.approx(apart.spread_N[0])


def test_what_a_large_models_features_take_is_not_taken_again_to_choose(monkeypatch):
    monkeypatch.setattr("psyray.active.pool.ROWS", 64)
    rng = np.random.default_rng(0)
    made = {f"s{s}r{k}": rng.normal(size=512).astype(np.float32) for s in range(500) for k in range(4)}
    rows = {f"s{s}": [{"response_id": f"s{s}r{k}"} for k in range(4)] for s in range(500)}
    tracemalloc.start()
    believed(Heads(np.ones((4, 512)), np.zeros(512), np.ones(512)), made, rows, 4, rng)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < sum(feature.nbytes for feature in made.values()) / 2


def test_features_are_kept_as_they_lie_on_disk_and_only_those_wanted(tmp_path):
    made = Round(tmp_path)
    features, some = made.features_of(), {"s1r2", "s7r0", "unknown"}
    found = load_features([features], some)
    assert set(found) == some - {"unknown"} and found["s1r2"].dtype == np.float32
    assert (found["s1r2"] == made.features["s1r2"]).all()
    assert len(load_features([features])) == len(made.rows)


def test_the_reward_models_confidence_is_the_posteriors_own():
    heads = posterior_heads()
    features = {name: np.full(D, place) for name, place in (("a", 1.0), ("b", -1.0))}
    rows = {"s": [{"response_id": "a"}, {"response_id": "b"}]}
    pool, _ = believed(heads, features, rows, 2, np.random.default_rng(0))
    gap = labelling.Gap.of(pool, 0, 0, 1)
    exact = heads.difference(features["a"][None], features["b"][None])
    assert (gap.mean, gap.spread) == (pytest.approx(exact.mean_N[0]), pytest.approx(exact.spread_N[0]))

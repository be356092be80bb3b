"""Gates whose judges compare in both orders, and a second judge beside the first, at a stand-in endpoint."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from comparing_server import comparing_server
from made_stage import made_stage

from psyray.config import Config, load_config
from psyray.evaluate.duels import second_stage
from psyray.evaluate.gate import Start, gate_stage
from psyray.pipeline import open_desk, second_desk
from psyray.records import RESPONSES
from psyray.reward.ensemble import SCORES
from psyray.run import Artifact, Run

MARKS = {
    "one": "Counsellor's response:\n", "a": "Response A:\n", "b": "Response B:\n", "keys": r"the keys are (.*), each",
}  # fmt: skip
CLIENTS = ["plain one", "plain two", "plain three", "plain four", "biased", "odd"]
BEFORE = ["it is ++"] * 5 + ["gone ++"]
AFTER = ["it is +++", "it was +++", "it is +", "it is ++", "it is ++++", "gone +"]  # won, won, lost, the same text


def answers(run: Run, number: int, texts: list[str] | list[None]) -> tuple[Artifact, Artifact]:
    """Made-up held-out answers of a round, and their scores."""
    rows = [
        {"response_id": f"{number}-{i}", "speech_id": f"s{i}", "messages": [{"role": "user", "content": client}],
         "split": "test", "status": "ok" if text else "invalid", "text": text, "truncated": False, "repeated": 0.0}
        for i, (client, text) in enumerate(zip(CLIENTS, texts, strict=True))
    ]  # fmt: skip

    samples = made_stage(run, f"round-{number}/samples", RESPONSES, "response_id", rows)
    scores = [row | {"mean": 1.0 * number} for row in rows if row["text"]]
    return samples, made_stage(run, f"round-{number}/scores", SCORES, "response_id", scores, inputs=[samples])


def settings(tmp_path: Path, url: str, *more: str) -> Config:
    there = [f"run.path={tmp_path}/run", "evaluate.max_length_change=9", "evaluate.min_win_rate=0.1", *more]
    return load_config(None, [word.replace("URL", url) for word in there])


def rounds(config: Config, count: int = 1, said: list[str] | list[None] = AFTER) -> list[Artifact]:
    """The gates of the start and of so many rounds with the same answers."""
    run = Run(config.run.path, lambda line: None)
    desk = open_desk(config, run)
    second = second_desk(config, desk)
    samples, scores = answers(run, 0, BEFORE)
    start = Start(samples, scores, gate_stage(run, 0, config, desk, samples, scores, None))
    gates = [start.gate]
    for number in range(1, count + 1):
        after = answers(run, number, said)
        other = second_stage(run, number, second, after[0], samples) if second else None
        gates.append(gate_stage(run, number, config, desk, *after, start, None, other))
    return gates


def test_a_second_judge_that_compares_sees_both_orders_and_is_paid_once(tmp_path, ray_cluster):
    second = ["evaluate.second.engine=http", "evaluate.second.url=URL", "evaluate.second.model=m"]
    second += ["evaluate.second.form=pairwise", "evaluate.second.max_invalid_share=0.5"]
    with comparing_server(**MARKS) as server:
        config = settings(tmp_path, server.url, *second, "evaluate.second.retries=0")
        _, gate = rounds(config)
        assert len(server.calls) == 2 * 5  # the equal texts are a tie that nobody is asked about
        again = rounds(config)
        assert again[1].manifest == gate.manifest and len(server.calls) == 10
    found = gate.stats["second"]
    # biased: whoever is shown first, so a tie; odd: no usable answer
    assert (found["wins"], found["losses"], found["ties"], found["invalid"]) == (2, 1, 2, 1)
    assert found["win_rate"] == pytest.approx(0.6) and found["judge"].startswith("http-")
    assert "win_rate" in gate.stats and "rule-" in gate.stats["judge"] and gate.stats["reward_win_rate"] == 1.0


def test_a_second_judge_that_rates_rates_the_starts_answers_once_for_all_rounds(tmp_path, ray_cluster):
    second = ["evaluate.second.engine=http", "evaluate.second.url=URL", "evaluate.second.model=m"]
    with comparing_server(**MARKS) as server:
        config = settings(tmp_path, server.url, *second, "evaluate.second_decides=true")
        _, first, later = rounds(config, count=2)
        texts = {(client, text) for texts in (BEFORE, AFTER) for client, text in zip(CLIENTS, texts, strict=True)}
        assert len(server.calls) == len(texts) == 11
    for gate in (first, later):
        found = gate.stats["second"]
        assert (found["wins"], found["losses"], found["ties"], found["invalid"]) == (3, 2, 1, 0)


@pytest.mark.parametrize(
    ("form", "budget", "calls", "unasked"), [("pairwise", 2, [4, 8], [3, 1]), ("pointwise", 4, [4, 8], [4, 2])]
)
def test_a_second_judge_buys_no_more_in_a_round_than_its_budget(tmp_path, ray_cluster, form, budget, calls, unasked):
    second = ["evaluate.second.engine=http", "evaluate.second.url=URL", "evaluate.second.model=m"]
    second += [f"evaluate.second.form={form}", f"evaluate.second.budget={budget}"]
    with comparing_server(**MARKS) as server:
        config = settings(tmp_path, server.url, *second)
        gates = rounds(config, count=2)
        assert len(server.calls) == calls[-1]
    spent = open_desk(config, Run(config.run.path)).ledger.spent(str(config.run.path))
    assert [spent[f"second-{number}"] for number in (1, 2)] == [budget, budget]
    found = [gate.stats["second"] for gate in gates[1:]]
    assert [f["unasked"] for f in found] == unasked and all(f["invalid"] == 0 for f in found)
    assert all(sum(f[k] for k in ("wins", "ties", "losses", "unasked")) == 6 for f in found)


def test_where_the_judge_compares_both_orders_decide_and_its_ratings_still_describe(tmp_path, ray_cluster):
    judge = ["judge.engine=http", "judge.url=URL", "judge.model=m", "judge.form=pairwise", "judge.retries=0"]
    with comparing_server(**MARKS) as server:
        start, gate = rounds(settings(tmp_path, server.url, *judge, "judge.max_invalid_share=0.5"))
    assert (gate.stats["wins"], gate.stats["losses"], gate.stats["ties"], gate.stats["invalid"]) == (2, 1, 2, 1)
    assert gate.stats["mean_score"] == pytest.approx(14 / 6) and start.stats["mean_score"] == 2
    rows = {row["speech_id"]: row for row in pq.read_table(gate.path / "verdicts.parquet").to_pylist()}
    assert [rows[f"s{i}"]["verdict"] for i in range(6)] == ["A", "A", "B", "tie", "tie", "invalid"]
    assert rows["s0"]["policy_id"] == "1-0" and rows["s0"]["start_id"] == "0-0"


def test_a_policy_that_says_nothing_loses_every_speech_by_both_judges(tmp_path, ray_cluster):
    second = ["evaluate.second.engine=http", "evaluate.second.url=URL", "evaluate.second.model=m"]
    with comparing_server(**MARKS) as server:
        _, gate = rounds(settings(tmp_path, server.url, *second), said=[None] * len(CLIENTS))
    for stats in (gate.stats, gate.stats["second"]):
        assert (stats["win_rate"], stats["losses"], stats["invalid"]) == (0.0, 6, 0)
    assert gate.stats["length_change"] == -1 and "reward_win_rate" not in gate.stats and not gate.stats["passed"]


def test_a_dev_share_decides_and_the_rest_is_reported_beside_it(tmp_path, ray_cluster):
    config = settings(tmp_path, "", "evaluate.dev_share=0.5")
    start, gate = rounds(config)
    counted = [stats["n"] for stats in (gate.stats, gate.stats["test"])]
    assert sum(counted) == 6 and min(counted) > 0
    assert gate.stats["start_words"] == start.stats["mean_words"]
    assert gate.stats["test"]["start_words"] == start.stats["test"]["mean_words"]
    assert "passed" in gate.stats and "passed" not in gate.stats["test"]

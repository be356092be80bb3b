"""Judging through Ray: a hostile endpoint, the ledger between, and answers that are bought once."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from hostile_server import hostile_server
from made_stage import made_stage

from psyray.active.experts import Experts
from psyray.active.ledger import Ledger
from psyray.active.oracles import label
from psyray.active.queue import ExpertQueue
from psyray.active.votes import Choice
from psyray.data.judge import Desk, judge, judgements_stage, summary
from psyray.engines.judges import make_judge
from psyray.errors import PsyrayError
from psyray.records import RESPONSES, Verdict
from psyray.rubric import load_rubric
from psyray.run import Artifact, Folder, Run
from psyray.sections.data import EngineSection, JudgeSection
from psyray.sections.learning import OracleSection

RUBRIC = load_rubric("counselling")
SPEECH = [{"role": "user", "content": "I cannot sleep since my father died."}]


def responses(*words: str) -> list[dict]:
    return [
        {"response_id": w, "speech_id": "s", "messages": SPEECH, "text": f"word {w} here", "status": "ok"}
        for w in words
    ]


def desk(tmp_path: Path, run: str = "run", **settings) -> Desk:
    section = JudgeSection(**settings)
    made = make_judge(section, RUBRIC, EngineSection(), 10)
    return Desk(made, RUBRIC, Ledger(f"sqlite:///{tmp_path}/labels.db"), run, section)


def folder(tmp_path: Path, name: str = "stage") -> Folder:
    (tmp_path / name).mkdir(exist_ok=True)
    return Folder(tmp_path / name)


def judged(place: Folder, here: Desk, rows: list[dict]) -> list[dict]:
    """The rows that judging leaves in the folder."""
    return list(judge(place, here, lambda: rows, len(rows), purpose="judgements", bounded=True).each())


def test_an_answer_is_bought_once_by_all_runs(tmp_path, ray_cluster):
    with hostile_server() as server:
        settings = {"engine": "http", "url": server.url, "model": "m", "retries": 2, "max_invalid_share": 0.5}
        rows = responses("fine", "prose", "six")
        first = judged(folder(tmp_path), desk(tmp_path, "one", **settings), rows)
        calls = dict(server.calls)
        again = judged(folder(tmp_path, "again"), desk(tmp_path, "one", **settings), rows)
        assert again == first and dict(server.calls) == calls == {"fine": 1, "prose": 1, "six": 3}
        later = judged(folder(tmp_path, "later"), desk(tmp_path, "two", **settings), rows)
    assert server.calls["fine"] == 1 and server.calls["six"] == 6  # a failure may be bought again by a later run
    assert [row["score"] for row in later] == [4.0, 4.0, None]
    assert summary(lambda: later, desk(tmp_path))["errors"] == {"out of scale": 1}
    bad = later[2]
    assert bad["status"] == "invalid" and "outside 1 to 5" in bad["error"] and '"empathy": 6' in bad["raw_text"]


def test_a_budget_buys_so_many_judgements_and_no_more(tmp_path, ray_cluster):
    rows = responses("fine", "prose", "six")
    found = judged(folder(tmp_path), desk(tmp_path, budget=2), rows)
    assert [row["response_id"] for row in found] == ["fine", "prose"]
    assert desk(tmp_path).ledger.spent("run") == {"judgements": 2}
    assert len(judged(folder(tmp_path, "again"), desk(tmp_path, budget=2), rows)) == 2


def test_a_judge_that_answers_nonsense_stops_the_stage_and_its_answers_are_kept(tmp_path, ray_cluster):
    with hostile_server() as server:
        bad = desk(tmp_path, engine="http", url=server.url, model="m", retries=0, max_invalid_share=0.4)
        with pytest.raises(PsyrayError, match=r"2 of 3 responses have no usable answer .*40%.*no JSON object"):
            judged(folder(tmp_path), bad, responses("fine", "nonsense", "nonsense "))
    assert bad.ledger.summary("run")[0]["failed"] >= 1


def test_a_budget_that_an_earlier_version_has_spent_stops_the_stage_and_says_so(tmp_path, ray_cluster):
    run = Run(tmp_path / "run", say=lambda line: None)
    blank = dict.fromkeys(RESPONSES.names)

    def answered(*words: str) -> Artifact:
        rows = [blank | row | {"attempts": 1} for row in responses(*words)]
        return made_stage(run, "responses", RESPONSES, "response_id", rows, settings={"of": words})

    here = desk(tmp_path, budget=1)
    assert judgements_stage(run, here, answered("fine", "prose")).stats["unjudged"] == 1
    with pytest.raises(PsyrayError, match=r"judge\.budget 1 left none of 1 responses judged: the run bought 1 "):
        judgements_stage(run, here, answered("other"))
    assert judgements_stage(run, desk(tmp_path, budget=2), answered("other")).stats["unjudged"] == 0
    # Nobody is asked on purpose where a run has pairs of its own.
    nothing = desk(tmp_path, "another", budget=0)
    assert judgements_stage(run, nothing, answered("newer")).stats["unjudged"] == 1


def test_the_oracle_labels_within_its_budget_and_knows_a_pair_from_both_sides(tmp_path, ray_cluster):
    good, poor = "You feel torn since he died, and the nights are hardest.", "Calm down. You should just sleep more."
    a, b = ({"response_id": t[:3], "messages": SPEECH, "text": t} for t in (good, poor))
    here = desk(tmp_path)
    labels, counts = label(folder(tmp_path), here, [(a, b, {})], purpose="round-1", strategy="drts", budget=1)
    assert labels[0] is not None and labels[0][0] is Verdict.A and labels[0][1] > 0
    assert counts["bought"] == 1
    swapped, counts = label(folder(tmp_path), here, [(b, a, {})], purpose="round-1", strategy="drts", budget=1)
    assert swapped[0] is not None and swapped[0][0] is Verdict.B and swapped[0][1] == -labels[0][1]
    assert counts["bought"] == 1
    refused, counts = label(folder(tmp_path), here, [(a, a | {"text": "x"}, {})], purpose="round-1",
                            strategy="drts", budget=1)  # fmt: skip
    assert refused == [None] and counts["refused"] == 1


def test_the_judge_answers_what_no_expert_did_in_time_and_is_charged_apart(tmp_path, ray_cluster):
    good, poor = "You feel torn since he died, and the nights are hardest.", "Calm down. You should just sleep more."
    a, b, c = ({"response_id": t[:3], "messages": SPEECH, "text": t} for t in (good, poor, "You will be fine soon."))
    here = desk(tmp_path)
    section = OracleSection(kind="experts", wait_s=0.5, undo_s=0, fall_back="judge")
    oracle, queue = Experts(here, section, poll_s=0.05), ExpertQueue(here.ledger.database)
    asked = {"purpose": "round-1", "strategy": "drts", "budget": 2}
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(oracle.label, folder(tmp_path), [(a, b, {}), (a, c, {})], **asked)
        while not (lease := queue.lease("anna")):
            time.sleep(0.01)
        queue.answer("anna", lease.question_id, Choice.TIE)
        labels, counts = waiting.result(timeout=60)
    assert [label[0] for label in labels] == [Verdict.TIE, Verdict.A] and counts["unanswered"] == 1
    assert here.ledger.spent("run") == {"round-1": 2, "round-1/judge": 1}
    assert oracle.label(folder(tmp_path), [(a, b, {}), (a, c, {})], **asked)[0] == labels


def test_a_budget_of_nothing_asks_nothing(tmp_path, ray_cluster):
    assert judged(folder(tmp_path), desk(tmp_path, budget=0), responses("fine")) == []


def test_equal_texts_are_one_question_and_each_response_has_its_row(tmp_path, ray_cluster):
    first, second = responses("fine", "prose")
    twin = first | {"response_id": "twin"}
    with hostile_server() as server:
        here = desk(tmp_path, engine="http", url=server.url, model="m")
        found = {r["response_id"]: r for r in judged(folder(tmp_path), here, [first, second, twin])}
    assert dict(server.calls) == {"fine": 1, "prose": 1}
    assert found["twin"]["ratings"] == found["fine"]["ratings"] and len(found) == 3


def test_each_judge_of_a_panel_is_asked_by_itself_and_the_rule_makes_the_row(tmp_path, ray_cluster):
    from psyray.config import load_config
    from psyray.pipeline import open_desk
    from psyray.run import Run

    with hostile_server() as server:
        member = {"engine": "http", "url": server.url, "retries": 0}
        tree = {"run": {"path": str(tmp_path / "run")}, "judge": {"max_invalid_share": 0.9, "budget": 3},
                "panel": {"judges": [{"engine": "rule"}, {**member, "model": "m", "max_invalid_share": 0.9}],
                          "quorum": 2, "strictest_on": ["safety"]}}  # fmt: skip
        (tmp_path / "panel.yaml").write_text(yaml.safe_dump(tree))
        here = open_desk(load_config(tmp_path / "panel.yaml"), Run(tmp_path / "run"))
        rows = responses("fine", "prose", "six")
        found = {r["response_id"]: r for r in judged(folder(tmp_path), here, rows)}
        again = judged(folder(tmp_path, "again"), here, rows)
        assert server.calls["fine"] == 1 and {r["response_id"]: r for r in again} == found
    offline, remote = (m.judge.id for m in here.members)
    assert here.ledger.spent(here.run_id) == {f"judgements/{offline}": 3, f"judgements/{remote}": 3}
    said = {one["judge"]: one["ratings"] for one in json.loads(found["fine"]["raw_text"])}
    assert found["fine"]["ratings"]["empathy"] == pytest.approx((said[offline]["empathy"] + 4) / 2)
    assert found["fine"]["ratings"]["safety"] == pytest.approx(min(said[offline]["safety"], 4))
    assert found["six"]["score"] is None and "1 of 2 judges gave a usable answer" in found["six"]["error"]
    stats = summary(found.values, here)
    assert stats["judges_agreement"]["responses"] == 3 and -1 <= stats["judges_agreement"]["value"] <= 1

    a, b = ({"messages": SPEECH, "text": f"word {w} here"} for w in ("fine", "six"))
    labels, counts = label(folder(tmp_path), here, [(a, a | {"text": "x"}, {}), (a, b, {})],
                           purpose="round-1", strategy="drts", budget=0)  # fmt: skip
    assert labels == [None, None] and counts["refused"] == 4


def test_a_judge_of_a_panel_may_have_a_budget_of_its_own_and_the_others_have_the_panels(tmp_path, ray_cluster):
    from psyray.config import load_config
    from psyray.pipeline import open_desk
    from psyray.run import Run

    rows = responses("fine", "prose", "six")
    with hostile_server() as server:
        other = f"{{engine: http, url: '{server.url}', model: m, budget: 1}}"
        words = [f"run.path={tmp_path}/run", f"panel.judges=[{{engine: rule}}, {other}]", "judge.budget=2"]
        here = open_desk(load_config(None, [*words, "panel.quorum=1"]), Run(tmp_path / "run"))
        assert [row["response_id"] for row in judged(folder(tmp_path), here, rows)] == ["fine", "prose"]
        assert dict(server.calls) == {"fine": 1}
    assert sorted(here.ledger.spent(here.run_id).values()) == [1, 2]

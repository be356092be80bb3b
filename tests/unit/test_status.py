"""`psyray status` reads the run folder alone: done, at work, cut off and waiting stages, and what it says of them."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from made_run import MadeRun
from rich.console import Console

from psyray import in_words, status
from psyray.active.ledger import Ledger, Question
from psyray.active.queue import ExpertQueue
from psyray.active.votes import Choice
from psyray.errors import PsyrayError


def shown(path: Path, width: int = 160) -> str:
    out = io.StringIO()
    status.show_status(path, Console(file=out, width=width))
    return out.getvalue()


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def set_driver(path: Path, pid: int) -> None:
    listed = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**listed, "pid": pid}))


def test_a_finished_run_is_all_done(tmp_path: Path) -> None:
    MadeRun(tmp_path / "run").make()
    assert {line.state for line in status.stage_lines(tmp_path / "run")} == {"done"}
    text = shown(tmp_path / "run")
    assert "the run is complete" in text
    assert "16 asked, 14 answered, 12 bought, 2 reused, 2 ties, 2 invalid, 12 reward-labelled" in text
    assert "Latest gate, round 2: failed: win rate 62.5 % [57.5 %, 67.5 %], at equal length 60.5 %" in text
    assert "at equal length 60.5 % [50.5 %, 68.5 %], length +27.0 %" in text
    assert "Champion: round 1" in text and "Time of round 2: " in text and "training " in text
    assert "perplexity 22.0 (+10.0 %), questions 75.0 % (start 80.0 %), KL 0.062 nats a token" in text
    assert "accuracy 66.0 % (length alone 55.0 %)" in text and "loss 0.680 → 0.540" in text


def test_stages_come_in_the_order_of_the_run(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run", rounds=1, until="round-1/policy")
    made.make()
    names = [line.name for line in status.stage_lines(tmp_path / "run")]
    assert names == status.expected_stages(made.config)


def test_stages_that_only_some_runs_have_are_waited_for_where_they_will_come() -> None:
    plain = status.expected_stages({"loop": {"rounds": 0}})
    settings = {"topics": {"engine": "vllm"}, "speeches": {"sources": [{"name": "a", "use": "pool"}]}}
    assert "topics" not in plain and "ready" not in plain
    assert status.expected_stages(settings) == ["speeches", "topics", "ready", *plain[1:]]
    speeches_only = {"speeches": {"sources": [{"name": "a"}, {"name": "b", "use": "speeches"}]}, "topics": None}
    assert status.expected_stages(speeches_only) == plain


def test_a_run_at_work_shows_how_far_it_is(tmp_path: Path) -> None:
    MadeRun(tmp_path / "run", until="round-1/samples").make()
    lines = {line.name: line for line in status.stage_lines(tmp_path / "run")}
    assert lines["round-1/samples"].state == "running"
    assert lines["round-1/samples"].rows == "30/60 rows (50 %)"
    assert "left" in lines["round-1/samples"].note
    assert lines["round-1/policy"].state == "done" and lines["round-2/gate"].state == "waiting"
    assert f"process {os.getpid()} is alive" in shown(tmp_path / "run")


def test_rate_and_time_left_count_this_attempt_only(tmp_path: Path) -> None:
    MadeRun(tmp_path / "run", until="responses").make()
    [folder] = (tmp_path / "run/stages/responses").iterdir()
    started = time.time()
    os.utime(folder / "part-000000.parquet", (started - 900, started - 900))  # 30 rows of an earlier attempt
    at = {"done": 40, "total": 60, "unit": "rows", "at": started + 5, "pid": os.getpid()}
    (folder / "progress.json").write_text(json.dumps(at))
    os.utime(tmp_path / "run/run.json", (started, started))
    line = status.stage_lines(tmp_path / "run")[1]
    assert line.note == "2.0/s, about 10 s left"


def test_a_dead_driver_means_cut_off(tmp_path: Path) -> None:
    MadeRun(tmp_path / "run", until="round-1/samples").make()
    set_driver(tmp_path / "run", pid := ended_process())
    text = shown(tmp_path / "run")
    assert f"process {pid} is not alive" in text
    assert "round-1/samples was cut off; run the same command again" in text
    assert "running" not in text


def test_a_younger_process_with_the_same_number_is_not_the_driver(tmp_path: Path) -> None:
    MadeRun(tmp_path / "run", until="responses").make()
    os.utime(tmp_path / "run/run.json", (1_000_000, 1_000_000))  # long before this process began
    assert status.driver(tmp_path / "run") == (os.getpid(), False)


def test_early_stop_by_the_gate_leaves_nothing_waiting(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run", rounds=1)
    made.config["loop"]["rounds"] = 3  # type: ignore[index]
    made.make()
    assert {line.state for line in status.stage_lines(tmp_path / "run")} == {"done"}


def test_report_is_named_once_it_is_there(tmp_path: Path) -> None:
    MadeRun(tmp_path / "run", until="responses").make()
    assert "Report: none yet" in shown(tmp_path / "run")
    (tmp_path / "run/report.html").write_text("")
    assert f"Report: {tmp_path / 'run' / 'report.html'}" in shown(tmp_path / "run")


def test_markup_in_a_name_is_text(tmp_path: Path) -> None:
    MadeRun(tmp_path / "[red]run", until="responses").make()
    assert "[red]run" in shown(tmp_path / "[red]run")


def test_no_run_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(PsyrayError, match="no run at"):
        shown(tmp_path / "none")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (12, "12 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (None, in_words.DASH)],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert in_words.duration(seconds) == text


def test_missing_numbers_are_dashes() -> None:
    nothing = [in_words.number(None), in_words.share(None), in_words.change(None), in_words.number(float("nan"))]
    assert nothing == [in_words.DASH] * 4
    assert (in_words.number(1234), in_words.share(0.0), in_words.change(-0.031)) == ("1,234", "0.0 %", "-3.1 %")
    for name in [*in_words.KEY_NUMBERS, "round-0/gate", "round-1/gate", "something else"]:
        assert isinstance(in_words.key_numbers(name, {}), str)


def test_a_round_that_waits_for_nobody_is_told_with_its_mend_and_no_ledger_is_made_by_looking(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run", until="round-1/labels")
    made.config |= {"oracle": {"kind": "experts"}, "judge": {}}
    made.make()
    assert "Experts:" not in shown(tmp_path / "run") and not (tmp_path / "labels.db").exists()
    ledger = Ledger(f"sqlite:///{tmp_path}/labels.db")
    question = Question("q0", "comparison", "experts", "r", {"messages": [], "a": "x", "b": "y"})
    queue = ExpertQueue(ledger.database)
    queue.open(ledger.reserve(str(tmp_path / "run"), "round-1", [question], None).to_ask, 2)
    queue.lease("anna")
    queue.answer("anna", "q0", Choice.TIE)
    assert (
        "Experts: 1 open questions lack answers; 1 wait for nobody (q0): anna had them, and 1 answers are lacking. "
        "Give another expert a key, or stop and run the same command with oracle.wait_s and oracle.fall_back"
    ) in shown(tmp_path / "run")
    ledger.close()
    (tmp_path / "labels.db").write_text("no database " * 100)
    assert "Experts: the label ledger at " in shown(tmp_path / "run")  # and the rest is there as ever

"""The online loop with people: killed while it waits, gone on by itself, and past its time in a second round.

Two made-up experts answer over the experts' real HTTP API, while the run is another process.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from threaded import running

from psyray.active.ledger import Ledger
from psyray.run import read_stages
from serve.annotate import Args, http_app, open_desk

ROOT = Path(__file__).parents[2]
TOKENS = {"anna": "anna-has-a-long-token", "ben": "ben-has-another-token"}
LIMIT_S = 240
WAITS = "questions wait for 2 experts each"
TRAIN = json.dumps({"learning_rate": 1e-3, "batch_size": 2, "micro_batch": 2, "max_length": 256})


def settings(model: Path, reward: Path, home: Path, address: str) -> list[str]:
    responders = [{"name": "a", "model": str(model), "max_tokens": 16}]
    return [
        f"run.path={home}/run", f"cluster.address={address}", "speeches.limit=16", "speeches.test_share=0.4",
        "responses.k=2", f"responses.responders={json.dumps(responders)}", "pairs.gap=0.01",
        f"reward.model={reward}", f"reward.train={TRAIN}", f"policy.model={model}", f"dpo.train={TRAIN}",
        "loop.rounds=2", "loop.prompts=5", "loop.k=2", "loop.budget=3", "loop.reward_margin=0.0",
        "evaluate.probe=null", "evaluate.min_win_rate=0.0", "evaluate.max_length_change=9",
        "evaluate.max_truncated_rise=1",
        "oracle.kind=experts", "oracle.overlap=2", "oracle.undo_s=0", "oracle.fall_back=judge",
    ]  # fmt: skip


class Driver:
    """The run in a process of its own, and what it says."""

    def __init__(self, words: list[str], log: Path) -> None:
        self.log, self.begins = log, log.stat().st_size if log.exists() else 0
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "tests/integration/waiting_run.py", "run", "configs/demo.yaml", *words]
        with log.open("ab") as out:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)

    def said(self) -> str:
        return self.log.read_text()[self.begins :]

    def until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not holds():
            assert self.process.poll() is None and time.monotonic() < deadline, self.said()[-3000:]
            time.sleep(0.05)

    def ends(self, how: int | None = None) -> int:
        """Its exit code, after the signal if one is given."""
        if how is not None:
            self.process.send_signal(how)
        return self.process.wait(LIMIT_S)


class People:
    """Two experts who ask the server for questions as long as they may, each with at most so many answers."""

    def __init__(self, url: str) -> None:
        self.url, self.may, self.given = url, dict.fromkeys(TOKENS, 0), dict.fromkeys(TOKENS, 0)
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self.work, args=(name,)) for name in TOKENS]
        for thread in self.threads:
            thread.start()

    def work(self, name: str) -> None:
        with httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {TOKENS[name]}"}) as client:
            while not self.stop.wait(0.05):
                if self.given[name] >= self.may[name]:
                    continue
                reply = client.get("/experts/next", timeout=60)
                if reply.raise_for_status().status_code == 204:
                    continue
                shown = reply.json()
                # Whichever side shows the text that takes the client up, which is the longer one.
                choice = "left" if len(shown["left"]) > len(shown["right"]) else "right"
                answer = {"question_id": shown["question_id"], "choice": choice}
                client.post("/experts/answer", json=answer, timeout=60).raise_for_status()
                self.given[name] += 1

    def more(self, each: int) -> None:
        """Let each give so many answers more."""
        self.may = {name: self.given[name] + each for name in self.may}

    def leave(self) -> None:
        """Let them go home."""
        self.stop.set()
        for thread in self.threads:
            thread.join(30)

    def done(self) -> bool:
        assert all(thread.is_alive() for thread in self.threads)
        return self.given == self.may


@pytest.fixture
def people(tmp_path: Path) -> Iterator[Callable[[], People]]:
    """Opens the experts' server on the run's folder, as `serve run serve.annotate:build run=RUN keys=FILE` does."""
    with ExitStack() as stack:

        def open_server() -> People:
            keys = tmp_path / "keys"
            keys.write_text("".join(f"{name} annotate {token}\n" for name, token in TOKENS.items()))
            words = {"run": str(tmp_path / "run"), "keys": str(keys), "per_minute": "100000"}
            crowd = People(stack.enter_context(running(http_app(open_desk(Args.read(words))))))
            stack.callback(crowd.leave)
            return crowd

        yield open_server


@pytest.fixture(scope="module")
def reward_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a random reward head."""
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path_factory.mktemp("reward") / "model"
    shutil.copytree(tiny_model, folder)
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1).save_pretrained(folder)
    return folder


def test_a_loop_waits_for_people_through_a_kill_and_goes_on_without_them_when_time_is_over(
    tiny_model: Path, reward_model: Path, tmp_path: Path, ray_cluster: None, people: Callable[[], People]
) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    words, log = settings(tiny_model, reward_model, tmp_path, address), tmp_path / "log"
    first = Driver(words, log)
    first.until(lambda: f"3 {WAITS}, until they are answered" in first.said())
    crowd = people()
    crowd.more(1)
    first.until(crowd.done)
    first.ends(signal.SIGKILL)
    crowd.more(1)  # nobody waits, and the page goes on
    deadline = time.monotonic() + LIMIT_S
    while not crowd.done():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    ledger = Ledger(f"sqlite:///{tmp_path}/labels.db")
    assert ledger.spent(f"{tmp_path}/run")["round-1"] == 3

    second = Driver(words, log)
    second.until(lambda: WAITS in second.said())
    assert "done before" in second.said() and "round-1/labels: done, " not in second.said()
    crowd.more(2)  # the rest of round 1, and one question of round 2: the loop goes on by itself
    second.until(crowd.done)
    assert "round-1/labels: done, " in second.said() and second.said().count(WAITS) == 2
    assert second.ends(signal.SIGINT) == 130 and "nothing is lost" in second.said()

    third = Driver([*words, "oracle.wait_s=0"], log)
    assert third.ends() == 0, third.said()[-3000:]
    assert "round-2: 2 of 3 questions go by oracle.fall_back judge" in third.said()

    stages = {stage.name: stage for stage in read_stages(tmp_path / "run")}
    one, two = (stages[f"round-{number}/labels"].stats for number in (1, 2))
    assert (one["bought"], one["answered"], one["unanswered"]) == (3, 3, 0)
    assert (two["bought"], two["answered"], two["unanswered"]) == (3, 1, 2)
    assert [row["source"] for row in stages["round-1/labels"].rows()].count("oracle") == 3
    spent = {row["purpose"]: row for row in ledger.summary(f"{tmp_path}/run")}
    assert (spent["round-2/judge"]["bought"], spent["round-2/judge"]["answered"]) == (2, 2)
    assert spent["round-1"]["bought"] == spent["round-2"]["bought"] == 3  # none was paid for twice
    assert all(row["open"] == 0 for row in spent.values()) and "export" in stages
    assert crowd.given == {"anna": 4, "ben": 4}
    ledger.close()

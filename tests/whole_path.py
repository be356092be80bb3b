"""The whole path through the command, undisturbed or killed at three moments; for tests only.

A program of its own, so that both are under way while other tests run:

    whole_path.py (undisturbed | killed) MODEL HOME    leaves the run in HOME/demo, or fails with what the command said
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
LIMIT_S = 1500


def settings(model: Path, home: Path) -> list[str]:
    responders = [
        {"name": name, "model": str(model), "max_tokens": 16, "temperature": t} for name, t in (("a", 1.3), ("b", 1.6))
    ]
    train = {"learning_rate": 1e-3, "batch_size": 2, "micro_batch": 2, "max_length": 512, "save_every": 2, "epochs": 2}
    return [
        f"run.path={home}/demo", "speeches.limit=24", "speeches.test_share=0.4",
        "engine.max_num_seqs=8", "engine.kv_cache_gib=1", "engine.max_model_len=768",
        "responses.k=2", f"responses.responders={json.dumps(responders)}", "pairs.gap=0.01",
        f"reward.model={model}", f"reward.train={json.dumps(train)}", f"policy.model={model}", "policy.max_tokens=16",
        # Hot, so that the random model does not say nothing but line breaks: an empty answer is not judged.
        "policy.temperature=1.5", "policy.stop=[]",
        f"dpo.train={json.dumps(train)}", "loop.rounds=1", "loop.prompts=8", "loop.k=3", "loop.budget=4",
        "loop.reward_margin=0.0", "loop.replay=2",
        # A random model gets no better: the gate is held open so that the path goes on.
        "evaluate.min_win_rate=0.0", "evaluate.max_length_change=9", "evaluate.max_repeat_rise=1",
        "evaluate.max_truncated_rise=1",
        "evaluate.max_perplexity_rise=1e9", "evaluate.max_capability_drop=1", "evaluate.probe_answers=4",
    ]  # fmt: skip


class Driver:
    """The command in a process of its own; what it says is added to the log."""

    def __init__(self, model: Path, home: Path, log: Path) -> None:
        self.home, self.log = home, log
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        command = [sys.executable, "-m", "psyray.cli", "run", "configs/demo.yaml", *settings(model, home)]
        with log.open("ab") as out:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait until the condition holds, while it is at work."""
        deadline = time.monotonic() + LIMIT_S
        while not holds():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.05)

    def ends(self) -> None:
        """Wait until it has ended well."""
        assert self.process.wait(LIMIT_S) == 0, self.log.read_text()[-3000:]

    def dies_when(self, pattern: str) -> None:
        """Kill it once a file of a stage is there."""
        self.until(lambda: self.stage_file(pattern))
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stage_file(self, pattern: str) -> bool:
        return bool(list((self.home / "demo" / "stages").glob(pattern)))

    def engine(self) -> psutil.Process | None:
        """The Ray worker that holds its vLLM engine."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if "vLLMEngineStage" in " ".join(child.cmdline()):
                    return child
            except psutil.Error:  # it ended while it was looked at
                continue
        return None


def undisturbed(model: Path, home: Path) -> None:
    """A run, its ledger as it left it, and the same command again with a log of its own."""
    Driver(model, home, home / "log").ends()
    shutil.copy(home / "labels.db", home / "labels-before.db")
    Driver(model, home, home / "again").ends()


def killed(model: Path, home: Path) -> None:
    """A run whose driver is killed twice and whose engine once, each with SIGKILL."""
    log = home / "log"
    Driver(model, home, log).dies_when("responses/*/part-*.parquet")
    driver = Driver(model, home, log)
    driver.until(lambda: driver.stage_file("round-0/samples/*") and driver.engine() is not None)
    engine = driver.engine()
    assert engine is not None
    engine.kill()
    driver.dies_when("round-1/policy/*/steps.jsonl")
    Driver(model, home, log).ends()


if __name__ == "__main__":
    {"undisturbed": undisturbed, "killed": killed}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))

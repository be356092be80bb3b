"""The loop's stages with stand-ins for engine, trainer and judges: what a longer, shorter or failed run makes again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from made_stage import made_stage

from psyray import loop
from psyray.config import Config, load_config
from psyray.data import generate
from psyray.errors import PsyrayError
from psyray.records import PAIRS, RESPONSES, SPEECHES, Row, pair_row
from psyray.run import Artifact, Folder, Run

MADE = ["speeches", "reward", "reward-heads"]


class StandIns:
    """A loop over twenty made-up speeches; `rates` holds each round's win rate, negative where its gate fails."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, rates: list[float]) -> None:
        self.path, self.rates, self.said = path, rates, list[str]()
        self.drawn: dict[str, list[str]] = {}
        self.trained: list[tuple[str, ...]] = []  # (from, reference) of each round, as round-N or start
        for name in ("answer_all", "train_policy", "features_stage", "heads_stage", "scores_stage", "labels_stage"):
            monkeypatch.setattr(loop, name, getattr(self, f"made_{name}"))
        monkeypatch.setattr(loop, "gate_stage", self.made_gate_stage)
        monkeypatch.setattr(loop, "probe_stage", lambda *_: None)
        monkeypatch.setattr(loop, "that_fit", lambda pairs, *_: pairs)

    def run(self, *settings: str) -> tuple[loop.Outcome, list[str]]:
        """The outcome, and the stages that were made in this pass."""
        model = self.path / "model"
        if not model.exists():
            model.mkdir()
            (model / "config.json").write_text("{}")
        words = [f"run.path={self.path}/run", f"policy.model={model}", "loop.prompts=5", "loop.k=2", *settings]
        config, self.said = load_config(None, words), []
        run = Run(config.run.path, self.said.append)
        sides, chat = {True: "test", False: "train"}, [{"role": "user", "content": "I cannot sleep."}]
        said = [{"speech_id": f"s{n:02d}", "messages": chat, "split": sides[n % 4 == 0]} for n in range(20)]
        speeches = made_stage(run, "speeches", SPEECHES, "speech_id", said)
        reward, heads = (run.stage(name, {}, [speeches], lambda folder: {}) for name in ("reward", "reward-heads"))
        outcome = loop.online_loop(run, config, None, speeches, reward, heads, loop.Seen((), ()))  # type: ignore[arg-type]
        made = [line.partition(":")[0] for line in self.said if ": done, " in line]
        return outcome, [name for name in made if name not in MADE]

    def made_answer_all(self, folder: Folder, draws: Any, count: int, config: Config, **_: Any) -> Any:
        rows = [row | {"status": "ok", "text": row["response_id"]} for row in draws()]
        self.drawn[str(folder.path.relative_to(self.path / "run/stages").parent)] = [r["response_id"] for r in rows]
        folder.keep(RESPONSES, "response_id", rows)
        return {"asked": len(rows), "of": count}

    def made_train_policy(self, folder: Folder, config: Config, pairs: list[Row], *paths: str, title: str) -> Any:
        self.trained.append(tuple(next((part for part in Path(p).parts if "round-" in part), "start") for p in paths))
        return [{"step": 1, "loss": float(len(pairs))}]

    def made_features_stage(self, run: Run, name: str, config: Config, reward: Any, rows: Any, source: Any) -> Artifact:
        return run.stage(name, {"of": sorted(r["response_id"] for r in rows)}, [reward, source], lambda folder: {})

    def made_heads_stage(self, run: Run, name: str, config: Config, reward: Any, features: Any, pairs: Any) -> Artifact:
        return run.stage(name, {}, [reward, *features, *pairs], lambda folder: {})

    def made_scores_stage(self, run: Run, name: str, *inputs: Artifact) -> Artifact:
        return run.stage(name, {}, inputs, lambda folder: {})

    def made_labels_stage(
        self, run: Run, number: int, config: Config, desk: Any, heads: Any, features: Any, samples: Artifact,
        earlier: list[tuple[Artifact, Artifact]],
    ) -> Artifact:  # fmt: skip
        answers = [row for row in samples.rows() if row["split"] == "train"]
        two = {row["speech_id"]: row for row in answers}
        pairs = [
            pair_row(a, a, two[a["speech_id"]], margin=1, source="oracle")
            for a in answers if a is not two[a["speech_id"]]
        ]  # fmt: skip
        return made_stage(
            run, f"round-{number}/labels", PAIRS, "pair_id", pairs,
            settings={"budget": config.loop.budget_of(number)}, inputs=[heads, features, samples],
        )  # fmt: skip

    def made_gate_stage(
        self, run: Run, number: int, config: Config, desk: Any, samples: Artifact, scores: Artifact, *more: Any
    ) -> Artifact:
        rate = self.rates[number] if number else 0.5
        stats = {"passed": rate > 0, "win_rate": abs(rate), "reasons": ["made to fail"]}
        return run.stage(f"round-{number}/gate", {}, [samples, scores], lambda folder: stats)


def of_round(number: int, *, again: bool = False) -> list[str]:
    steps = ("labels", "heads", "policy", "samples", "features", "scores", "gate")
    before = [f"round-{number - 1}/samples-again", f"round-{number - 1}/features-again"] if again else []
    return before + [f"round-{number}/{step}" for step in steps]


def of_start() -> list[str]:
    return [f"round-0/{step}" for step in ("samples", "features", "scores", "gate")]


def test_two_more_rounds_of_a_finished_run_make_only_themselves(tmp_path, monkeypatch):
    made = StandIns(tmp_path, monkeypatch, [0, 0.6, 0.7, 0.8, 0.9])
    first, stages = made.run("loop.rounds=2")
    assert stages == of_start() + of_round(1) + of_round(2)
    longer, stages = made.run("loop.rounds=4")
    assert stages == of_round(3, again=True) + of_round(4)
    assert longer.policies[:3] == first.policies and longer.champion(load_config(None, []).loop).round == 4
    # What the third round starts from is what an undisturbed run of four rounds would have drawn.
    fresh = StandIns(tmp_path / "fresh", monkeypatch, [0, 0.6, 0.7, 0.8, 0.9])
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh/model").symlink_to(tmp_path / "model")
    _, stages = fresh.run("loop.rounds=4")
    assert stages == of_start() + of_round(1) + of_round(2) + of_round(3) + of_round(4)
    joint = len(fresh.drawn["round-2/samples"])
    assert joint == len(made.drawn["round-2/samples"]) + len(made.drawn["round-2/samples-again"]) == 5 + 2 * 5


def test_the_same_again_and_a_shorter_run_make_nothing(tmp_path, monkeypatch):
    made = StandIns(tmp_path, monkeypatch, [0, 0.6, 0.7, 0.8])
    made.run("loop.rounds=1")
    made.run("loop.rounds=3")
    for rounds in (3, 2, 1, 0):
        outcome, stages = made.run(f"loop.rounds={rounds}")
        assert stages == [] and len(outcome.gates) == rounds + 1


def test_a_failed_round_is_kept_and_the_next_starts_from_the_last_good_policy(tmp_path, monkeypatch):
    made = StandIns(tmp_path, monkeypatch, [0, 0.6, -0.4, 0.7])
    outcome, stages = made.run("loop.rounds=3")
    assert stages == of_start() + of_round(1) + of_round(2) + of_round(3, again=True)
    assert any("going on from round 1" in line for line in made.said)
    [again] = (tmp_path / "run/stages/round-2/samples-again").glob("*/data-*.parquet")
    assert set(pq.read_table(again)["responder"].to_pylist()) == {"policy-1"}
    assert [p.round for p in outcome.policies] == [0, 1, 2, 3]


@pytest.mark.parametrize(("reference", "later"), [("initial", "start"), ("previous", "round-1")])
def test_a_round_is_held_to_the_start_or_to_the_policy_that_it_goes_on_from(tmp_path, monkeypatch, reference, later):
    made = StandIns(tmp_path, monkeypatch, [0, 0.6, -0.4, 0.7])
    made.run("loop.rounds=3", f"loop.reference={reference}")
    assert made.trained == [("start", "start"), ("round-1", later), ("round-1", later)]  # the second round failed


def test_more_rounds_and_more_budget_after_a_failed_last_round_go_on_from_the_last_good_policy(tmp_path, monkeypatch):
    made = StandIns(tmp_path, monkeypatch, [0, 0.6, -0.4, 0.7])
    made.run("loop.rounds=2", "loop.budget=16")
    outcome, stages = made.run("loop.rounds=3", "loop.budget=[16, 16, 40]")
    assert stages == of_round(3, again=True) and made.trained[-1] == ("round-1", "start")
    assert outcome.champion(load_config(None, []).loop).round == 3


@pytest.mark.parametrize("silent", ["policy", "model"])  # what a round trained, the start
def test_a_trained_policy_that_says_nothing_is_refused_by_its_gate_and_stops_no_run(tmp_path, monkeypatch, silent):
    def made_stream(folder: Folder, todo: Any, pipeline: Any, sink: Any, **_: Any) -> None:
        mute = f"/{silent}" in pipeline.keywords["model"].removeprefix(str(tmp_path))
        sink([row | {"text": "" if mute else row["key"], "tokens": 1} for row in todo])

    made = StandIns(tmp_path, monkeypatch, [0, -0.1, -0.1])
    monkeypatch.setattr(loop, "answer_all", generate.answer_all)
    monkeypatch.setattr(generate, "stream", made_stream)
    if silent == "model":
        with pytest.raises(PsyrayError, match=r"samples of round 0: 15 of 15 responses failed .*: empty answer"):
            made.run("loop.rounds=2")
        return
    outcome, stages = made.run("loop.rounds=2")
    assert stages == of_start() + of_round(1) + of_round(2, again=True)
    [samples] = (tmp_path / "run/stages/round-1/samples").glob("*/data-*.parquet")
    assert set(pq.read_table(samples)["status"].to_pylist()) == {"invalid"}
    assert outcome.champion(load_config(None, []).loop).round == 0


def test_more_budget_from_the_third_round_on_leaves_the_first_two_alone(tmp_path, monkeypatch):
    made = StandIns(tmp_path, monkeypatch, [0, 0.6, 0.7, 0.8])
    made.run("loop.rounds=2", "loop.budget=16")
    _, stages = made.run("loop.rounds=3", "loop.budget=[16, 16, 40]")
    assert stages == of_round(3, again=True)
    _, stages = made.run("loop.rounds=2", "loop.budget=40")
    assert stages == of_round(1) + of_round(2)  # a larger budget for all of them labels and trains anew


def test_patience_ends_the_loop_and_the_best_round_is_exported(tmp_path, monkeypatch):
    made = StandIns(tmp_path, monkeypatch, [0, 0.7, 0.6, 0.65, 0.9])
    outcome, _ = made.run("loop.rounds=4", "loop.patience=2")
    assert len(outcome.gates) == 4 and any("the loop ends after round 3" in line for line in made.said)
    assert outcome.champion(load_config(None, ["loop.champion=best"]).loop).round == 1
    assert outcome.champion(load_config(None, []).loop).round == 3

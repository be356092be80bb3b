"""Checkpoints chosen on dev under DeepSpeed: what one worker keeps, two keep as well, also where they were cut off."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_reward import save_scored
from transformers import AutoModelForCausalLM

from psyray.looks import read_choice
from psyray.policy import dpo
from psyray.reward.groups import group_example
from psyray.reward.score import RewardScorer
from psyray.reward.train import make_trainer, measure, train_loop
from psyray.run import Folder
from psyray.sections.data import EngineSection
from psyray.sections.learning import DpoSection, TrainSection
from psyray.sections.place import ClusterSection
from psyray.train import fit_and_save, prepare_worker, run_training, trainer_arguments

GOOD, BAD = "You feel worn out and you wonder when it will end.", "Just sleep more and stop thinking."


def pairs(count: int, chosen: str, rejected: str, word: str) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"I keep losing {word} over number {i}."}], "chosen": chosen,
         "rejected": rejected, "margin": 1.0}
        for i in range(count)
    ]  # fmt: skip


# Of dev a part is labelled as training is, the larger part the other way round: it falls, and then rises.
TRAINED = pairs(24, GOOD, BAD, "sleep")
DEV = pairs(3, BAD, GOOD, "hair") + pairs(2, GOOD, BAD, "weight")
TRAIN = {"learning_rate": 2e-3, "batch_size": 8, "micro_batch": 4, "epochs": 4, "max_length": 128, "save_every": 3}
LOOKS = {"share": 0.2, "every": 2, "patience": 3}


def cut_off_once() -> Any:
    """The worker's loop that dies at step 5, past the looks at 2 and 4 and the checkpoint at 3."""

    def loop(config: dict[str, Any]) -> None:
        from transformers import TrainerCallback

        cut = Path(config["folder"]) / "cut"

        class Cut(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == 5 and not cut.exists():
                    if state.is_world_process_zero:
                        cut.touch()
                    raise RuntimeError("cut off")

        prepare_worker(config)
        trainer = make_trainer(config, trainer_arguments(config))
        trainer.add_callback(Cut())
        fit_and_save(trainer, config, measure)

    return loop


def rewarded(path: Path, model: Path, loop: Any = train_loop, **train: Any) -> tuple[list[dict[str, float]], Any]:
    """The steps of a reward model's job, and what it kept."""
    path.mkdir()
    steps = run_training(
        Folder(path), loop, [group_example([pair], use_margin=False) for pair in TRAINED],
        {"model": str(model), "smoothing": 0.0, "center": 0.01, "seed": 0}, TrainSection(**(TRAIN | train)),
        EngineSection(), ClusterSection(), title="reward model",
        dev=[group_example([pair], use_margin=False) for pair in DEV],
    )  # fmt: skip
    return steps, read_choice(path).get("dev")


def dev_loss(model: Path) -> float:
    scorer, chats = RewardScorer(model), [pair["messages"] for pair in DEV]
    chosen, rejected = (scorer.scores(chats, [pair[side] for pair in DEV]) for side in ("chosen", "rejected"))
    return float(np.logaddexp(0, rejected - chosen).mean())


@pytest.fixture(scope="module")
def start(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("start") / "model"
    save_scored(tiny_model, path)
    return path


def test_workers_that_were_cut_off_keep_what_one_keeps_and_stop_where_it_stops(tmp_path, start, ray_cluster):
    alone, kept = rewarded(tmp_path / "alone", start, dev=LOOKS)
    steps = [step["step"] for step in alone]
    looked = {step["step"]: step["dev_loss"] for step in alone if "dev_loss" in step}
    assert steps == list(range(1, kept["taken"] + 1)) and kept["planned"] == 12 > kept["taken"]
    assert list(looked) == steps[1::2] and kept["kept"] == min(looked, key=looked.get)
    assert kept["taken"] == kept["kept"] + 3 * 2 and kept["stopped"] == "no better look in 3"
    assert (kept["pairs"], kept["loss"], kept["last_loss"]) == (5, min(looked.values()), looked[kept["taken"]])
    assert kept["last_loss"] > kept["loss"] + 0.2
    assert dev_loss(tmp_path / "alone/model") == pytest.approx(kept["loss"], abs=0.02)  # not the last step's
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {
        "model", "examples.parquet", "dev.parquet", "steps.jsonl", "choice.json", "progress.json",
    }  # fmt: skip

    for stage in (1, 3):
        two = tmp_path / f"two-{stage}"
        shared, same = rewarded(two, start, cut_off_once(), dev=LOOKS, workers=2, micro_batch=2, zero_stage=stage)
        logged = [json.loads(line) for line in (two / "steps.jsonl").read_text().splitlines()]
        assert (two / "cut").exists() and [entry["step"] for entry in logged if "loss" in entry].count(4) == 2
        assert [entry["step"] for entry in logged if "dev_loss" in entry][:3] == [2, 4, 4]  # from checkpoint 3
        assert {key: same[key] for key in ("kept", "taken", "pairs", "stopped", "looks", "accuracy")} == {
            key: kept[key] for key in ("kept", "taken", "pairs", "stopped", "looks", "accuracy")
        }
        found = {step["step"]: step["dev_loss"] for step in shared if "dev_loss" in step}
        assert found == pytest.approx(looked, abs=0.02)
        assert dev_loss(two / "model") == pytest.approx(kept["loss"], abs=0.02)


def test_a_policys_adapter_is_that_of_the_best_look(tmp_path, tiny_model, ray_cluster):
    """The last step is the best here; one pair of five is read by both workers and counted once."""
    path = tmp_path / "policy"
    path.mkdir()
    train = TRAIN | {"learning_rate": 2e-2, "dev": {"share": 0.2, "every": 4}, "lora": {"rank": 4, "alpha": 8}}
    train |= {"workers": 2, "micro_batch": 2, "zero_stage": 3, "epochs": 2}
    section = DpoSection(train=train)
    steps = run_training(
        Folder(path), dpo.train_loop, [dpo.example(pair, "", {}) for pair in TRAINED],
        {"model": str(tiny_model), "reference": str(tiny_model), "loss": dpo.loss_arguments(section), "seed": 0},
        section.train, EngineSection(), ClusterSection(), title="policy",
        dev=[dpo.example(pair, "", {}) for pair in pairs(5, GOOD, BAD, "hair")],
    )  # fmt: skip
    kept = read_choice(path)["dev"]
    assert [step["step"] for step in steps if "dev_loss" in step] == [4, 6]
    assert (kept["kept"], kept["taken"], kept["pairs"], kept["stopped"]) == (6, 6, 5, "all steps were taken")
    assert kept["accuracy"] == 1 and kept["loss"] < math.log(2) < steps[0]["loss"]
    AutoModelForCausalLM.from_pretrained(path / "model")
    assert (path / "adapter/adapter_model.safetensors").exists() and not (path / "kept").exists()

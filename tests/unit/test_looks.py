"""Looks at dev: which step is kept, who reads which pair, what a job that goes on remembers, what stays as it was."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from made_stage import made_stage
from made_trainers import LORA, PAIRS, dpo_trainer, reward_trainer
from torch.nn.functional import logsigmoid
from transformers import TrainerCallback

from psyray import in_words, loop, plan, track
from psyray.config import load_config
from psyray.errors import PsyrayError
from psyray.looks import (
    CHOICE,
    KEPT,
    Look,
    Watch,
    aside,
    best,
    check_parts,
    in_vain,
    look_at,
    portions,
    read_choice,
)
from psyray.policy import dpo
from psyray.records import PAIRS as RECORDS
from psyray.records import Row, in_share, pair_row, speech_id
from psyray.reward import train as reward
from psyray.reward.groups import group_example
from psyray.run import Artifact, Folder, Run
from psyray.sections.learning import DevSection, TrainSection
from psyray.train import log_step, read_steps, write_examples


def looks(*losses: float) -> list[Look]:
    return [Look(10 * (n + 1), loss, 0.5, 4) for n, loss in enumerate(losses)]


def test_the_first_of_the_least_loss_is_the_best_and_patience_counts_from_it() -> None:
    assert best(looks(0.7, 0.5, 0.6, 0.5)).step == 20 and in_vain(looks(0.7, 0.5, 0.6, 0.5)) == 2
    assert best(looks(math.nan, 0.9, math.nan)).step == 20
    assert in_vain(looks(0.7, 0.6)) == in_vain(looks(0.7)) == in_vain([]) == 0


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 7, 12, 13])
def test_every_pair_is_counted_once_and_all_workers_read_batches_of_the_same_sizes(workers: int, count: int) -> None:
    read = [list(portions(count, workers, rank, 2)) for rank in range(workers)]
    counted = [place for batches in read for places, counts in batches if counts for place in places]
    assert sorted(counted) == list(range(count))
    assert len({tuple(len(places) for places, _ in batches) for batches in read}) == 1
    assert max(len(places) for places, _ in read[0]) <= 2


def lengths(n: int) -> list[Row]:
    """A conversation as a set of speeches: after the client's first words and after the second."""
    first, more = ({"role": "user", "content": f"{words} {n}"} for words in ("It began with", "And then came"))
    talks = [[first], [first, {"role": "assistant", "content": "Go on."}, more]]
    return [{"speech_id": speech_id(talk), "messages": talk} for talk in talks]


def test_whole_conversations_are_put_aside_the_same_ones_in_every_job() -> None:
    talks = [lengths(n) for n in range(400)]
    some, more = ({n for n, (row, _) in enumerate(talks) if aside(row, DevSection(share=s), 10)} for s in (0.2, 0.4))
    assert 50 < len(some) < 110 and some < more
    assert some == {n for n, (_, longer) in enumerate(talks) if aside(longer, DevSection(share=0.2), 10)}
    assert some == {n for n, (row, _) in enumerate(talks) if in_share(0.2, "training dev", row["speech_id"])}
    assert not any(aside(row, None, 10) for row, _ in talks)


def test_a_share_that_leaves_no_dev_or_no_training_names_the_setting() -> None:
    for measured in (0, 8):
        with pytest.raises(PsyrayError, match=rf"reward\.train\.dev\.share 0\.3 puts {measured} of 8 training pairs"):
            check_parts("reward.train.dev", DevSection(share=0.3), measured, 8)
    check_parts("reward.train.dev", DevSection(share=0.3), 1, 8)
    check_parts("reward.train.dev", None, 0, 8)


def with_dev(path: Path, examples: list[dict[str, Any]]) -> dict[str, Any]:
    write_examples(path / "dev.parquet", examples)
    return {"dev": str(path / "dev.parquet")}


DEV = [pair | {"messages": [{"role": "user", "content": f"Number {n}."}]} for n, pair in enumerate(PAIRS * 2)][:5]


def test_a_look_at_a_reward_model_is_its_log_loss_over_all_pairs(tmp_path: Path, tiny_model: Path) -> None:
    groups = [group_example(DEV[:2], False), *(group_example([pair], False) for pair in DEV[2:])]
    trainer = reward_trainer(tmp_path, tiny_model, None, **with_dev(tmp_path, groups))
    torch.manual_seed(0)
    torch.nn.init.normal_(trainer.model.score.weight, std=0.3)
    look = look_at(trainer, reward.measure, 3)
    trainer.model.eval()
    gaps = []
    with torch.no_grad():
        for group in groups:
            read = trainer.data_collator([group])
            scores = trainer.model(input_ids=read["input_ids"], attention_mask=read["attention_mask"]).logits.float()
            gaps += (scores[read["chosen"]] - scores[read["rejected"]]).flatten().tolist()
    expected = -logsigmoid(torch.tensor(gaps)).mean().item()
    assert (look.step, look.pairs) == (3, len(gaps)) and abs(expected - math.log(2)) > 0.02
    assert look.loss == pytest.approx(expected, abs=0.02)  # bfloat16, padded otherwise
    assert look.accuracy == pytest.approx(sum((g > 0) + 0.5 * (g == 0) for g in gaps) / len(gaps))


def test_a_look_at_a_policy_is_the_mean_of_each_pairs_loss_and_leaves_its_training_as_it_was(
    tmp_path: Path, tiny_model: Path
) -> None:
    examples = with_dev(tmp_path, [dpo.example(pair | {"rejected_truncated": True}, "", {}) for pair in DEV])
    trainer = dpo_trainer(
        tmp_path, tiny_model, tiny_model, LORA, examples, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.1]
    )
    closing = dpo.closing(trainer.processing_class)
    assert all(row["rejected_ids"][-len(closing) :] != closing for row in trainer.eval_dataset)
    trainer.train()
    trainer.model.train()
    look = look_at(trainer, dpo.measure, 1)
    assert trainer.model.training and not trainer._metrics["eval"] and not trainer._metrics["train"]
    alone = []
    with torch.no_grad():
        for row in trainer.eval_dataset:
            alone.append(trainer.compute_loss(trainer.model, trainer.data_collator([row])).item())
    assert look.loss == pytest.approx(sum(alone) / 5, abs=1e-4) and look.pairs == 5
    right = trainer._metrics["train"]["rewards/accuracies"]
    assert len(right) == 5 and look.accuracy == pytest.approx(sum(right) / 5)


def test_looking_changes_nothing_of_what_is_learnt(tmp_path: Path, tiny_model: Path) -> None:
    def losses(looks: bool) -> list[float]:
        path = tmp_path / str(looks)
        path.mkdir()
        torch.manual_seed(0)
        lora = LORA.model_copy(update={"dropout": 0.3})  # its draws are a part of the training
        examples = with_dev(path, [group_example([pair], False) for pair in DEV])
        trainer = reward_trainer(path, tiny_model, lora, **examples)
        trainer.args.num_train_epochs = 4

        class Looking(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                assert look_at(trainer, reward.measure, state.global_step).pairs == len(DEV)

        if looks:
            trainer.add_callback(Looking())
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    plain = losses(looks=False)
    assert len(set(plain)) == 4 and losses(looks=True) == plain


class Saving:
    """A trainer that saves the step that it is at; its dev losses are given."""

    eval_dataset = (1,)

    def __init__(self) -> None:
        self.step = 0

    def save_model(self, path: str) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / "weights").write_text(str(self.step))

    def is_world_process_zero(self) -> bool:
        return True


def watched(monkeypatch: pytest.MonkeyPatch, folder: Path, losses: list[float], start: Path | None = None) -> Watch:
    def look(trainer: Saving, measure: Any, step: int) -> Look:
        trainer.step = step
        return Look(step, losses[step // 2 - 1], 0.5, 4)

    monkeypatch.setattr("psyray.looks.look_at", look)
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    return Watch(Saving(), lambda *_: (0, 0, 1), {"every": 2, "patience": 2}, folder, start)


def kept(folder: Path) -> set[str]:
    return {path.name for path in (folder / KEPT).glob("*")}


def test_the_best_looks_weights_stay_as_long_as_a_checkpoint_may_need_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = [0.6, 0.7, 0.5, 0.55, 0.9]
    watch = watched(monkeypatch, tmp_path, losses)
    assert [step for step in range(1, 12) if watch.due(step, 11)] == [2, 4, 6, 8, 10, 11]
    watch.look(2)
    (tmp_path / "marker").write_text(watch.marker())
    watch.saved()
    for step in (4, 6):
        watch.look(step)
    assert kept(tmp_path) == {"2", "6"}  # cut off now, it goes on from a checkpoint whose best is 2
    again = watched(monkeypatch, tmp_path, [0.6, 0.7, 0.8], tmp_path / "marker")
    again.look(4)
    assert not again.over
    again.look(6)  # this time it is not better
    assert again.over and best(again.looks).step == 2
    again.adopt(tmp_path / "out", 20)
    assert (tmp_path / "out/weights").read_text() == "2"

    whole = watched(monkeypatch, tmp_path / "whole", losses)
    for step in (2, 4, 6, 8, 10):
        assert not whole.over
        whole.look(step)
    assert whole.over and kept(tmp_path / "whole") == {"6"}
    (tmp_path / "whole/out").mkdir()
    (tmp_path / "whole/out/stale").touch()
    whole.adopt(tmp_path / "whole/out", 20)
    assert [(f.name, f.read_text()) for f in (tmp_path / "whole/out").iterdir()] == [("weights", "6")]
    dev = read_choice(tmp_path / "whole")["dev"]
    assert (dev["kept"], dev["taken"], dev["planned"], dev["loss"], dev["last_loss"]) == (6, 10, 20, 0.5, 0.9)
    assert dev["stopped"] == "no better look in 2" and kept(tmp_path / "whole") == {"6"}  # a cut here costs nothing
    whole.adopt(tmp_path / "whole/out", 10)
    assert read_choice(tmp_path / "whole")["dev"]["stopped"] == "all steps were taken"
    assert read_choice(tmp_path / "nothing") == {}


def test_a_steps_look_stands_beside_its_loss_and_goes_to_mlflow(tmp_path: Path) -> None:
    for entry in (
        {"step": 1, "loss": 0.9},
        {"step": 2, "dev_loss": 0.6, "dev_accuracy": 0.7},
        {"step": 2, "loss": 0.8},
    ):
        log_step(tmp_path, entry)
    steps = read_steps(tmp_path)
    assert steps == [{"step": 1, "loss": 0.9}, {"step": 2, "loss": 0.8, "dev_loss": 0.6, "dev_accuracy": 0.7}]
    assert ("dev_loss", 0.6, 2) in list(track.series({"steps": steps}))
    stats = {"dev": {"kept": 6, "stopped": "all steps were taken"}}
    assert list(track.numbers(stats)) == [("dev/kept", 6.0)]


def test_status_says_which_step_was_kept_and_why_it_ended(tmp_path: Path) -> None:
    dev = {"kept": 60, "taken": 80, "planned": 200, "loss": 0.4111, "accuracy": 0.71, "stopped": "no better look in 2"}
    steps = [{"step": 1, "loss": 0.7}, {"step": 60, "loss": 0.3, "dev_loss": 0.4}]
    note = "loss 0.700 → 0.300 (kept step 60 of 80, dev loss 0.411, accuracy 71.0 %; ended before step 200: "
    note += "no better look in 2)"
    assert in_words.key_numbers("reward", {"steps": steps, "dev": dev}) == note
    assert in_words.key_numbers("round-1/policy", {"steps": steps, "dev": dev, "pairs": 9}) == f"{note}, 9 pairs"
    assert "ended" not in in_words.key_numbers("reward", {"steps": steps, "dev": dev | {"planned": 80}})
    assert in_words.key_numbers("reward", {"steps": steps}) == "loss 0.700 → 0.300"
    members = [{"step": s["step"], "adapter-0": {"loss": s["loss"]}} for s in steps]
    stats = {"adapters": 1, "steps": members, "dev": {"adapter-0": dev}}
    assert in_words.key_numbers("reward-adapters", stats) == f"1 adapters, {note}"
    assert "the best step by 20% of the speeches" in plan.training(TrainSection(dev=DevSection(share=0.2)))


class Noted:
    """A run that only notes what its stages depend on."""

    noted: Any = None

    def stage(self, name: str, config: Any, inputs: Any, make: Any) -> Any:
        self.noted = config
        return Artifact(name, Path(), "0", {})


def test_without_dev_no_stage_is_named_anew(tmp_path: Path, tiny_model: Path) -> None:
    known = {
        "learning_rate", "epochs", "batch_size", "micro_batch", "max_length", "warmup_share", "freeze_layers", "lora",
        "zero_stage", "workers", "gradient_checkpointing", "save_every",
    }  # fmt: skip
    pairs = Artifact("pairs", tmp_path, "0", {})
    start = loop.Policy(0, str(tiny_model), "start")
    for words, more in ((), set()), (("reward.train.dev.share=0.2", "dpo.train.dev.every=5"), {"dev"}):
        config, run = load_config(None, [f"reward.model={tiny_model}", *words]), Noted()
        reward.reward_stage(run, config, pairs)  # type: ignore[arg-type]
        assert set(run.noted["train"]) == known | more
        loop.policy_stage(run, 1, config, pairs, loop.Seen((), ()), start, start)  # type: ignore[arg-type]
        assert set(run.noted["dpo"]["train"]) == known | more
        json.dumps(run.noted, default=str)
        assert ("dev" in config.model_dump(mode="json")["reward"]["train"]) == bool(more)


def test_a_policys_dev_pairs_are_whole_speeches_and_are_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [pair | {"speech_id": f"s{n // 2}"} for n, pair in enumerate(DEV * 8)]
    got: dict[str, Any] = {}

    def run_training(folder: Folder, loop: Any, examples: Any, *_: Any, title: str, dev: Any) -> list[Any]:
        got.update(train=list(examples), dev=list(dev))
        return []

    monkeypatch.setattr(dpo, "run_training", run_training)
    config = load_config(None, ["dpo.train.dev.share=0.3"])
    dpo.train_policy(Folder(tmp_path), config, pairs, "p", "r", title="policy")
    wanted = DevSection(share=0.3)
    given = config.policy.system, config.engine.template
    split = {part: [dpo.example(p, *given) for p in pairs if aside(p, wanted, 100) == part] for part in (True, False)}
    assert got == {"train": split[False], "dev": split[True]} and got["train"] and got["dev"]
    with pytest.raises(PsyrayError, match=r"dpo\.train\.dev\.share 0\.3 puts"):
        dpo.train_policy(Folder(tmp_path), config, pairs[:1], "p", "r", title="policy")
    dpo.train_policy(Folder(tmp_path), load_config(None), pairs[:1], "p", "r", title="policy")
    assert len(got["train"]) == 1 and not got["dev"]
    assert not (tmp_path / CHOICE).exists()


def test_the_reward_models_dev_pairs_are_not_trained_on_and_are_counted_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    responses = [
        {"response_id": f"{n}-{side}", "speech_id": f"s{n // 2}", "messages": PAIRS[0]["messages"], "split": "train",
         "text": f"{side} {n}"}
        for n in range(40) for side in ("Good", "Bad")
    ]  # fmt: skip
    rows = [
        pair_row(good, good, bad, margin=None if n == 0 else 1.0, source="data set")
        for n, (good, bad) in enumerate(zip(responses[::2], responses[1::2], strict=True))
    ]
    got: dict[str, Any] = {}

    def run_training(folder: Folder, loop: Any, examples: Any, *_: Any, title: str, dev: Any) -> list[Any]:
        got.update(train=list(examples), dev=list(dev))
        (folder.path / CHOICE).write_text(json.dumps({"kept": 4}))
        return []

    monkeypatch.setattr(reward, "run_training", run_training)
    words = [f"reward.model={tiny_model}", "reward.use_margin=true"]
    run = Run(tmp_path / "run", say=lambda line: None)
    with run.open({}):
        pairs = made_stage(run, "pairs", RECORDS, "pair_id", rows)
        made = reward.reward_stage(run, load_config(None, [*words, "reward.train.dev.share=0.3"]), pairs)
        with pytest.raises(PsyrayError, match=r"reward\.train\.dev\.share 0\.001 puts 0 of 39"):
            reward.reward_stage(run, load_config(None, [*words, "reward.train.dev.share=0.001"]), pairs)
    measured = sum(aside(row, DevSection(share=0.3), 100) for row in rows[1:])
    assert (len(got["train"]), len(got["dev"])) == (39 - measured, measured) and measured
    assert not {row["responses"][0] for row in got["train"]} & {row["responses"][0] for row in got["dev"]}
    assert made.stats == {"train_pairs": 39 - measured, "steps": [], "dev": {"kept": 4}}

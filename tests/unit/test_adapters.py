"""LoRA adapters as an ensemble: who learns from what, what is read under each, and heads that read one member's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_reward import by_peft, save_scored
from made_stage import made_stage
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from psyray import in_words, plan, status
from psyray.arrays import FloatArray
from psyray.config import load_config
from psyray.errors import PsyrayError
from psyray.looks import CHOICE, aside
from psyray.records import PAIRS
from psyray.reward import adapters
from psyray.reward.adapters import adapters_stage, curves, drawn, link_files
from psyray.reward.body import Body, Reading
from psyray.reward.ensemble import fitted, fitted_by_member, own_heads
from psyray.reward.heads import Heads, own_head
from psyray.reward.ratings import fit_ratings
from psyray.reward.score import RewardScorer, chats
from psyray.reward.train import dev_pairs, examples, reward_stage
from psyray.rubric import load_rubric
from psyray.run import Artifact, Folder, Run
from psyray.sections.learning import DevSection, HeadsSection, RewardSection
from psyray.train import STEPS
from serve.reward import Gathered, RewardServer, judged

MESSAGES = [[{"role": "user", "content": text}] for text in ("I cannot sleep.", "My sister left, and I miss her so.")]
RESPONSES = ["You lie awake.", "It hurts that she is gone, and nobody seems to see it."]
CHATS = chats(MESSAGES, RESPONSES)
COUNT, SIZE = 2, 128


@pytest.fixture(scope="module")
def adapted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a score head and two random adapters, each with a head of its own."""
    path = tmp_path_factory.mktemp("adapted") / "model"
    save_scored(tiny_model, path)
    for number in range(COUNT):
        config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear", modules_to_save=["score"])
        base = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.bfloat16)
        worn = get_peft_model(base, config)
        for name, weight in worn.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                torch.nn.init.normal_(weight, std=0.2)
        worn.save_pretrained(path / "adapters" / str(number))
    return path


@pytest.mark.parametrize("layer", [None, 1])
def test_a_feature_is_the_states_under_each_adapter_one_after_another(adapted: Path, layer: int | None) -> None:
    features_ND = Body(adapted, [Reading(layer, adapters=COUNT)], max_length=128).features(CHATS)
    assert features_ND.shape == (2, COUNT * SIZE)
    blocks = np.split(features_ND, COUNT, axis=1)
    for number, block_ND in enumerate(blocks):
        for chat, found_D in zip(CHATS, block_ND, strict=True):
            expected_D, _ = by_peft(adapted, chat, number, -1 if layer is None else layer)
            assert np.abs(found_D - expected_D).max() < 0.02 * np.abs(expected_D).max()  # bfloat16
    assert np.abs(blocks[0] - blocks[1]).max() > 0.3
    plain_ND = Body(adapted, [Reading(layer)], max_length=128).features(CHATS)
    assert min(np.abs(plain_ND - block_ND).max() for block_ND in blocks) > 0.3  # the model itself is as it was


def test_a_model_without_the_adapters_that_are_read_is_refused(adapted: Path) -> None:
    with pytest.raises(PsyrayError, match=r"no adapter 2 in .*adapters, but 3 are read"):
        Body(adapted, [Reading(adapters=3)], max_length=128)


def pairs_of(features: int, seed: int = 0) -> tuple[FloatArray, FloatArray, list[str]]:
    """(chosen, rejected, speeches) of 40 made pairs."""
    chosen_ND, rejected_ND = np.random.default_rng(seed).normal(size=(2, 40, features))
    return chosen_ND + 0.3, rejected_ND, [f"s{n // 2}" for n in range(40)]


def test_without_new_labels_each_head_scores_as_its_own_adapter_does(adapted: Path, tmp_path: Path) -> None:
    """A heavy ridge leaves the priors: what was fitted, saved and loaded then tells the adapters' own scores."""
    reading = Reading(adapters=COUNT)
    chosen_ND, rejected_ND, speeches = pairs_of(COUNT * SIZE)
    section = HeadsSection(count=2 * COUNT, ridge=1e9, prior_spread=0)
    heads = fitted_by_member(section, chosen_ND, rejected_ND, speeches, own_heads(adapted, reading), 0)
    replace(heads, reading=reading).save(tmp_path / "heads.npz")
    scores_NH = RewardScorer(adapted, tmp_path / "heads.npz", max_length=128).scores(MESSAGES, RESPONSES)
    own_NM = np.array([[by_peft(adapted, chat, number)[1] for number in range(COUNT)] for chat in CHATS])
    assert np.ptp(own_NM, axis=1).min() > 0.1
    # Heads stand about the training pairs' mean, so two responses tell: their difference has no place.
    assert np.diff(scores_NH, axis=0) == pytest.approx(np.diff(np.repeat(own_NM, 2, axis=1), axis=0), abs=0.1)
    assert (own_head(adapted) != own_heads(adapted, reading)[0]).any()
    assert own_heads(adapted, Reading(1, adapters=COUNT)) == [None, None] and own_heads(adapted, Reading(1)) == [None]


def test_a_served_score_is_the_offline_one_to_the_last_digit(adapted: Path, tmp_path: Path) -> None:
    """vLLM gives out one body's states, so the server reads adapters as the stages do."""
    rng = np.random.default_rng(0)
    reading, size = Reading(adapters=COUNT), COUNT * SIZE
    Heads(rng.normal(size=(4, size)), np.zeros(size), np.ones(size), reading=reading).save(tmp_path / "heads.npz")
    server = RewardServer(str(adapted), str(tmp_path / "heads.npz"), 128)
    assert isinstance(server.body, Gathered)
    served = judged(server.heads, server.body.body.features(CHATS))
    offline_NH = RewardScorer(adapted, tmp_path / "heads.npz", max_length=128).scores(MESSAGES, RESPONSES)
    assert [score.score for score in served] == offline_NH.mean(axis=1).tolist()
    assert [score.spread for score in served] == offline_NH.std(axis=1).tolist()


def test_where_vllm_was_built_for_gpus_and_has_none_transformers_score(
    adapted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.platforms.interface import UnspecifiedPlatform

    monkeypatch.setattr("vllm.platforms.current_platform", UnspecifiedPlatform())
    server = RewardServer(str(adapted), None, 128)
    assert isinstance(server.body, Gathered)
    served = judged(server.heads, server.body.body.features(CHATS))
    assert [score.score for score in served] == RewardScorer(adapted, max_length=128).scores(MESSAGES, RESPONSES)[
        :, 0
    ].tolist()


@pytest.mark.parametrize("kind", ["ensemble", "laplace", "mlp"])
def test_a_head_reads_its_members_features_and_nothing_else(kind: str) -> None:
    section = HeadsSection.model_validate({"kind": kind, "count": 4, "hidden": 3})
    chosen_ND, rejected_ND, speeches = pairs_of(12)
    priors = [np.ones(6), None]
    heads = fitted_by_member(section, chosen_ND, rejected_ND, speeches, priors, 7)
    half = section.model_copy(update={"count": 2})
    for number, prior_D in enumerate(priors):
        block = slice(6 * number, 6 * number + 6)
        alone = fitted(half, chosen_ND[:, block], rejected_ND[:, block], speeches, prior_D, 7 + number)
        mine = slice(2 * number, 2 * number + 2)
        assert heads.scores(chosen_ND)[:, mine] == pytest.approx(alone.scores(chosen_ND[:, block]))
        others_ND = chosen_ND.copy()
        others_ND[:, block] = 9.0
        theirs = slice(2 - 2 * number, 4 - 2 * number)
        assert (heads.scores(others_ND)[:, theirs] == heads.scores(chosen_ND)[:, theirs]).all()
        assert (heads.scores(others_ND)[:, mine] != heads.scores(chosen_ND)[:, mine]).any()


@pytest.mark.parametrize("kind", ["ensemble", "laplace", "mlp"])
def test_one_member_has_the_very_heads_that_there_were_before(kind: str) -> None:
    section = HeadsSection.model_validate({"kind": kind, "count": 3, "hidden": 3})
    chosen_ND, rejected_ND, speeches = pairs_of(6)
    one = fitted_by_member(section, chosen_ND, rejected_ND, speeches, [np.ones(6)], 7)
    before = fitted(section, chosen_ND, rejected_ND, speeches, np.ones(6), 7)
    for name, array in vars(before).items():
        assert np.array_equal(getattr(one, name), array) if name != "reading" else one.reading == before.reading


def test_ratings_are_read_off_the_members_mean() -> None:
    rubric, rng = load_rubric("counselling"), np.random.default_rng(0)
    features_NMD = rng.normal(size=(30, 3, 5))
    ratings_NP = rng.normal(size=(30, len(rubric.keys)))
    heads = fit_ratings(features_NMD.mean(axis=1), ratings_NP, [f"s{n // 2}" for n in range(30)], rubric)
    found = heads.over(3).predict(features_NMD.reshape(30, 15))
    assert found == pytest.approx(heads.predict(features_NMD.mean(axis=1)))
    assert (heads.over(1).predict(features_NMD[:, 0]) == heads.predict(features_NMD[:, 0])).all()


def pairs_artifact(path: Path, rated: int = 20) -> Artifact:
    """Two pairs to each of 20 training speeches, whose first so many have margins, and one to each of five others."""
    rows = [
        {"pair_id": f"{speech}{n}", "speech_id": speech, "split": split, "source": "judge",
         "margin": 1.0 if int(speech[-2:]) < rated else None,
         "messages": MESSAGES[0], "chosen": f"Good {n}", "rejected": f"Bad {n}"}
        for split, speeches, each in (("train", 20, 2), ("test", 5, 1))
        for speech in (f"{split}-{at:02d}" for at in range(speeches))
        for n in range(each)
    ]  # fmt: skip

    run = Run(path, say=lambda line: None)
    with run.open({}):
        return made_stage(run, "pairs", PAIRS, "pair_id", rows)


def test_each_member_learns_from_its_own_draw_of_the_training_speeches(tmp_path: Path) -> None:
    pairs = pairs_artifact(tmp_path / "run")
    first, second = (drawn(pairs, RewardSection(), 0, number, None, 1) for number in range(2))
    assert (
        drawn(pairs, RewardSection(), 0, 0, None, 1) == first != second
        and drawn(pairs, RewardSection(), 1, 0, None, 1) != first
    )
    for times in (first, second):
        assert set(times) == {f"train-{n:02d}" for n in range(20)} and sum(times.values()) == 20
        assert 0 in times.values() and max(times.values()) > 1
    alone, together = (
        list(examples(Folder(tmp_path), RewardSection(groups=groups), pairs, first)) for groups in (False, True)
    )
    assert len(alone) == 2 * 20 and len(together) == 20
    assert [len(group["margin"]) for group in together] == [2] * 20
    assert len(list(examples(Folder(tmp_path), RewardSection(), pairs))) == 40  # without a draw each once


def test_speeches_without_a_margin_are_drawn_for_no_member_where_the_loss_needs_one(tmp_path: Path) -> None:
    pairs, section = pairs_artifact(tmp_path / "run", rated=2), RewardSection(use_margin=True)
    for number in range(5):  # of all 20 a draw of neither of the two would be likely, and nothing left to learn from
        times = drawn(pairs, section, 0, number, None, 1)
        assert sum(times.values()) == 2 and set(times) == {"train-00", "train-01"}
        assert len(list(examples(Folder(tmp_path), section, pairs, times))) == 2 * 2


def test_speeches_put_aside_are_drawn_for_no_member_and_measured_once_by_each(tmp_path: Path) -> None:
    pairs, dev = pairs_artifact(tmp_path / "run"), DevSection(share=0.3)
    out = {row["speech_id"] for row in pairs.each() if row["split"] == "train" and aside(row, dev, 1)}
    times = drawn(pairs, RewardSection(), 0, 0, dev, 1)
    assert out and not out & times.keys() and sum(times.values()) == len(times) == 20 - len(out)
    section = RewardSection()
    learnt = list(examples(Folder(tmp_path), section, pairs, times, lambda row: row["speech_id"] not in out))
    measured = list(examples(Folder(tmp_path), section, pairs, keep=lambda row: row["speech_id"] in out))
    assert len(learnt) == 2 * len(times) and len(measured) == 2 * len(out) == dev_pairs(section, pairs, dev, 1)
    config = load_config(None, ["reward.adapters={count: 2, train: {dev: {share: 0.0001}}}"])
    with pytest.raises(PsyrayError, match=r"reward\.adapters\.train\.dev\.share 0\.0001 puts 0 of 40"):
        adapters.check_dev(config, pairs)
    adapters.check_dev(load_config(None, ["reward.adapters.count=2"]), pairs)


class Noted:
    """A run that only notes what its stages depend on."""

    def stage(self, name: str, config: Any, inputs: Any, make: Any) -> Any:
        return config


def test_without_adapters_nothing_is_named_anew_and_there_is_no_such_stage(tiny_model: Path, tmp_path: Path) -> None:
    config = load_config(None, [f"reward.model={tiny_model}"])
    pairs = Artifact("pairs", tmp_path, "0", {})
    named: Any = reward_stage(Noted(), config, pairs)  # type: ignore[arg-type]
    assert set(named) == {"model", "use_margin", "label_smoothing", "center", "groups", "train", "seed"}
    reward = Artifact("reward", tmp_path, "1", {})
    assert adapters_stage(Noted(), config, reward, pairs) is reward  # type: ignore[arg-type]
    with_two = load_config(None, [f"reward.model={tiny_model}", "reward.adapters.count=2"])
    assert reward_stage(Noted(), with_two, pairs) == named  # type: ignore[arg-type]
    told: Any = adapters_stage(Noted(), with_two, reward, pairs)  # type: ignore[arg-type]
    assert told["count"] == 2 and told["center"] == 0.01 and not told.keys() & {"heads", "model"}


def test_a_setting_of_an_adapters_training_leaves_its_other_defaults() -> None:
    train = load_config(
        None, ["reward.adapters={count: 2, train: {epochs: 2, lora: {alpha: 8}}}"]
    ).reward.adapters.train
    assert (train.learning_rate, train.lora.rank, train.lora.alpha, train.epochs) == (1e-4, 8, 8, 2)


def stand_in(trained: list[int], fail_at: int | None, looks: bool = False) -> Callable[..., None]:
    """Writes what a training leaves; dies in the middle of member `fail_at`."""

    def train_member(member: adapters.Member, *_: Any) -> None:
        trained.append(member.number)
        (member.path / "adapter").mkdir(parents=True)
        if member.number == fail_at:
            raise KeyboardInterrupt
        (member.path / "adapter" / "weights").write_text(str(member.number))
        steps = [{"step": n, "loss": 0.75 - 0.125 * n - member.number} for n in (1, 2, 3)[: 3 - member.number]]
        (member.path / STEPS).write_text("".join(json.dumps(step) + "\n" for step in steps))
        if looks:
            (member.path / CHOICE).write_text(json.dumps({"kept": member.number}))
        member.progress(1, 4, "steps")

    return train_member


def test_a_stage_that_was_cut_off_goes_on_after_the_last_adapter_that_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(None, ["reward.adapters.count=2"])
    pairs = pairs_artifact(tmp_path / "run")
    made = tmp_path / "run/stages/reward/1/model"
    made.mkdir(parents=True)
    (made / "model.safetensors").write_text("weights")
    reward, trained = Artifact("reward", made.parent, "1", {}), list[int]()
    run = Run(tmp_path / "run", say=lambda line: None)
    monkeypatch.setattr(adapters, "train_member", stand_in(trained, fail_at=1))
    with pytest.raises(KeyboardInterrupt), run.open({}):
        adapters_stage(run, config, reward, pairs)
    [folder] = (tmp_path / "run/stages/reward-adapters").iterdir()
    at = json.loads((folder / "progress.json").read_text())
    assert (at["done"], at["total"], at["unit"]) == (1, 8, "steps")
    monkeypatch.setattr(adapters, "train_member", stand_in(trained, fail_at=None))
    (folder / "member-1/adapter").rmdir()
    with run.open({}):
        stage = adapters_stage(run, config, reward, pairs)
    assert trained == [0, 1, 1] and json.loads((folder / "progress.json").read_text())["done"] == 5
    left = {path.relative_to(stage.model).as_posix() for path in stage.model.rglob("*") if path.is_file()}
    each = {f"adapters/{n}/{name}" for n in range(2) for name in ("weights", STEPS)}
    assert left == {"model.safetensors", *each} and not list(folder.glob("member-*"))
    assert (stage.model / "model.safetensors").samefile(made / "model.safetensors")
    assert stage.stats["steps"][1] == {"step": 2, "adapter-0": {"loss": 0.5}, "adapter-1": {"loss": -0.5}}
    assert stage.stats["steps"][2] == {"step": 3, "adapter-0": {"loss": 0.375}}
    assert (
        in_words.key_numbers("reward-adapters", stage.stats) == "2 adapters, loss 0.625 → 0.375; loss -0.375 → -0.500"
    )


def test_each_adapters_choice_stands_beside_it_and_in_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(None, ["reward.adapters={count: 2, train: {dev: {share: 0.3}}}"])
    pairs, run = pairs_artifact(tmp_path / "run"), Run(tmp_path / "run", say=lambda line: None)
    reward = Artifact("reward", tmp_path / "run/stages/reward/1", "1", {})
    reward.model.mkdir(parents=True)
    monkeypatch.setattr(adapters, "train_member", stand_in([], None, looks=True))
    with run.open({}):
        stage = adapters_stage(run, config, reward, pairs)
    assert stage.stats["dev"] == {"adapter-0": {"kept": 0}, "adapter-1": {"kept": 1}}
    assert (stage.model / "adapters/1" / CHOICE).exists()


def test_a_file_system_without_hard_links_gets_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError("not here")

    monkeypatch.setattr(adapters.os, "link", refused)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    for _ in range(2):  # the second finds it there
        link_files(tmp_path / "model", tmp_path / "with")
    assert [path.name for path in (tmp_path / "with").iterdir()] == ["config.json"]
    assert not (tmp_path / "with/config.json").samefile(tmp_path / "model/config.json")


def test_no_adapter_has_no_curve(tmp_path: Path) -> None:
    assert curves(tmp_path, 2) == []


def test_a_plan_and_a_status_have_the_stage_where_there_are_adapters() -> None:
    config = load_config(None, ["reward.adapters.count=2"])
    [line] = [line for line in plan.lines(config, 20, 15) if line[0] == "reward-adapters"]
    assert "2 adapters, each: epochs 1.0" in line[1] and "learning rate 0.0001" in line[1] and "rank 8" in line[1]
    assert "reward-adapters" not in {line[0] for line in plan.lines(load_config(None), 20, 15)}
    with_two, without = (status.expected_stages(c.model_dump(mode="json")) for c in (config, load_config(None)))
    assert with_two[with_two.index("reward") + 1] == "reward-adapters"
    assert [name for name in with_two if name != "reward-adapters"] == without

"""What TRL's trainers are told: LoRA, the reference, the losses. In this process, without DeepSpeed."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made_trainers import LORA, PAIRS, arguments, dpo_trainer, reward_trainer, settings
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import DPOConfig
from trl.trainer import utils

from psyray.config import load_config
from psyray.errors import PsyrayError
from psyray.lora import merge_adapter
from psyray.policy import dpo
from psyray.reward import train as reward
from psyray.reward.groups import group_example
from psyray.sections.learning import DPO_LOSSES, DpoSection, LoraSection
from psyray.train import _reporter, read_steps


def batch(trainer: Any) -> dict[str, torch.Tensor]:
    return next(iter(trainer.get_train_dataloader()))


@pytest.fixture(scope="module")
def other_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after a round: its head and first layer moved."""
    folder = tmp_path_factory.mktemp("other")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.model.layers[0].parameters():
            weight += 0.05 * torch.randn_like(weight)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tiny_model / name).exists():
            (folder / name).write_bytes((tiny_model / name).read_bytes())
    return folder


def test_a_reward_adapter_learns_with_its_head_and_becomes_a_plain_model(tmp_path, tiny_model):
    trainer = reward_trainer(tmp_path, tiny_model, LORA)
    free = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in free)
    assert any(name.endswith("score.modules_to_save.default.weight") for name in free)
    assert any("embed" in name for name, _ in trainer.model.named_parameters()) and not any("embed" in n for n in free)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses and all(map(math.isfinite, losses))
    # Training aligns the model's padding with the tokenizer's: what is read must still be the end of the chat.
    pad, given = trainer.model.config.pad_token_id, batch(trainer)
    ends = given["input_ids"][torch.arange(8), given["attention_mask"].sum(1) - 1]
    assert (ends != pad).all() and (given["input_ids"][given["attention_mask"] == 0] == pad).all()

    trainer.save_model(str(tmp_path / "adapter"))
    merge_adapter(trainer, str(tiny_model), tmp_path / "adapter", tmp_path / "model")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.bfloat16)
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in base.named_parameters()]
    assert not list((tmp_path / "model").glob("adapter*")) and (tmp_path / "model/tokenizer_config.json").exists()
    read = {key: value for key, value in batch(trainer).items() if key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        worn = trainer.model.eval()(**read).logits.float()
        merged = plain(**read).logits.float()
        with trainer.model.disable_adapter():
            bare = trainer.model(**read).logits.float()
    assert (worn - bare).abs().max() > 0.05
    assert (worn - merged).abs().max() < 0.2 * (worn - bare).abs().max()  # bfloat16


def test_without_lora_all_weights_learn(tmp_path, tiny_model):
    trainer = reward_trainer(tmp_path, tiny_model, None)
    assert all(weight.requires_grad for weight in trainer.model.parameters())


def test_a_step_that_is_not_full_is_the_mean_over_its_groups_however_they_lie(tmp_path, tiny_model):
    """Three groups of which one has a loss of about 40: in halves of two and one it would count more."""
    groups = [group_example([PAIRS[n] | {"margin": 40.0 * (n == 1)}], True) for n in range(3)]
    steps = []
    for size in (4, 2, 1):
        config = settings(tmp_path, tiny_model, groups, None) | {"smoothing": 0.0, "center": 0.0}
        config["train"] |= {"micro_batch": size}
        torch.manual_seed(0)  # draws the score head
        trainer = reward.make_trainer(config, arguments(config))
        trainer.train()
        [step] = [entry for entry in trainer.state.log_history if "loss" in entry]
        steps.append(step)
    first = steps[0]
    assert first["loss"] == pytest.approx((40 + 2 * math.log(2)) / 3, rel=0.1) and 0 <= first["accuracy"] <= 1
    for step in steps[1:]:
        for name in ("loss", "accuracy", "margin", "mean_reward"):
            assert step[name] == pytest.approx(first[name], rel=0.005, abs=0.005)


def test_a_loss_that_is_no_number_ends_the_job(tmp_path, tiny_model):
    trainer = reward_trainer(tmp_path, tiny_model, None)
    trainer.args.learning_rate, trainer.args.num_train_epochs = 1e30, 3
    trainer.add_callback(_reporter(tmp_path, None))
    with pytest.raises(PsyrayError, match="the loss of step 2 is nan: a lower learning_rate"):
        trainer.train()
    assert [step["step"] for step in read_steps(tmp_path)] == [1]


def test_an_adapters_dropout_is_kept(tmp_path, tiny_model):
    trainer = reward_trainer(tmp_path, tiny_model, LoraSection(rank=4, dropout=0.3, targets=["q_proj"]))
    dropouts = {m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)}
    assert dropouts == {0.3}
    worn = {name.split(".lora_A")[0].split(".")[-1] for name, _ in trainer.model.named_parameters() if "lora_A" in name}
    assert worn == {"q_proj"}


def noted(trainer: Any, name: str) -> float:
    return float(trainer._metrics["train"][name][-1])


def test_a_policy_that_is_its_own_reference_is_it_without_its_adapter(tmp_path, tiny_model):
    trainer = dpo_trainer(tmp_path, tiny_model, tiny_model, LORA)
    assert trainer.ref_model is None
    given = batch(trainer)
    trainer.model.train()
    assert trainer.compute_loss(trainer.model, given).item() == pytest.approx(math.log(2), abs=1e-6)
    before = [side.clone() for side in trainer.compute_ref_log_probs(trainer.model, given)]
    trainer.train()
    trainer.model.train()
    assert trainer.compute_loss(trainer.model, given).item() < math.log(2) - 0.05  # the policy moved
    after = trainer.compute_ref_log_probs(trainer.model, given)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))  # the reference did not

    trainer.save_model(str(tmp_path / "adapter"))
    merge_adapter(trainer, str(tiny_model), tmp_path / "adapter", tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    read = {key: given[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        worn, merged = trainer.model.eval()(**read).logits.float(), plain(**read).logits.float()
        with trainer.model.disable_adapter():
            bare = trainer.model(**read).logits.float()
    assert (worn - merged).abs().mean() < 0.2 * (worn - bare).abs().mean()


@pytest.mark.parametrize("lora", [LORA, None])
def test_another_reference_is_held_against_the_policy_whatever_learns(tmp_path, tiny_model, other_model, lora):
    """A round that starts from the last policy and is held to the first one."""
    trainer = dpo_trainer(tmp_path, other_model, tiny_model, lora)
    given = batch(trainer)
    trainer.model.train()
    trainer.compute_loss(trainer.model, given)
    moved = noted(trainer, "rewards/chosen")
    # The same two models the other way round, as full models, give the same distance with the other sign.
    turned = dpo_trainer(tmp_path, tiny_model, other_model, None)
    turned.model.train()
    turned.compute_loss(turned.model, given)
    assert abs(moved) > 0.1 and moved == pytest.approx(-noted(turned, "rewards/chosen"), rel=0.02)


def test_the_names_of_the_losses_are_those_of_the_installed_trl():
    [about] = [field.metadata["help"] for field in fields(DPOConfig) if field.name == "loss_type"]
    assert set(DPO_LOSSES) == set(re.findall(r"`'(\w+)'`", about))


def test_every_loss_is_computed_and_length_can_be_kept_out(tmp_path, tiny_model, other_model):
    trainer = dpo_trainer(
        tmp_path, other_model, tiny_model, LORA, loss_type=["exo_pair"], loss_weights=[1.0], label_smoothing=0.1
    )
    given = batch(trainer)
    trainer.model.train()
    found = {}
    for name in DPO_LOSSES:
        trainer.loss_types = [name]
        found[name] = trainer.compute_loss(trainer.model, given).item()
    assert all(map(math.isfinite, found.values())) and len(set(found.values())) == len(DPO_LOSSES)
    trainer.loss_types, trainer.ld_alpha = ["sigmoid"], 0.0
    without_tail = trainer.compute_loss(trainer.model, given).item()
    assert without_tail != found["sigmoid"]


def test_only_the_answers_are_projected_to_the_vocabulary_and_the_loss_is_the_same(
    tmp_path, tiny_model, other_model, monkeypatch
):
    trainer = dpo_trainer(tmp_path, other_model, tiny_model, None)
    given, heads, projected = batch(trainer), utils._ChunkedLogProbFunction.apply, list[int]()

    def noting(states: torch.Tensor, *more: Any) -> Any:
        projected.append(len(states))
        return heads(states, *more)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", SimpleNamespace(apply=noting))
    loss = trainer.compute_loss(trainer.model, given).item()
    assert projected == [int(given["completion_mask"].sum())] * 2  # the policy's and its reference's
    monkeypatch.setattr(utils, "_use_triton", lambda device: False)
    assert trainer.compute_loss(trainer.model, given).item() == pytest.approx(loss, rel=1e-6)
    assert projected[-1] > 2 * projected[0]


def test_a_side_that_was_cut_off_does_not_end_and_a_whole_one_does(tmp_path, tiny_model):
    pairs = [PAIRS[0] | {"chosen_truncated": True}, PAIRS[1] | {"rejected_truncated": True}, PAIRS[2]]
    config = settings(tmp_path, tiny_model, [dpo.example(pair, "", {}) for pair in pairs], None)
    config |= {"reference": str(tiny_model), "loss": dpo.loss_arguments(DpoSection())}
    trainer = dpo.make_trainer(config, arguments(config))
    tokenizer = trainer.processing_class
    for pair, row in zip(pairs, trainer.train_dataset, strict=True):
        for side in ("chosen", "rejected"):
            text = tokenizer.decode(row[f"{side}_ids"])
            open_end = pair.get(f"{side}_truncated")
            assert text.strip() == pair[side] + ("" if open_end else tokenizer.eos_token)


def test_pairs_that_trl_would_drop_for_their_prompts_are_left_out_and_told(tmp_path, tiny_model):
    long = [
        pair | {"messages": [{"role": "user", "content": "word " * n}]}
        for pair, n in zip(PAIRS, (1, 20, 299), strict=False)
    ]
    chats = [dpo.example(pair, "Be kind.", {}) for pair in long]
    config = settings(tmp_path, tiny_model, chats, None) | {"reference": str(tiny_model)}
    trained = dpo.make_trainer(config | {"loss": dpo.loss_arguments(DpoSection())}, arguments(config)).train_dataset
    lengths = [len(row["prompt_ids"]) for row in trained]
    assert len(lengths) == 2
    for most, count in ((128, 2), (max(lengths) + 1, 2), (max(lengths), 1), (min(lengths), 0)):
        words = [f"dpo.train.max_length={most}", "policy.system=Be kind."]
        assert dpo.that_fit(long, load_config(None, words), str(tiny_model)) == long[:count]
    assert dpo.left_out(0, 3, 64) == "" and "1 of 3 pairs have prompts that fill" in dpo.left_out(1, 3, 64)
    with pytest.raises(PsyrayError, match=r"3 of 3 pairs .* dpo\.train\.max_length 64 .* raise it"):
        dpo.left_out(3, 3, 64)

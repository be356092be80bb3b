"""Groups: one reading of each response gives the loss, the gradients and the scores that pairs give."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from made_stage import made_stage
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from psyray.errors import PsyrayError
from psyray.records import PAIRS
from psyray.reward.groups import GroupCollator, blank, group_example, pad_apart, preference_loss
from psyray.reward.score import RewardScorer
from psyray.reward.train import examples, without_margin
from psyray.run import Artifact, Folder, Run
from psyray.sections.learning import RewardSection

TEXTS = ["You lie awake and it wears you out.", "Sleep.", "What goes round in your head at night?", "I see."]
SPEECH = [{"role": "user", "content": "I cannot sleep."}]


def pairs(texts: list[str] = TEXTS, speech: str = "s") -> list[dict]:
    """All pairs of a speech's texts, the earlier one chosen; the margin tells how far apart they are."""
    return [
        {"messages": SPEECH, "chosen": a, "rejected": b, "margin": texts.index(b) - texts.index(a), "speech_id": speech}
        for a, b in combinations(texts, 2)
    ]


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    """Its own padding is what its template ends a chat in."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, truncation_side="left")
    assert tokenizer.pad_token == "<|im_end|>"
    pad_apart(tokenizer, group_example(pairs(), False), 128)
    return tokenizer


@pytest.fixture
def model(tiny_model, tokenizer):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def rewards(model, batch) -> torch.Tensor:
    read = {key: batch[key] for key in ("input_ids", "attention_mask")}
    return model(**read).logits.squeeze(-1)


def gradients(model, loss) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(("smoothing", "center", "use_margin"), [(0.0, 0.0, False), (0.1, 0.05, True)])
def test_a_group_gives_the_loss_and_the_gradients_of_its_pairs(model, tokenizer, smoothing, center, use_margin):
    group = group_example(pairs(), use_margin)
    collate = GroupCollator(tokenizer, 128)
    batch = collate([group])
    assert len(batch["input_ids"]) == 4 and len(batch["chosen"]) == 6
    loss = preference_loss(rewards(model, batch), batch, smoothing=smoothing, center=center)
    found = gradients(model, loss)

    one_by_one = torch.zeros(())
    for pair in pairs():  # each with its two responses read alone, unpadded
        ids = [collate([group_example([pair | {"chosen": pair[side], "rejected": "No."}], False)]) for side in
               ("chosen", "rejected")]  # fmt: skip
        chosen, rejected = (
            rewards(model, {k: b[k][:1, : b["attention_mask"][0].sum()] for k in ("input_ids", "attention_mask")})[0]
            for b in ids
        )
        z = chosen - rejected - (pair["margin"] if use_margin else 0)
        one_by_one = one_by_one + center * (chosen + rejected) ** 2
        one_by_one = one_by_one - (1 - smoothing) * logsigmoid(z) - smoothing * logsigmoid(-z)
    expected = one_by_one / 6
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    there = gradients(model, expected)
    assert there.norm() > 0.01
    assert (found - there).norm() < 1e-4 * there.norm()


def test_every_group_weighs_the_same_however_many_pairs_it_has(tokenizer):
    groups = [group_example(pairs(), False), group_example(pairs(TEXTS[:2]), False)]
    batch = GroupCollator(tokenizer, 128)(groups)
    assert batch["share"].tolist() == [6] * 6 + [1]
    assert (batch["chosen"][6], batch["rejected"][6]) == (4, 5)
    with_gap = preference_loss(torch.tensor([0.0, 0, 0, 0, 3, 1]), batch, smoothing=0, center=0)
    assert with_gap.item() == pytest.approx(math.log(2) + math.log1p(math.exp(-2)))


def test_a_blank_group_is_read_and_weighs_nothing(tokenizer):
    group = group_example(pairs(), True)
    alone, filled = (GroupCollator(tokenizer, 128)(groups) for groups in ([group], [group, blank(group)]))
    assert len(filled["input_ids"]) == len(alone["input_ids"]) + 1
    assert all(torch.equal(filled[key], alone[key]) for key in ("chosen", "rejected", "margin", "share"))
    rewards_N = torch.zeros(1, requires_grad=True)
    nothing = preference_loss(rewards_N, GroupCollator(tokenizer, 128)([blank(group)]), smoothing=0.1, center=1)
    nothing.backward()
    assert nothing == 0 == rewards_N.grad


def test_smoothing_and_margin_put_the_least_loss_at_a_finite_gap():
    batch = {"chosen": [0], "rejected": [1], "margin": torch.tensor([0.5]), "share": torch.ones(1)}
    gap = torch.tensor(0.5 + math.log(0.9 / 0.1), requires_grad=True)
    preference_loss(torch.stack([gap, torch.zeros(())]), batch, smoothing=0.1, center=0).backward()
    assert gap.grad.item() == pytest.approx(0, abs=1e-6)


def test_equal_texts_are_read_once():
    group = group_example(pairs(["a", "b"]) + pairs(["a", "c"]), True)
    assert group["responses"] == ["a", "b", "c"]
    assert (group["chosen"], group["rejected"], group["margin"]) == ([0, 0], [1, 2], [1.0, 1.0])


def test_padding_is_never_what_chats_end_in(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    group = group_example(pairs(), False)
    batch = GroupCollator(tokenizer, 128)([group])
    last = batch["attention_mask"].sum(1) - 1
    assert (batch["input_ids"][torch.arange(4), last] == end).all()
    assert (batch["input_ids"][batch["attention_mask"] == 0] != end).all()
    before = tokenizer.pad_token
    pad_apart(tokenizer, group, 128)
    assert tokenizer.pad_token == before  # what is good stays


def test_the_model_learns_where_it_is_scored(model, tokenizer, tmp_path):
    """Sequence classification, on a padded batch, reads the token that features are taken from."""
    group = group_example(pairs(), False)
    collate = GroupCollator(tokenizer, 128)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    trained_on = rewards(model, collate([group])).detach().float().numpy()
    scored = RewardScorer(tmp_path, max_length=128).scores([SPEECH] * 4, group["responses"])[:, 0]
    assert np.ptp(scored) > 0.3
    assert trained_on == pytest.approx(scored, abs=0.03)  # bfloat16


def stage_of(rows: list[dict], tmp_path: Path) -> Artifact:
    """The finished stage `pairs` of a run with these rows."""
    run = Run(tmp_path / "run", say=lambda line: None)
    with run.open({}):
        return made_stage(run, "pairs", PAIRS, "pair_id", rows)


def test_training_pairs_come_alone_or_by_speech(tmp_path):
    rows = [
        pair | {"pair_id": f"{n:02d}", "split": split, "speech_id": speech}
        for n, (pair, split, speech) in enumerate(
            (pair, split, speech)
            for pair in pairs(TEXTS[:3])
            for speech, split in (("s", "train"), ("t", "train"), ("u", "test"))
        )
    ]
    artifact = stage_of(rows, tmp_path)
    alone, together = (list(examples(Folder(tmp_path), RewardSection(groups=g), artifact)) for g in (False, True))
    assert [len(e["margin"]) for e in alone] == [1] * 6 and [len(e["margin"]) for e in together] == [3, 3]
    assert together[0]["responses"] == TEXTS[:3] and together[0]["margin"] == [0.0] * 3


def test_a_pair_whose_margin_nobody_knows_is_left_out_where_the_loss_needs_it_and_said(tmp_path):
    rows = [
        pair | {"pair_id": f"{n}", "split": "train", "margin": None if n == 1 else 2.0}
        for n, pair in enumerate(pairs(TEXTS[:3]))
    ]
    artifact = stage_of(rows, tmp_path)
    for groups in (False, True):
        for use, kept in ((True, [2.0, 2.0]), (False, [0.0] * 3)):
            found = examples(Folder(tmp_path), RewardSection(groups=groups, use_margin=use), artifact)
            assert [margin for group in found for margin in group["margin"]] == kept
    assert without_margin(0, 3) == ""
    assert without_margin(1, 3) == "reward.use_margin: 1 of 3 training pairs have no margin and are left out"
    with pytest.raises(PsyrayError, match=r"none of 3 training pairs has one: .* reward\.use_margin=false"):
        without_margin(3, 3)

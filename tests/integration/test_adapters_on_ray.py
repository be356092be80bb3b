"""The stage `reward-adapters` and what reads its model, trained for some steps on the tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from made_reward import by_peft, save_scored
from made_stage import made_stage

from psyray.config import load_config
from psyray.records import PAIRS, RESPONSES, pair_row
from psyray.reward import adapters
from psyray.reward.adapters import adapters_stage
from psyray.reward.ensemble import features_stage, heads_stage, load_features
from psyray.reward.score import RewardScorer
from psyray.run import Artifact, Run

TEXTS = ("You feel worn out and you wonder when it will end.", "Just sleep more and stop thinking.")
TRAIN = {"learning_rate": 0.005, "batch_size": 4, "micro_batch": 4, "max_length": 128, "epochs": 4}
SPEECHES = 14


def answer(number: int, side: int) -> dict:
    """A response to speech `number`; the last two speeches are held out."""
    chat = [{"role": "user", "content": f"I keep losing sleep over number {number}."}]
    split = "train" if number < SPEECHES - 2 else "test"
    return {"response_id": f"{number:02d}-{side}", "speech_id": f"{number:02d}", "messages": chat, "text": TEXTS[side],
            "split": split, "responder": "m", "status": "ok"}  # fmt: skip


def start(model: Path, path: Path) -> Artifact:
    """A reward stage's folder with an untrained reward model."""
    save_scored(model, path / "model")
    return Artifact("reward", path, "1", {})


def test_adapters_are_trained_once_each_and_read_as_peft_reads_them(tmp_path, tiny_model, ray_cluster, monkeypatch):
    words = ["reward.adapters.count=2", f"reward.adapters.train={json.dumps(TRAIN)}", "reward.heads.count=4",
             "reward.heads.ridge=1.0e9", "reward.heads.prior_spread=0", "reward.train.max_length=128"]  # fmt: skip
    config, trained = load_config(None, words), []
    responses = [answer(number, side) for number in range(SPEECHES) for side in (0, 1)]
    rows = [
        pair_row(good, good, bad, margin=1, source="judge")
        for good, bad in zip(responses[::2], responses[1::2], strict=True)
    ]
    whole = adapters.train_member

    def train_member(member, *others):
        trained.append(member.number)
        if trained == [0, 1]:
            raise KeyboardInterrupt
        whole(member, *others)

    monkeypatch.setattr(adapters, "train_member", train_member)
    run = Run(tmp_path / "run", say=lambda line: None)
    reward = start(tiny_model, tmp_path / "run/stages/reward/1")
    with run.open({}):
        source = made_stage(run, "responses", RESPONSES, "response_id", responses)
        pairs = made_stage(run, "pairs", PAIRS, "pair_id", rows)
        with pytest.raises(KeyboardInterrupt):
            adapters_stage(run, config, reward, pairs)
        [first] = (tmp_path / "run/stages/reward-adapters").glob("*/model/adapters/0/adapter_model.safetensors")
        written = first.stat().st_mtime_ns
        adapted = adapters_stage(run, config, reward, pairs)
        features = features_stage(run, "features", config, adapted, responses, source)
        heads = heads_stage(run, "heads", config, adapted, [features], [pairs])
    assert trained == [0, 1, 1] and first.stat().st_mtime_ns == written
    assert {f.name for f in adapted.path.iterdir()} == {"manifest.json", "model", "progress.json"}
    steps = adapted.stats["steps"]
    assert [entry["step"] for entry in steps] == list(range(1, 13))  # 12 speeches, four times, four a step
    losses = np.array([[entry[f"adapter-{n}"]["loss"] for n in range(2)] for entry in steps])
    assert (losses[-1] < losses[0]).all() and (losses[:, 0] != losses[:, 1]).any()

    known = load_features([features])
    chats = [[*r["messages"], {"role": "assistant", "content": r["text"]}] for r in responses[:4]]
    expected = [[by_peft(adapted.model, chat, number) for number in range(2)] for chat in chats]
    for response, members in zip(responses, expected, strict=False):
        blocks = np.split(known[response["response_id"]], 2)
        for block_D, (state_D, _) in zip(blocks, members, strict=True):
            assert block_D == pytest.approx(state_D, abs=0.05)
        assert np.abs(blocks[0] - blocks[1]).max() > 0.2

    # The ridge holds the heads to the adapters' own: two each, which score as the adapter does but for a constant.
    scorer = RewardScorer(adapted.model, heads.path / "heads.npz", max_length=128)
    scores_NH = scorer.scores([r["messages"] for r in responses[:4]], [r["text"] for r in responses[:4]])
    own_NM = np.array([[score for _, score in members] for members in expected])
    gaps_NM = own_NM[::2] - own_NM[1::2]
    assert gaps_NM.min() > 0.1 and np.abs(gaps_NM[:, 0] - gaps_NM[:, 1]).min() > 0.01
    assert scores_NH[::2] - scores_NH[1::2] == pytest.approx(np.repeat(gaps_NM, 2, axis=1), abs=0.1)
    assert scores_NH.std(axis=1).min() > 0

"""What is read of a language model's states: layers, poolings; heads are scored by what they were fitted on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from made_reward import save_scored
from made_stage import made_stage
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from psyray.config import load_config
from psyray.errors import PsyrayError
from psyray.records import PAIRS, pair_row
from psyray.reward.body import Body, Reading, before_response, chat_tokens, reading_of
from psyray.reward.ensemble import FEATURES, features_stage, heads_stage, own_margins
from psyray.reward.heads import Heads, own_head
from psyray.reward.mlp import fit_mlp_heads
from psyray.reward.score import RewardScorer, chats
from psyray.run import Artifact, Run
from psyray.sections.learning import HeadsSection, Pooling, RewardSection

MESSAGES = [[{"role": "user", "content": text}] for text in ("I cannot sleep.", "My sister left, and I miss her so.")]
RESPONSES = ["You lie awake.", "It hurts that she is gone, and nobody seems to see it."]
CHATS = chats(MESSAGES, RESPONSES)


@pytest.fixture(scope="module")
def reward_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a score head."""
    path = tmp_path_factory.mktemp("reward") / "model"
    save_scored(tiny_model, path)
    return path


def by_hand(model: Path, chat: list[dict[str, str]], layer: int, pooling: str) -> np.ndarray:
    """The feature of one chat, read alone from the whole model."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    whole = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.bfloat16)
    ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\n"))["input_ids"]
    asked = tokenizer(tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True))["input_ids"]
    assert ids[: len(asked)] == asked
    with torch.inference_mode():
        states_TD = whole(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0].float().numpy()
    return {"last": states_TD[-1], "mean": states_TD.mean(0), "response": states_TD[len(asked) :].mean(0)}[pooling]


def test_every_layer_and_pooling_is_read_in_one_pass(reward_model: Path) -> None:
    readings = [Reading(layer, pooling) for layer in (0, 1, 2) for pooling in get_args(Pooling)]
    for some in (readings, readings[:3]):  # for the embeddings alone one block less is loaded
        body = Body(reward_model, some, max_length=128, batch_size=2)
        [(rows, found)] = body.batches(CHATS)
        for reading in some:
            for row, feature_D in zip(rows, found[reading], strict=True):
                expected_D = by_hand(reward_model, CHATS[row], reading.layer or 0, reading.pooling)
                assert feature_D == pytest.approx(expected_D, abs=0.03), reading
    assert (Body(reward_model, [Reading()], max_length=128).features(CHATS) == found_last(reward_model)).all()


def found_last(model: Path) -> np.ndarray:
    return Body(model, [Reading(2, "last")], max_length=128).features(CHATS)


def test_the_response_begins_where_the_template_says(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, truncation_side="left")
    tokens = chat_tokens(tokenizer, CHATS[1], 128)
    before = before_response(tokenizer, CHATS[1], 128)
    assert tokenizer.decode(tokens[before:]) == f"{RESPONSES[1]}<|im_end|>"
    padded = [CHATS[1][0], {"role": "assistant", "content": f"  {RESPONSES[1]}\n"}]
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] | trim")
    assert before_response(tokenizer, padded, 128) == before
    short = len(tokens) - before - 3  # the chat's beginning and three tokens of the response are cut off
    assert before_response(tokenizer, CHATS[1], short) == 0
    assert before_response(tokenizer, [*CHATS[1][:-1], {"role": "assistant", "content": ""}], 128) == before


def test_what_heads_read_is_checked_and_the_last_layer_has_one_name(reward_model: Path) -> None:
    def read(model: Path, **heads: Any) -> Reading:
        return reading_of(RewardSection(heads=HeadsSection(**heads)), model)

    assert read(Path("no such folder")) == Reading() == read(reward_model, layer=2)
    assert read(reward_model, layer=1, pooling="mean") == Reading(1, "mean")
    with pytest.raises(PsyrayError, match=r"reward.heads.layer is 3; the model has the layers 0 \(embeddings\) to 2"):
        read(reward_model, layer=3)


@pytest.mark.parametrize("reading", [Reading(), Reading(1, "mean"), Reading(None, "response")])
def test_saved_heads_are_scored_by_what_they_were_fitted_on(
    reward_model: Path, tmp_path: Path, reading: Reading
) -> None:
    rng = np.random.default_rng(0)
    linear = Heads(rng.normal(size=(3, 128)), np.zeros(128), np.ones(128), reading=reading)
    curved = fit_mlp_heads(
        rng.normal(size=(6, 128)), rng.normal(size=(6, 128)), list("aabbcc"), count=2, ridge=1, seed=0
    )
    for heads in (linear, replace(curved, reading=reading)):
        heads.save(tmp_path / "heads.npz")
        loaded = Heads.load(tmp_path / "heads.npz")
        assert type(loaded) is type(heads) and loaded.reading == reading
        scorer = RewardScorer(reward_model, tmp_path / "heads.npz", max_length=128)
        features_ND = Body(reward_model, [reading], max_length=128).features(CHATS)
        assert (scorer.features(MESSAGES, RESPONSES) == features_ND).all()
        assert (scorer.scores(MESSAGES, RESPONSES) == heads.scores(features_ND)).all()


def test_heads_of_before_and_no_heads_read_the_last_token_of_the_last_layer(reward_model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "heads.npz", weights=rng.normal(size=(3, 128)), mean=np.zeros(128), scale=np.ones(128))
    assert Heads.load(tmp_path / "heads.npz").reading == Reading()
    last_ND = Body(reward_model, [Reading()], max_length=128).features(CHATS)
    own = RewardScorer(reward_model, max_length=128).scores(MESSAGES, RESPONSES)
    assert own[:, 0] == pytest.approx(last_ND @ own_head(reward_model))
    assert RewardScorer(reward_model).features([], []).shape == (0, 128)


class Noted:
    """A run that only notes what its stages depend on."""

    def stage(self, name: str, config: Any, inputs: Any, make: Any) -> Any:
        return config


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], {}),
        (["reward.heads.layer=2"], {}),  # the last layer by its number
        (["reward.heads.pooling=mean"], {"layer": None, "pooling": "mean"}),
        (["reward.heads.layer=1"], {"layer": 1, "pooling": "last"}),
        (["reward.adapters.count=2"], {"adapters": 2}),
        (["reward.adapters.count=2", "reward.heads.layer=1"], {"layer": 1, "pooling": "last", "adapters": 2}),
    ],
)
def test_stages_are_named_as_before_unless_something_else_is_read(
    reward_model: Path, words: list[str], told: dict[str, Any]
) -> None:
    config = load_config(None, words)
    reward = Artifact("reward", reward_model.parent, "0", {})
    features: Any = features_stage(Noted(), "f", config, reward, [], reward)  # type: ignore[arg-type]
    assert features == {"max_length": 512, "of": []} | told
    heads: Any = heads_stage(Noted(), "h", config, reward, [], [])  # type: ignore[arg-type]
    before = {"kind": "ensemble", "count": 10, "ridge": 10.0, "prior_spread": 0.05, "hidden": 32, "seed": 0}
    assert heads == before | told


def test_the_models_own_head_is_no_prior_where_another_state_is_read(reward_model: Path, tmp_path: Path) -> None:
    rows = [
        pair_row(answer(n, "a"), answer(n, "a"), answer(n, "b"), margin=1, source="judge")
        | {"split": "test" if n < 2 else "train"}
        for n in range(6)
    ]
    rng = np.random.default_rng(0)
    known = [
        {"response_id": f"{n}{side}", "features": rng.normal(size=128).tolist()} for n in range(6) for side in "ab"
    ]
    run = Run(tmp_path / "run", say=lambda line: None)
    with run.open({}):
        pairs = made_stage(run, "pairs", PAIRS, "pair_id", rows)
        features = made_stage(run, "features", FEATURES, "response_id", known)
        reward = Artifact("reward", reward_model.parent, "0", {})
        found, stats = {}, {}
        for layer in (None, 1):
            words = ["reward.heads.ridge=1.0e9", "reward.heads.prior_spread=0"]
            config = load_config(None, [*words, *([f"reward.heads.layer={layer}"] if layer else [])])
            stage = heads_stage(run, f"heads-{layer}", config, reward, [features], [pairs])
            found[layer], stats[layer] = Heads.load(stage.path / "heads.npz"), stage.stats
    raw_HD = found[None].weights_HD / found[None].scale_D
    assert raw_HD == pytest.approx(np.tile(own_head(reward_model), (10, 1)), abs=1e-4)
    assert np.abs(found[1].weights_HD).max() < 1e-4
    assert (found[None].reading, found[1].reading) == (Reading(), Reading(1, "last"))
    # The heads that a ridge holds to it rank the held-out pairs as the model's own does; at another layer it has none.
    own, heads = stats[None]["own_head"], stats[None]["metrics"]
    assert own == pytest.approx(heads, abs=1e-3) and own["auc_low"] <= own["auc"] and "own_head" not in stats[1]


def test_the_models_own_score_is_that_of_its_head_and_the_mean_over_its_adapters() -> None:
    known = {"c": np.array([1.0, 2.0, 3.0, 4.0]), "r": np.array([0.0, 1.0, 1.0, 0.0])}
    pairs = [{"chosen_id": "c", "rejected_id": "r"}]
    assert own_margins([np.array([1.0, 0.0, 0.0, 2.0])], pairs, known) == pytest.approx([9.0])
    members = [np.array([1.0, 1.0]), np.array([0.0, 3.0])]
    assert own_margins(members, pairs, known) == pytest.approx([(2.0 + 12.0) / 2])
    assert own_margins([None], pairs, known) is None and own_margins(members, [], known) is None


def answer(number: int, side: str) -> dict[str, Any]:
    """A response, as a pair's row wants it."""
    chat = [{"role": "user", "content": f"Speech {number}"}]
    return {"response_id": f"{number}{side}", "speech_id": str(number), "messages": chat, "text": f"{side} {number}",
            "split": "train", "responder": "m", "status": "ok"}  # fmt: skip

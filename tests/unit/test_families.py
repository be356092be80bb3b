"""Models of other kinds than the embedded one: read, scored, trained and adapted, each tiny and random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_trainers import LORA, PAIRS, dpo_trainer, reward_trainer

from psyray.reward.body import Body, Reading
from psyray.sections.learning import LoraSection

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
KINDS: dict[str, dict[str, Any]] = {
    "Gemma3TextConfig": {},
    "MistralConfig": {},
    "Phi3Config": {},
    "Qwen3Config": {},
    "Qwen3MoeConfig": EXPERTS | {"num_experts": 4},
    "Qwen3NextConfig": EXPERTS | {"num_experts": 4},  # whose lower layers have no attention
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path: Path, tiny_model: Path) -> Path:
    """A model of the kind with three layers, and the tiny model's tokenizer."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    config = getattr(transformers, request.param)(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, bos_token_id=0,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **KINDS[request.param],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_of_another_kind_is_read_as_far_as_is_asked(model: Path) -> None:
    chats = [[*pair["messages"], {"role": "assistant", "content": pair["chosen"]}] for pair in PAIRS]
    lower = Reading(1, "mean")
    (_, whole), = Body(model, [Reading(), lower], max_length=128).batches(chats)  # fmt: skip
    (_, cut), = Body(model, [lower], max_length=128).batches(chats)  # fmt: skip
    assert np.allclose(whole[lower], cut[lower], atol=1e-2)  # blocks above are not even loaded


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("model", [kind for kind in KINDS if kind != "Qwen3NextConfig"], indirect=True)
def test_a_model_of_another_kind_is_trained_and_adapted(model: Path, tmp_path: Path, lora: LoraSection | None) -> None:
    for trainer in (reward_trainer(tmp_path, model, lora), dpo_trainer(tmp_path, model, model, lora)):
        learning = {name: (weight, weight.clone()) for name, weight in trainer.model.named_parameters()}
        trainer.train()
        assert any(not weight.equal(before) for weight, before in learning.values())
        assert np.isfinite(trainer.state.log_history[0]["loss"])

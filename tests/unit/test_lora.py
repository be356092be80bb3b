"""Adapters of successive rounds as one adapter on the start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from psyray import lineage
from psyray.errors import PsyrayError
from psyray.lora import chain, stack
from psyray.origin import origin


def learn(base: Path, folder: Path, seed: int, **settings: Any) -> Path:
    """A round in little: a random adapter on the base in `folder/adapter`, merged into `folder/model`."""
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", **settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.05)
    model.save_pretrained(folder / "adapter")
    model.merge_and_unload().save_pretrained(folder / "model")
    return folder


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(torch.arange(3, 40)[None]).logits


def test_two_rounds_stacked_are_the_second_rounds_model(tiny_model: Path, tmp_path: Path) -> None:
    layers = ["q_proj", "down_proj"]
    first = learn(tiny_model, tmp_path / "1", 1, r=4, lora_alpha=8, target_modules=layers)
    second = learn(first / "model", tmp_path / "2", 2, r=6, lora_alpha=3, target_modules=layers, use_rslora=True)
    parts = chain(second / "adapter")
    assert parts == [first / "adapter", second / "adapter"] and chain(first / "adapter") == parts[:1]
    assert stack(parts, tmp_path / "both") == 10 and origin(tmp_path / "both") == {}
    start = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    plain = logits(start)
    stacked = logits(PeftModel.from_pretrained(start, tmp_path / "both"))
    merged = logits(AutoModelForCausalLM.from_pretrained(second / "model", dtype=torch.float32))
    torch.testing.assert_close(stacked, merged, atol=1e-4, rtol=1e-4)
    assert (plain - merged).abs().max() > 0.01


def test_an_adapter_of_a_runs_round_tells_which_it_was(tiny_model: Path, tmp_path: Path) -> None:
    stage = tmp_path / "runs/demo/stages/round-2/policy/0f2e"
    made = {"stage": "round-2/policy", "fingerprint": "0f2e", "config": {}, "inputs": {}, "stats": {}, "rows": 0}
    learn(tiny_model, stage, 1, r=2, target_modules=["q_proj"])
    (stage / "manifest.json").write_text(json.dumps(made | {"finished": ""}))
    stack(chain(stage / "adapter"), tmp_path / "adapters/two")
    stack([tmp_path / "adapters/two"], tmp_path / "adapters/again")
    known = {"run": str(tmp_path / "runs/demo"), "stage": "round-2/policy", "fingerprint": "0f2e"}
    assert origin(tmp_path / "adapters/again") == origin(stage / "adapter") == known
    assert lineage.find(str(tmp_path / "adapters/again"), tmp_path, "").stage.path == stage


def test_what_does_not_add_up_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    one = learn(tiny_model, tmp_path / "1", 1, r=2, target_modules=["q_proj"])
    other = learn(tiny_model, tmp_path / "2", 2, r=2, target_modules=["v_proj"])
    with pytest.raises(PsyrayError, match="the adapters have other layers"):
        stack([one / "adapter", other / "adapter"], tmp_path / "both")
    described = one / "adapter/adapter_config.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"use_dora": True}))
    with pytest.raises(PsyrayError, match="its use_dora is set"):
        stack([one / "adapter"], tmp_path / "both")
    with pytest.raises(PsyrayError, match="no LoRA adapter in"):
        chain(tmp_path)

"""The probe's forward passes in a Ray task, on the tiny random model, against torch by hand."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from made_stage import made_stage

from psyray.config import load_config
from psyray.evaluate.likelihood import Passage, likelihoods
from psyray.evaluate.probe import load_probe, probe_stage
from psyray.records import RESPONSES
from psyray.run import Run


def shaken(model: Path, path: Path) -> Path:
    """The model with other weights in one layer."""
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(model, path)
    moved = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(1)
    with torch.no_grad():
        moved.model.layers[1].mlp.down_proj.weight += 0.1 * torch.randn_like(moved.model.layers[1].mlp.down_proj.weight)
    moved.save_pretrained(path)
    return path


def by_hand(model: Path, before: str, text: str) -> list[float]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, net = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).eval()
    head, ids = tokenizer(before)["input_ids"], tokenizer(before + text)["input_ids"]
    with torch.no_grad():
        chances = net(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return [float(chances[i - 1, ids[i]]) for i in range(max(1, len(head)), len(ids))]


def test_the_policy_is_held_against_the_start_and_the_start_is_read_once(tmp_path, tiny_model, ray_cluster):
    moved = shaken(tiny_model, tmp_path / "moved")
    settings = [f"policy.model={tiny_model}", "engine.max_model_len=256", "evaluate.probe_answers=2"]
    config = load_config(None, settings)
    grey = "The days have grown long and grey."
    passages = [Passage("a", "I cannot sleep", " since he died"), Passage("b", "", grey)]
    [found, nothing] = likelihoods([(str(moved), passages), (str(tiny_model), [])], config, title="probe")
    assert not nothing and found["a"] == pytest.approx(by_hand(moved, "I cannot sleep", " since he died"), abs=0.05)
    assert found["b"] == pytest.approx(by_hand(moved, "", grey), abs=0.05)

    run = Run(tmp_path / "run")
    chat = [{"role": "user", "content": "I cannot sleep."}]
    rows = [{"response_id": f"r{i}", "speech_id": f"s{i}", "messages": chat, "split": "test", "status": "ok",
             "text": "You lie awake and it wears you out."} for i in range(3)]  # fmt: skip
    samples = made_stage(run, "samples", RESPONSES, "response_id", rows)
    same = probe_stage(run, 1, config, samples, str(tiny_model), str(tiny_model), None)
    other = probe_stage(run, 2, config, samples, str(moved), str(tiny_model), same)
    assert same and other
    assert same.stats["kl"] == 0 and same.stats["perplexity_rise"] == 0 and same.stats["capability_drop"] == 0
    assert other.stats["kl"] > 0 and other.stats["perplexity"] != other.stats["start_perplexity"]
    assert (other.stats["answers"], other.stats["questions"], other.stats["texts"]) == (2, 40, 30)
    assert other.stats["start_perplexity"] == pytest.approx(same.stats["perplexity"])
    assert len(other.rows()) == 2 + 30 + sum(len(options) for _, options, _ in load_probe("general").questions)

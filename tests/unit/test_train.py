"""What a training job reads back after it was cut off, and what it freezes."""

import json
import sys

import pytest

from psyray.train import (
    COMPLETE,
    deepspeed_config,
    freeze,
    last_checkpoint,
    log_step,
    read_steps,
    worker_environment,
)


def test_a_step_done_again_counts_once_and_a_half_written_line_not_at_all(tmp_path):
    lines = [json.dumps({"step": s, "loss": loss}) for s, loss in ((1, 0.9), (2, 0.8), (2, 0.7))]
    (tmp_path / "steps.jsonl").write_text("\n".join([*lines, '{"step": 3, "lo']))
    assert read_steps(tmp_path) == [{"step": 1, "loss": 0.9}, {"step": 2, "loss": 0.7}]
    assert read_steps(tmp_path / "nothing") == []


def test_what_is_logged_after_a_torn_line_stands_apart_from_it(tmp_path):
    log_step(tmp_path, {"step": 1, "loss": 0.9})
    with (tmp_path / "steps.jsonl").open("a") as log:
        log.write('{"step": 2, "lo')
    for step in (2, 3):
        log_step(tmp_path, {"step": step, "loss": 0.5})
    assert read_steps(tmp_path) == [{"step": 1, "loss": 0.9}, *({"step": s, "loss": 0.5} for s in (2, 3))]
    lines = (tmp_path / "steps.jsonl").read_text().splitlines()
    assert len(lines) == 4 and "" not in lines


def test_a_log_with_two_lines_in_one_does_not_stop_a_job(tmp_path):
    glued = '{"step": 2, "lo{"step": 2, "loss": 0.5}\n{"step": 3, "loss": 0.4}\n'
    (tmp_path / "steps.jsonl").write_text(glued)
    assert read_steps(tmp_path) == [{"step": 3, "loss": 0.4}]


def test_only_a_checkpoint_that_every_rank_finished_counts(tmp_path):
    for step in (50, 100, 150):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert last_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-50" / COMPLETE).touch()
    (tmp_path / "checkpoint-100" / COMPLETE).touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_whole_weights_are_gathered_where_they_are_sharded(stage):
    for gpu in (False, True):
        zero = deepspeed_config(stage, gpu)["zero_optimization"]
        assert zero["stage"] == stage and zero.get("stage3_gather_16bit_weights_on_model_save", False) == (stage == 3)


def test_a_gpu_computes_while_zero_3_fetches_weights():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    overlaps = [
        DeepSpeedZeroConfig(**deepspeed_config(3, gpu)["zero_optimization"]).overlap_comm for gpu in (False, True)
    ]
    assert overlaps == [False, True]


def test_the_lower_layers_stay_as_they_are(tiny_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    freeze(model, 0)
    assert all(p.requires_grad for p in model.parameters())
    freeze(model, 1)
    free = [all(p.requires_grad for p in layer.parameters()) for layer in model.model.layers]
    assert free == [False, True] and not model.get_input_embeddings().weight.requires_grad


def test_environments_that_share_a_cache_compile_apart_and_a_given_folder_stands(monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    here = worker_environment(gpu=False)["TORCH_EXTENSIONS_DIR"]
    assert worker_environment(gpu=False)["TORCH_EXTENSIONS_DIR"] == here
    monkeypatch.setattr(sys, "prefix", "/another/environment")
    assert worker_environment(gpu=False)["TORCH_EXTENSIONS_DIR"] != here
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/given")
    assert worker_environment(gpu=False)["TORCH_EXTENSIONS_DIR"] == "/given"

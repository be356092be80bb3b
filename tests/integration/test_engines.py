"""The real engines on the tiny random model: vLLM through Ray Data, DeepSpeed with two workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from psyray.config import ClusterSection, EngineSection, JudgeSection, TrainSection, load_config
from psyray.data.generate import answer_all, draw_row, starts
from psyray.engines.judges import ASKED, make_judge
from psyray.engines.vllm import cpu_environment
from psyray.errors import PsyrayError
from psyray.records import RESPONSES
from psyray.reward.score import RewardScorer
from psyray.reward.train import example, train_loop
from psyray.rubric import PREFERENCE, load_rubric, side_by_side
from psyray.run import Folder
from psyray.stream import stream
from psyray.train import run_training

ENGINE = EngineSection(max_model_len=640, max_num_seqs=8, kv_cache_gib=1)
LIMITS = ["engine.max_model_len=640", "engine.max_num_seqs=8", "engine.kv_cache_gib=1"]


def folder(tmp_path: Path) -> Folder:
    (tmp_path / "stage").mkdir(exist_ok=True)
    return Folder(tmp_path / "stage")


def draws(config, *texts: str) -> list[dict]:
    speeches = [
        {"speech_id": f"s{i}", "messages": [{"role": "user", "content": t}], "split": "train"}
        for i, t in enumerate(texts)
    ]
    return [draw_row(s, config.policy, "tiny", seed) for s in speeches for seed in (1, 2)]


def test_a_prompt_longer_than_the_context_fails_alone_and_is_tried_anew(tmp_path, tiny_model, ray_cluster):
    settings = [*LIMITS, f"policy.model={tiny_model}", "policy.max_tokens=8", "policy.system=''"]
    config = load_config(None, settings)
    rows = draws(config, "I cannot sleep.", "Nobody listens. " * 400, "My dog died.")
    with pytest.raises(PsyrayError, match=r"2 of 6 responses failed.*(longer|length)") as caught:
        answer_all(folder(tmp_path), lambda: rows, len(rows), config, title="responses")
    assert "aside-" in str(caught.value)
    assert len(folder(tmp_path).parts(RESPONSES, "response_id").ids) == 4
    lenient = load_config(None, [*settings, "responses.max_invalid_share=0.5"])
    stats = answer_all(folder(tmp_path), lambda: rows, len(rows), lenient, title="responses")
    assert (stats["ok"], stats["failed"]) == (4, 2)
    found = {row["response_id"]: row for row in folder(tmp_path).parts(RESPONSES, "response_id").each()}
    assert set(found) == {row["response_id"] for row in rows}
    bad = [row for row in found.values() if row["status"] != "ok"]
    assert {row["speech_id"] for row in bad} == {"s1"} and all(row["text"] is None and row["error"] for row in bad)


def lora_adapter(model: Path, path: Path) -> Path:
    """A LoRA adapter of the model that is far from doing nothing."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    worn = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(0)
    for name, weight in worn.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=1.0)
    worn.save_pretrained(path)
    return path


def test_responders_with_and_without_an_adapter_share_one_engine_start(tmp_path, tiny_model, ray_cluster):
    responders = [
        {"name": name, "model": str(tiny_model), "adapter": adapter, "temperature": 0, "max_tokens": 12, "system": ""}
        for name, adapter in (("bare", None), ("worn", str(lora_adapter(tiny_model, tmp_path / "adapter"))))
    ]
    config = load_config(None, [*LIMITS, "responses.k=2", f"responses.responders={json.dumps(responders)}",
                                "responses.max_invalid_share=1"])  # fmt: skip
    speech = {"speech_id": "s", "messages": [{"role": "user", "content": "I cannot sleep."}], "split": "train"}
    rows = [draw_row(speech, r, r.name, seed) for seed in range(4) for r in config.responses.responders]
    parts = folder(tmp_path).parts(RESPONSES, "response_id")
    assert starts(rows, parts) == {(str(tiny_model), "{}"): [str(tmp_path / "adapter")]}
    answer_all(folder(tmp_path), lambda: rows, len(rows), config, title="responses")
    found = list(folder(tmp_path).parts(RESPONSES, "response_id").each())
    assert {row["attempts"] for row in found} == {1} and not any("Error" in row["error"] for row in found)
    # Greedy: one text for each, in whatever batches the eight met.
    (bare,), (worn,) = ({row["raw_text"] for row in found if row["responder"] == name} for name in ("bare", "worn"))
    assert bare != worn


def test_vllm_judges_with_guided_decoding_and_soft_scores(tmp_path, tiny_model, ray_cluster):
    rubric = load_rubric("counselling")
    section = JudgeSection(engine="vllm", model=str(tiny_model), mode="soft", max_tokens=120)
    judge = make_judge(section, rubric, ENGINE.model_copy(update={"max_model_len": 1536}), 10)
    speech = [{"role": "user", "content": "I cannot sleep."}]
    todo = [{"key": str(i), "messages": speech, "response": text} for i, text in enumerate(("You lie awake.", "No."))]
    found: list[dict] = []
    rate = partial(judge.rate, folder=tmp_path / "calls")
    stream(folder(tmp_path), todo, rate, found.extend, title="judge", schema=ASKED, total=len(todo))
    assert {row["key"] for row in found} == {"0", "1"}
    for row in found:
        assert row["error"] == ""
        ratings = json.loads(row["ratings"])
        assert list(ratings) == rubric.keys and all(1 <= value <= 5 for value in ratings.values())
        assert any(value != round(value) for value in ratings.values())  # an expectation, not the digit
        assert rubric.parse(row["raw_text"]).keys() == ratings.keys()


def test_vllm_compares_with_nothing_but_the_three_words(tmp_path, tiny_model, ray_cluster):
    section = JudgeSection(engine="vllm", model=str(tiny_model), form="pairwise", max_tokens=8)
    judge = make_judge(section, load_rubric("counselling"), ENGINE.model_copy(update={"max_model_len": 1536}), 10)
    speech = [{"role": "user", "content": "I cannot sleep."}]
    texts = [("You lie awake.", "No."), ("No.", "You lie awake.")]
    todo = [{"key": str(i), "messages": speech, "response": side_by_side(*two)} for i, two in enumerate(texts)]
    found: list[dict] = []
    compare = partial(judge.compare, folder=tmp_path / "calls")
    stream(folder(tmp_path), todo, compare, found.extend, title="judge", schema=ASKED, total=len(todo))
    assert {row["key"] for row in found} == {"0", "1"}
    for row in found:
        assert row["error"] == "" and row["raw_text"] in PREFERENCE
        assert json.loads(row["ratings"]) == {"preference": PREFERENCE[row["raw_text"]]}


PAIRS = [
    {
        "messages": [{"role": "user", "content": f"I keep losing sleep over number {i}."}],
        "chosen": "You feel worn out and you wonder when it will end.",
        "rejected": "Just sleep more and stop thinking.",
        "margin": 1.0,
    }
    for i in range(16)
]
TRAIN = {"learning_rate": 5e-3, "batch_size": 8, "epochs": 4, "max_length": 128, "save_every": 3}


def trained(path: Path, model: Path, **train) -> list[dict[str, float]]:
    path.mkdir()
    return run_training(
        Folder(path),
        train_loop,
        [example(pair, use_margin=False) for pair in PAIRS],
        {"model": str(model), "center": 0.01, "seed": 0},
        TrainSection(**(TRAIN | train)),
        ENGINE,
        ClusterSection(),
        title="reward model",
    )


def test_two_zero3_workers_learn_what_one_zero2_worker_learns(tmp_path, tiny_model, ray_cluster):
    one = trained(tmp_path / "one", tiny_model, micro_batch=4, workers=1, zero_stage=2)
    two = trained(tmp_path / "two", tiny_model, micro_batch=2, workers=2, zero_stage=3)
    losses = np.array([[s["loss"] for s in steps] for steps in (one, two)])
    assert losses.shape == (2, 8) and losses[:, -1].max() < 0.3 < losses[:, 0].min()
    assert np.abs(losses[0] - losses[1]).max() < 0.1
    for name in ("one", "two"):
        scorer = RewardScorer(tmp_path / name / "model")
        chats = [p["messages"] for p in PAIRS]
        margins = scorer.scores(chats, [p["chosen"] for p in PAIRS]) - scorer.scores(
            chats, [p["rejected"] for p in PAIRS]
        )
        assert margins.min() > 0
        assert not (tmp_path / name / "checkpoints").exists()


CLASSIFY = """
import json, sys
from vllm import LLM, PoolingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], runner="pooling", dtype="float32", enforce_eager=True, max_model_len=256)
    found = llm.classify(json.loads(sys.argv[2]), pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
    print("SCORES", json.dumps([f.outputs.probs[0] for f in found]))
"""


def test_vllm_loads_the_reward_model_and_scores_as_we_do(tmp_path, tiny_model, ray_cluster):
    trained(tmp_path / "reward", tiny_model, micro_batch=4, workers=1, zero_stage=2, epochs=1)
    scorer = RewardScorer(tmp_path / "reward/model")
    chats, texts = [p["messages"] for p in PAIRS[:4]], [p["chosen"] for p in PAIRS[:4]]
    ours = scorer.scores(chats, texts)[:, 0]
    prompts = [
        scorer.tokenizer.apply_chat_template([*c, {"role": "assistant", "content": t}], tokenize=False).rstrip("\n")
        for c, t in zip(chats, texts, strict=True)
    ]
    environment = os.environ | cpu_environment(1) | {"VLLM_NO_USAGE_STATS": "1"}
    script = tmp_path / "classify.py"
    script.write_text(CLASSIFY)
    command = [sys.executable, str(script), str(tmp_path / "reward/model"), json.dumps(prompts)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout.split("SCORES", 1)[1])
    assert np.abs(np.array(theirs) - ours).max() < 0.05  # ours are computed in bfloat16

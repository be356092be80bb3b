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
from safetensors import safe_open

from psyray.config import load_config
from psyray.data.generate import answer_all, check_share, draw_row, starts
from psyray.engines.judges import ASKED, make_judge
from psyray.engines.vllm import cpu_environment
from psyray.errors import PsyrayError
from psyray.records import RESPONSES
from psyray.reward.groups import group_example
from psyray.reward.score import RewardScorer
from psyray.reward.train import make_trainer, measure, train_loop
from psyray.rubric import PREFERENCE, load_rubric, side_by_side
from psyray.run import Folder
from psyray.sections.data import EngineSection, JudgeSection
from psyray.sections.learning import TrainSection
from psyray.sections.place import ClusterSection
from psyray.stream import stream
from psyray.train import fit_and_save, prepare_worker, run_training, trainer_arguments

ENGINE = EngineSection(max_model_len=640, max_num_seqs=8, kv_cache_gib=1)
LIMITS = ["engine.max_model_len=640", "engine.max_num_seqs=8", "engine.kv_cache_gib=1"]


def folder(tmp_path: Path) -> Folder:
    (tmp_path / "stage").mkdir(exist_ok=True)
    return Folder(tmp_path / "stage")


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


@pytest.fixture(scope="module")
def answered(tiny_model, tmp_path_factory, ray_cluster) -> tuple[Path, list[dict], list[dict]]:
    """A stage that one engine start has answered, its draws and rows: some draws too long, some with an adapter."""
    path = tmp_path_factory.mktemp("answered")
    adapter = lora_adapter(tiny_model, path / "adapter")
    responders = [
        {"name": name, "model": str(tiny_model), "adapter": worn, "temperature": 0, "max_tokens": 12, "system": ""}
        for name, worn in (("bare", None), ("worn", str(adapter)))
    ]
    settings = [f"policy.model={tiny_model}", "policy.max_tokens=8", "policy.system=''", "responses.k=2"]
    settings += [f"responses.responders={json.dumps(responders)}", "responses.max_invalid_share=1"]
    config = load_config(None, [*LIMITS, *settings])
    rows = []
    for number, text in enumerate(("I cannot sleep.", "Nobody listens. " * 400, "My dog died.")):
        speech = {"speech_id": f"s{number}", "messages": [{"role": "user", "content": text}], "split": "train"}
        rows += [draw_row(speech, config.policy, "tiny", seed) for seed in (1, 2)]
        if number == 0:
            rows += [
                draw_row(speech, r, r.name, seed, r.name) for seed in range(4) for r in config.responses.responders
            ]
    parts = folder(path).parts(RESPONSES, "response_id")
    assert starts(rows, parts) == {(str(tiny_model), "{}"): [str(adapter)]}
    answer_all(folder(path), lambda: rows, len(rows), config, title="responses")
    return path, rows, list(folder(path).parts(RESPONSES, "response_id").each())


def test_a_prompt_longer_than_the_context_fails_alone_and_is_tried_anew(answered):
    path, rows, found = answered
    assert len(found) == len(rows) == 14 and {row["response_id"] for row in found} == {r["response_id"] for r in rows}
    own = [row for row in found if not row["responder"]]
    bad = [row for row in own if row["status"] != "ok"]
    assert len(own) == 6 and [row["speech_id"] for row in bad] == ["s1", "s1"]
    assert all(row["text"] is None and "length" in row["error"] for row in bad)
    # Where so many may not fail, they are taken out, and the same command asks for them again.
    parts = folder(path).parts(RESPONSES, "response_id")
    with pytest.raises(PsyrayError, match=r"of 14 responses failed.*aside-"):
        check_share(parts, 0.1, "responses")
    assert not parts.ids & {row["response_id"] for row in bad} and starts(rows, parts)


def test_responders_with_and_without_an_adapter_share_one_engine_start(answered):
    found = [row for row in answered[-1] if row["responder"]]
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
        assert row["error"] == "" and row["latency_s"] > 0
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
    for i in range(13)  # the last step of an epoch is no whole one, nor divides it among workers or batches
]
TRAIN = {"learning_rate": 5e-3, "batch_size": 8, "epochs": 4, "max_length": 128, "save_every": 3}
SLOWER = TRAIN | {"learning_rate": 2e-3}


def trained(path: Path, model: Path, loop=train_loop, **train) -> list[dict[str, float]]:
    path.mkdir()
    return run_training(
        Folder(path),
        loop,
        [group_example([pair], use_margin=False) for pair in PAIRS],
        {"model": str(model), "smoothing": 0.0, "center": 0.01, "seed": 0},
        TrainSection(**(TRAIN | train)),
        ENGINE,
        ClusterSection(),
        title="reward model",
    )


def margins(model: Path) -> np.ndarray:
    scorer, chats = RewardScorer(model), [p["messages"] for p in PAIRS]
    chosen, rejected = (scorer.scores(chats, [p[side] for p in PAIRS]) for side in ("chosen", "rejected"))
    return chosen - rejected


@pytest.fixture(scope="module")
def reward_start(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a score head: one that is missing is drawn in an order that ZeRO-3 changes."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = tmp_path_factory.mktemp("reward-start")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.bfloat16)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(path)
    return path


Trained = tuple[Path, list[dict[str, float]]]  # the job's folder, and its steps


@pytest.fixture(scope="module")
def whole(reward_start: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Trained:
    """Trained by one worker, each step's 8 pairs in one go."""
    path = tmp_path_factory.mktemp("trained") / "whole"
    return path, trained(path, reward_start, **SLOWER, micro_batch=8, workers=1, zero_stage=2)


def test_two_workers_learn_what_one_learns_under_each_zero_stage_however_the_batch_is_split(
    tmp_path, reward_start, whole, ray_cluster
):
    def run(name: str, **train: int) -> Trained:
        return tmp_path / name, trained(tmp_path / name, reward_start, **SLOWER, **train)

    runs = [
        # A step's 8 pairs in one go, in two halves, and by two workers in halves or four quarters of their share.
        whole,
        run("one", micro_batch=4, workers=1, zero_stage=2),
        run("shared", micro_batch=1, workers=2, zero_stage=1),
        run("two", micro_batch=2, workers=2, zero_stage=2),
        run("three", micro_batch=2, workers=2, zero_stage=3),
    ]
    losses = np.array([[s["loss"] for s in steps] for _, steps in runs])
    assert losses.shape == (5, 8) and losses[:, -1].max() < 0.3 < losses[:, 0].min()
    assert np.ptp(losses, axis=0).max() < 0.01
    gaps = np.stack([margins(path / "model") for path, _ in runs])
    assert gaps.min() > 0 and np.ptp(gaps, axis=0).max() < 0.05
    for path, _ in runs:
        assert not (path / "checkpoints").exists()
        # What ZeRO-3 spread is gathered whole, in 16 bits.
        with safe_open(path / "model/model.safetensors", framework="pt") as weights:
            shapes = {key: weights.get_slice(key).get_shape() for key in weights.keys()}  # noqa: SIM118 (no dict)
            assert {weights.get_slice(key).get_dtype() for key in shapes} == {"BF16"}
        assert shapes["score.weight"] == [1, 128] and shapes["model.embed_tokens.weight"][1] == 128
        assert sum("layers.1." in key for key in shapes) == 9


def test_an_adapter_spread_by_zero_3_goes_on_after_a_crash_and_ends_as_a_plain_model(tmp_path, tiny_model, ray_cluster):
    def cut_off_once(config):
        from transformers import TrainerCallback

        cut = Path(config["folder"]) / "cut"

        class Cut(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                if state.global_step == 5 and not cut.exists():
                    if state.is_world_process_zero:
                        cut.touch()
                    raise RuntimeError("cut off")

        prepare_worker(config)
        trainer = make_trainer(config, trainer_arguments(config))
        trainer.add_callback(Cut())
        fit_and_save(trainer, config, measure)

    lora = {"rank": 8, "alpha": 16}
    steps = trained(
        tmp_path / "run", tiny_model, cut_off_once, lora=lora, micro_batch=2, workers=2, zero_stage=3,
        learning_rate=2e-2, gradient_checkpointing=True,
    )  # fmt: skip
    logged = [json.loads(line)["step"] for line in (tmp_path / "run/steps.jsonl").read_text().splitlines()]
    assert (tmp_path / "run/cut").exists() and logged.count(1) == 1 and logged.count(4) == 2  # from checkpoint 3
    assert [s["step"] for s in steps] == list(range(1, 9)) and steps[-1]["loss"] < 0.3 < steps[0]["loss"]
    names = {path.name for path in (tmp_path / "run/model").iterdir()}
    assert "model.safetensors" in names and not any("adapter" in name for name in names)
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()
    assert margins(tmp_path / "run/model").min() > 0


CLASSIFY = """
import json, sys
from vllm import LLM, PoolingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], runner="pooling", dtype="float32", enforce_eager=True, max_model_len=256)
    found = llm.classify(json.loads(sys.argv[2]), pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
    print("SCORES", json.dumps([f.outputs.probs[0] for f in found]))
"""


def test_vllm_loads_the_reward_model_and_scores_as_we_do(tmp_path, whole):
    from transformers import AutoTokenizer

    model = whole[0] / "model"
    scorer, tokenizer = RewardScorer(model), AutoTokenizer.from_pretrained(model)
    chats, texts = [p["messages"] for p in PAIRS[:4]], [p["chosen"] for p in PAIRS[:4]]
    ours = scorer.scores(chats, texts)[:, 0]
    prompts = [
        tokenizer.apply_chat_template([*c, {"role": "assistant", "content": t}], tokenize=False).rstrip("\n")
        for c, t in zip(chats, texts, strict=True)
    ]
    environment = os.environ | cpu_environment(1) | {"VLLM_NO_USAGE_STATS": "1"}
    script = tmp_path / "classify.py"
    script.write_text(CLASSIFY)
    command = [sys.executable, str(script), str(model), json.dumps(prompts)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout.split("SCORES", 1)[1])
    assert np.abs(np.array(theirs) - ours).max() < 0.05  # ours are computed in bfloat16

"""A round of the online loop beside TRL's experimental online DPO: same models, prompts, number of pairs and machine.

    python benchmarks/round_time.py --pairs 16 64 --repeats 2

For each number of pairs and repeat both train the embedded model on two fresh answers to each of as many prompts,
labelled by the same reward model (the embedded model with a random score head), with batches of --batch pairs, one
epoch, beta 0.1 and the sigmoid loss, each side in a process of its own, one after the other. The clock runs from
loaded code and a started Ray to the saved policy, so that models and engines that a side loads for its round count.

psyray's round is the stages of `psyray.loop` as a run has them: sampling by vLLM (its start apart), features and
scores, labels, DPO under Ray Train and DeepSpeed with fp32 master weights, checkpoints left out. TRL's is
`OnlineDPOTrainer` with what works without a GPU: transformers' generation within the step, weights and optimiser in
bfloat16. Its parts are timed around its own methods; `training` is the rest of its steps. A prompt whose two answers
are one text, or no text, makes no pair at psyray and is trained on at TRL: both numbers of pairs are reported.

The last line is JSON: seconds by part, and psyray's seconds over TRL's with the range over the repeats.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from apart import last_line

TOKENS, TEMPERATURE, BETA, RATE, LENGTH = 32, 0.7, 0.1, 5e-6, 512
Seconds = dict[str, float]


def prompts(count: int, system: str) -> list[list[dict[str, str]]]:
    """`count` conversations over the shipped speeches."""
    from prompts import conversation

    before = [{"role": "system", "content": system}] if system else []
    return [before + conversation(i) for i in range(count)]


# ---------------------------------------------------------------- psyray's round


def ours(place: Path, pairs: int, batch: int) -> dict[str, Any]:
    """Seconds of one round by part."""
    import numpy as np

    from psyray import loop
    from psyray.active.labelling import labels_stage
    from psyray.cluster import ray_session
    from psyray.config import load_config
    from psyray.models import model_identity, resolve_model
    from psyray.pipeline import open_desk
    from psyray.records import SPEECHES, speech_id
    from psyray.reward.ensemble import features_stage, scores_stage
    from psyray.reward.heads import Heads, own_head
    from psyray.run import Folder, Run

    train = {"learning_rate": RATE, "batch_size": batch, "micro_batch": batch, "max_length": LENGTH, "save_every": 9999}
    config = load_config(None, [
        f"run.path={place}/run", f"policy.max_tokens={TOKENS}", f"policy.temperature={TEMPERATURE}",
        "engine.max_num_seqs=256", "loop.rounds=1", f"loop.prompts={pairs}", "loop.k=2", "loop.budget=0",
        "loop.reward_margin=0.0", f"dpo.beta={BETA}", "dpo.loss_type=[sigmoid]", "dpo.loss_weights=[1.0]",
        f"dpo.train={json.dumps(train)}",
    ])  # fmt: skip

    def speak(folder: Folder) -> Mapping[str, Any]:
        about = {"split": "train", "answered": False}
        rows = [{"speech_id": speech_id(said), "messages": said, **about} for said in prompts(pairs, "")]
        folder.keep(SPEECHES, "speech_id", rows)
        return {}

    def adopt(folder: Folder) -> Mapping[str, Any]:
        (folder.path / "model").symlink_to(place / "reward")
        return {}

    def own(folder: Folder) -> Mapping[str, Any]:
        head_D = own_head(reward.model)
        Heads(head_D[None], np.zeros_like(head_D), np.ones_like(head_D)).save(folder.path / "heads.npz")
        return {}

    run = Run(config.run.path, lambda line: None)
    with run.open({}), ray_session(config):
        desk = open_desk(config, run)
        speeches, reward = run.stage("speeches", {}, [], speak), run.stage("reward", {}, [], adopt)
        heads = run.stage("reward-heads", {}, [reward], own)
        start = loop.Policy(0, resolve_model(config.policy.model), model_identity(config.policy.model))
        began = time.monotonic()
        samples = loop.samples_again(run, 0, config, speeches, start)
        sampled, start_s = time.monotonic(), float(samples.stats["engine_start_s"])
        features = features_stage(run, "features", config, reward, samples.rows(), samples)
        scores_stage(run, "scores", heads, features, samples)
        scored = time.monotonic()
        labels = labels_stage(run, 1, config, desk, heads, features, samples)
        labelled = time.monotonic()
        loop.policy_stage(run, 1, config, labels, loop.Seen((features,), (labels,)), start, start)
        ended = time.monotonic()
    parts = {
        "engine start": start_s, "sampling": sampled - began - start_s, "scoring": scored - sampled,
        "labels": labelled - scored, "training": ended - labelled,
    }  # fmt: skip
    tokens = sum(row["tokens"] or 0 for row in samples.rows())
    return {"seconds": ended - began, "pairs": labels.manifest["rows"], "tokens": tokens, "parts": parts}


# ---------------------------------------------------------------- TRL's


def theirs(place: Path, pairs: int, batch: int) -> dict[str, Any]:
    """Seconds of one epoch of OnlineDPOTrainer by part."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    from psyray.models import embedded_model
    from psyray.sections.data import COUNSELLOR

    seconds: Seconds = defaultdict(float)
    generated = 0

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*arguments: Any, **named: Any) -> Any:
            began = time.monotonic()
            result = call(*arguments, **named)
            seconds[part] += time.monotonic() - began
            return result

        return timing

    def sampling(*arguments: Any, **named: Any) -> Any:
        nonlocal generated
        result = generate(*arguments, **named)
        generated += int(result[3].sum())
        return result

    began = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    arguments = OnlineDPOConfig(
        output_dir=str(place / "trl"), per_device_train_batch_size=batch, num_train_epochs=1, learning_rate=RATE,
        beta=[BETA], max_new_tokens=TOKENS, max_length=LENGTH, temperature=TEMPERATURE, bf16=False, use_cpu=True,
        gradient_checkpointing=False, save_strategy="no", report_to=[], logging_steps=1, disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = OnlineDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.bfloat16),
        reward_funcs=AutoModelForSequenceClassification.from_pretrained(place / "reward", dtype=torch.bfloat16),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts(pairs, COUNSELLOR)]),
        processing_class=tokenizer,
        reward_processing_classes=tokenizer,
    )
    generate = trainer._generate
    trainer._generate = timed("sampling", sampling)
    trainer._calculate_rewards_from_functions = timed("scoring", trainer._calculate_rewards_from_functions)
    started = time.monotonic()
    trainer.train()
    trainer.save_model(str(place / "trl-model"))
    ended = time.monotonic()
    parts = {"loading": started - began} | seconds
    parts["training"] = ended - began - sum(parts.values())
    return {"seconds": ended - began, "pairs": pairs, "tokens": generated, "parts": parts}


# ---------------------------------------------------------------- side by side


def measured(which: str, place: Path, pairs: int, batch: int) -> dict[str, Any]:
    """One measurement in a process and a folder of its own."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        shutil.copytree(place / "reward", Path(folder) / "reward", copy_function=shutil.copyfile)
        words = ("--one", which, "--path", folder, "--pairs", pairs, "--batch", batch)
        return dict(json.loads(last_line(__file__, *words)))


def compare(place: Path, pairs: int, batch: int, repeats: int) -> dict[str, Any]:
    """Both sides at one number of pairs: medians over the repeats, and the ratio."""
    found = [(measured("psyray", place, pairs, batch), measured("trl", place, pairs, batch)) for _ in range(repeats)]
    ratios = [a["seconds"] / b["seconds"] for a, b in found]
    row: dict[str, Any] = {"pairs": pairs}
    for side, name in enumerate(("psyray", "trl")):
        runs = [both[side] for both in found]
        parts = {part: round(statistics.median(run["parts"][part] for run in runs), 1) for part in runs[0]["parts"]}
        row[name] = {
            "seconds": round(statistics.median(run["seconds"] for run in runs), 1),
            "pairs trained on": [run["pairs"] for run in runs],
            "tokens sampled": [run["tokens"] for run in runs],
            "parts": parts,
        }
    row["ratio"] = round(statistics.median(ratios), 2)
    row["ratio_range"] = [round(min(ratios), 2), round(max(ratios), 2)]
    return row


def table(row: Mapping[str, Any]) -> str:
    """One number of pairs as lines of text."""
    lines = [
        f"{row['pairs']} pairs: psyray / TRL = {row['ratio']} ({row['ratio_range'][0]} to {row['ratio_range'][1]})"
    ]
    for name in ("psyray", "trl"):
        parts = "  ".join(f"{part} {seconds:.1f}" for part, seconds in row[name]["parts"].items())
        lines.append(f"  {name:7} {row[name]['seconds']:7.1f} s   {parts}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[16, 64], help="prompts of a round, one pair each")
    parser.add_argument("--batch", type=int, default=8, help="pairs in a step")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--one", choices=["psyray", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps({"psyray": ours, "trl": theirs}[given.one](given.path, given.pairs[0], given.batch)))
        return
    from made_champion import reward_model

    from psyray.models import embedded_model

    found = []
    with tempfile.TemporaryDirectory() as place:
        reward_model(embedded_model(), Path(place) / "reward")
        for pairs in given.pairs:
            found.append(compare(Path(place), pairs, given.batch, given.repeats))
            print(table(found[-1]), flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""The reward model: Bradley-Terry on preference pairs, by TRL's RewardTrainer under Ray Train and DeepSpeed.

Saved as a Hugging Face sequence-classification model with one label, which vLLM loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from psyray.config import Config
from psyray.errors import PsyrayError
from psyray.models import model_identity, resolve_model
from psyray.records import Row
from psyray.run import Artifact, Folder, Run
from psyray.train import fit_and_save, freeze, prepare_worker, run_training, trainer_arguments


def reward_stage(run: Run, config: Config, pairs: Artifact) -> Artifact:
    """The stage `reward`: a sequence-classification model trained on the training pairs."""
    section = config.reward
    settings = section.model_dump(exclude={"heads"}) | {"model": model_identity(section.model), "seed": config.run.seed}

    def make(folder: Folder) -> Mapping[str, Any]:
        examples = [example(row, section.use_margin) for row in pairs.rows() if row["split"] == "train"]
        if not examples:
            raise PsyrayError("no training pair is left for the reward model; lower pairs.gap or give more speeches")
        loop_settings = {"model": resolve_model(section.model), "center": section.center, "seed": config.run.seed}
        steps = run_training(
            folder,
            train_loop,
            examples,
            loop_settings,
            section.train,
            config.engine,
            config.cluster,
            title="reward model",
        )
        return {"train_pairs": len(examples), "steps": steps}

    return run.stage("reward", settings, [pairs], make)


def example(pair: Row, use_margin: bool) -> Row:
    """A pair as TRL's RewardTrainer takes it."""
    sides = {side: [{"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected")}
    return {"prompt": pair["messages"], **sides, **({"margin": pair["margin"]} if use_margin else {})}


def train_loop(config: dict[str, Any]) -> None:
    """The worker: `config` holds {model, center, seed, train, examples, folder, gpu, threads}."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    prepare_worker(config)
    arguments = RewardConfig(center_rewards_coefficient=config["center"] or None, **trainer_arguments(config))
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    model = AutoModelForSequenceClassification.from_pretrained(config["model"], num_labels=1, dtype="bfloat16")
    freeze(model, config["train"]["freeze_layers"])
    trainer = RewardTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_parquet(config["examples"]),
        processing_class=tokenizer,
    )
    fit_and_save(trainer, config)

"""The policy: direct preference optimisation (arXiv 2305.18290) by TRL under Ray Train and DeepSpeed."""

from __future__ import annotations

from typing import Any

from psyray.config import Config
from psyray.data.generate import with_system
from psyray.records import Row
from psyray.run import Folder
from psyray.train import fit_and_save, freeze, prepare_worker, run_training, trainer_arguments


def train_policy(folder: Folder, config: Config, pairs: list[Row], policy: str, reference: str, *, title: str) -> Any:
    """Train `policy` on the pairs against the frozen `reference` into `folder/model`. Returns the steps."""
    examples = [example(pair, config.policy.system) for pair in pairs]
    settings = {
        "model": policy,
        "reference": reference,
        "beta": config.dpo.beta,
        "loss_type": config.dpo.loss_type,
        "loss_weights": config.dpo.loss_weights,
        "seed": config.run.seed,
    }
    return run_training(
        folder, train_loop, examples, settings, config.dpo.train, config.engine, config.cluster, title=title
    )


def example(pair: Row, system: str) -> Row:
    """A pair as TRL's DPOTrainer takes it, under the system prompt that the policy is sampled with."""
    sides = {side: [{"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected")}
    return {"prompt": with_system(pair["messages"], system), **sides}


def train_loop(config: dict[str, Any]) -> None:
    """The worker: `config` holds the settings of `train_policy` and what `run_training` adds."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    prepare_worker(config)
    losses = {key: config[key] for key in ("beta", "loss_type", "loss_weights")}
    arguments = DPOConfig(**losses, **trainer_arguments(config))
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    model = AutoModelForCausalLM.from_pretrained(config["model"], dtype="bfloat16")
    reference = AutoModelForCausalLM.from_pretrained(config["reference"], dtype="bfloat16")
    freeze(model, config["train"]["freeze_layers"])
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        args=arguments,
        train_dataset=Dataset.from_parquet(config["examples"]),
        processing_class=tokenizer,
    )
    fit_and_save(trainer, config)

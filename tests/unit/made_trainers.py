"""TRL's trainers as a job makes them, over four pairs, in this process and without DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from psyray.policy import dpo
from psyray.reward import train as reward
from psyray.reward.groups import group_example
from psyray.sections.learning import DpoSection, LoraSection, TrainSection
from psyray.train import trainer_arguments, write_examples

LORA = LoraSection(rank=4, alpha=8)
PAIRS = [
    {
        "messages": [{"role": "user", "content": f"I keep losing sleep over number {i}."}],
        "chosen": "You feel worn out and you wonder when it will end.",
        "rejected": "Just sleep more and stop thinking about it all the time.",
        "margin": 1.0,
    }
    for i in range(4)
]


def settings(path: Path, model: Path, examples: list[dict[str, Any]], lora: LoraSection | None) -> dict[str, Any]:
    train = TrainSection(learning_rate=0.02, batch_size=4, micro_batch=4, max_length=128, warmup_share=0, lora=lora)
    write_examples(path / "examples.parquet", examples)
    return {
        "model": str(model), "examples": str(path / "examples.parquet"), "folder": str(path), "gpu": False, "seed": 0,
        "train": train.model_dump(),
    }  # fmt: skip


def arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Those of a job, without DeepSpeed: without it bf16 wants a GPU; the models are in bfloat16 all the same."""
    given = {key: value for key, value in trainer_arguments(config).items() if key != "deepspeed"}
    return given | {"bf16": False, "save_strategy": "no"}


def reward_trainer(path: Path, model: Path, lora: LoraSection | None, **more: Any) -> Any:
    config = settings(path, model, [group_example([pair], False) for pair in PAIRS], lora)
    return reward.make_trainer(config | {"smoothing": 0.0, "center": 0.01} | more, arguments(config))


def dpo_trainer(
    path: Path,
    model: Path,
    reference: Path,
    lora: LoraSection | None,
    more: dict[str, Any] | None = None,
    **section: Any,
) -> Any:
    config = settings(path, model, [dpo.example(pair, "", {}) for pair in PAIRS], lora)
    losses = DpoSection(**({"loss_type": ["sigmoid"], "loss_weights": [1.0]} | section))
    config |= {"reference": str(reference), "loss": dpo.loss_arguments(losses)} | (more or {})
    return dpo.make_trainer(config, arguments(config))

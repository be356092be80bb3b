"""LoRA (arXiv 2106.09685) in a training job: an adapter learns, and the job still ends with a plain model.

The adapter is kept beside the model, in `folder/adapter`, for those who want to serve many on one base.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal


def adapter_config(train: Mapping[str, Any], task: Literal["SEQ_CLS", "CAUSAL_LM"]) -> Any | None:
    """What TRL's trainers take as `peft_config`; None where all weights are trained.

    A reward model's new score head is trained whole: it starts at random.
    """
    if not (lora := train["lora"]):
        return None
    from peft import LoraConfig

    return LoraConfig(
        task_type=task,
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=lora["targets"] or "all-linear",
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )


def merge_adapter(trainer: Any, base: str, adapter: Path, out: Path) -> None:
    """Write the base with the saved adapter merged into it as a plain Hugging Face folder; for one process alone.

    The base is read anew, so that the weights that ZeRO spread over the workers need not be gathered for it: one
    copy in bfloat16 in the main memory of the worker that merges.
    """
    import torch
    from peft import PeftModel
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # or the base would be spread over workers that are not here
    trained = trainer.model.get_base_model()
    plain = type(trained).from_pretrained(base, config=trained.config, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(plain, adapter).merge_and_unload()
    merged.save_pretrained(out)
    trainer.processing_class.save_pretrained(out)

"""LoRA (arXiv 2106.09685) in a training job: an adapter learns, and the job still ends with a plain model.

The adapter is kept beside the model, in `folder/adapter`, for those who want to serve many on one base. A later round's
adapter fits the model that the round before left; `stack` makes one of all of them that fits the first round's start.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from psyray.engines.vllm import ADAPTER, adapter_base, is_adapter
from psyray.errors import PsyrayError
from psyray.origin import note_origin


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


def chain(adapter: Path) -> list[Path]:
    """The adapter and those that its base was merged from, the first trained first.

    A base that a stage merged, FOLDER/model, has its adapter beside it, in FOLDER/adapter.
    """
    found = [adapter]
    while is_adapter(before := Path(adapter_base(found[0])).parent / "adapter"):
        found.insert(0, before)
    return found


def stack(adapters: Sequence[Path], out: Path) -> int:
    """Write one adapter on the first one's base that adds what all of them add; its rank, the sum of theirs.

    Its origin (psyray/origin.py) is the last one's.

    W + s1 B1 A1 + s2 B2 A2 = W + [s1 B1, s2 B2] [A1; A2]: exact, where merging one after the other rounds each time.
    PsyrayError for an adapter that is more than such a product.
    """
    import torch
    from safetensors.torch import load_file, save_file

    settings = [json.loads((folder / ADAPTER).read_text()) for folder in adapters]
    for folder, known in zip(adapters, settings, strict=True):
        if odd := [key for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern") if known.get(key)]:
            raise PsyrayError(f"{folder} cannot be stacked: its {odd[0]} is set, and only plain LoRA adds up")
    rows: dict[str, list[Any]] = {}
    for folder, known in zip(adapters, settings, strict=True):
        scale = known["lora_alpha"] / (known["r"] ** 0.5 if known.get("use_rslora") else known["r"])
        for name, weight in load_file(folder / "adapter_model.safetensors").items():
            rows.setdefault(name, []).append(weight.float() if ".lora_A." in name else scale * weight.float())
    if short := [name for name, weights in rows.items() if len(weights) != len(adapters)]:
        raise PsyrayError(
            f"the adapters have other layers: {short[0]} is not in all of {', '.join(map(str, adapters))}"
        )
    stacked = {name: torch.cat(weights, dim=0 if ".lora_A." in name else 1) for name, weights in rows.items()}
    rank = sum(int(known["r"]) for known in settings)
    out.mkdir(parents=True, exist_ok=True)
    save_file(stacked, out / "adapter_model.safetensors", {"format": "pt"})
    (out / ADAPTER).write_text(
        json.dumps({**settings[0], "r": rank, "lora_alpha": rank, "use_rslora": False}, indent=1)
    )
    note_origin(adapters[-1], out)
    return rank

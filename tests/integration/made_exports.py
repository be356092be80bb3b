"""Stand-ins for finished runs: tiny random models under the files that a run's export leaves, in a real registry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from psyray.reward.heads import Heads
from psyray.reward.ratings import RATINGS, RatingHeads
from psyray.rubric import load_rubric

SIZE, HEADS = 64, 5
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ENGINE = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "kv_cache_gib": 1}


def save_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    words = "My sister moved abroad and the flat is too quiet in the evenings. What was it like to say that aloud?"
    bpe.train_from_iterator([words], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_llama(folder: Path, seed: int, *, labels: int | None) -> Path:
    """A random Llama of two layers: a language model, or with `labels` a reward model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    tokenizer = save_tokenizer(folder)
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 400,
        "hidden_size": SIZE,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 1024,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    kind = LlamaForCausalLM if labels is None else LlamaForSequenceClassification
    kind(LlamaConfig(**shape, **({} if labels is None else {"num_labels": labels}))).save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, seed: int) -> Path:
    """A LoRA adapter on the model in `base` whose weights are large enough to change what it says."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    return folder


def save_heads(folder: Path, seed: int) -> Path:
    """An ensemble of heads and heads for the seven principles, both random."""
    rng = np.random.default_rng(seed)
    Heads(rng.normal(size=(HEADS, SIZE)), np.zeros(SIZE), np.ones(SIZE)).save(folder / "heads.npz")
    rubric = load_rubric("counselling")
    count = len(rubric.keys)
    ratings = RatingHeads(
        tuple(rubric.keys), np.ones(count), rng.normal(size=(count, SIZE)), np.full(count, 3.0), np.zeros(SIZE),
        np.ones(SIZE), 1.0,
    )  # fmt: skip
    ratings.save(folder / RATINGS)
    return folder / "heads.npz"


def save_run(run: Path, number: int, fingerprint: str) -> Path:
    """A finished run whose champion is the policy of round `number`."""
    export = run / "stages/export" / fingerprint
    export.mkdir(parents=True)
    policy = save_llama(run / "policy", number, labels=None)
    reward = save_llama(run / "reward", number + 10, labels=1)
    settings = {"path": str(policy), "temperature": 0.0, "top_p": 1.0, "max_tokens": 12, "system": "Be kind."}
    heads = str(save_heads(run, number))
    champion = {
        "policy": {"name": f"psyray-round-{number}", "round": number, **settings},
        "reward": {"name": "psyray-reward", "path": str(reward), "heads": heads, "max_length": 256},
        "run": str(run),
        "id": fingerprint,
    }
    for folder in (run, export):
        (folder / "champion.json").write_text(json.dumps(champion))
    manifest = {"stage": "export", "fingerprint": fingerprint, "stats": champion, "config": {}, "inputs": {}}
    (export / "manifest.json").write_text(json.dumps(manifest))
    (run / "run.json").write_text(json.dumps({"stages": [{"name": "export", "fingerprint": fingerprint}]}))
    (run / "config.yaml").write_text(yaml.safe_dump({"engine": ENGINE}))
    return run


def register(tracking: str, *runs: Path) -> None:
    """Every run's export in the registry, as `psyray run` leaves it, the first run's as champion."""
    from psyray.mlflow_client import registry

    with registry(tracking) as client:
        for name in ("psyray-policy", "psyray-reward"):
            client.create_registered_model(name)
            for run in runs:
                champion = json.loads((run / "champion.json").read_text())
                tags = {"run": str(run), "psyray.fingerprint": champion["id"]}
                client.create_model_version(name, (run / name.removeprefix("psyray-")).as_uri(), tags=tags)
            client.set_registered_model_alias(name, "champion", "1")

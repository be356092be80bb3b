"""A reward model with random weights, and what peft reads under one of its adapters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def save_scored(model: Path, folder: Path) -> None:
    """The model with a score head, random by seed, and its tokenizer."""
    torch.manual_seed(0)
    scored = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.bfloat16)
    scored.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def by_peft(model: Path, chat: list[dict[str, str]], number: int, layer: int = -1) -> tuple[np.ndarray, float]:
    """(state of the last token, score) under one adapter that is loaded alone, of one chat that is read alone."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    whole = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.bfloat16)
    worn = PeftModel.from_pretrained(whole, model / "adapters" / str(number)).eval()
    ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\n"))["input_ids"]
    with torch.inference_mode():
        states = worn(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        score = worn.base_model.model.score(states[-1][0, -1])  # the tiny model's end of a chat is its padding
    return states[layer][0, -1].float().numpy(), float(score)

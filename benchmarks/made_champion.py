"""What the benchmarks of serving serve: the files of a finished run around the embedded model, or a tiny random one."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from kills import tiny_model

from psyray.cluster import ray_session
from psyray.config import Config
from psyray.models import embedded_model
from psyray.sections.data import EngineSection
from serve.request import serving

ENGINE = EngineSection(max_model_len=1024, max_num_seqs=64, kv_cache_gib=1)
SYSTEM = "You are a counsellor talking with a client."
MAX_LENGTH = 512
FIRST, SECOND = (secrets.token_hex(24) for _ in range(2))  # tokens of two keys


def made_run(home: Path, *, tiny: bool, engine: EngineSection = ENGINE) -> Path:
    """A finished run: a policy, and a reward model of the same body with a random score head."""
    policy = tiny_model(home / "policy") if tiny else embedded_model()
    reward = reward_model(policy, home / "reward")
    champion = {
        "policy": {"name": "benchmark", "path": str(policy), "round": 0, "system": SYSTEM, "temperature": 0.0},
        "reward": {"name": "benchmark-reward", "path": str(reward), "heads": None, "max_length": MAX_LENGTH},
        "run": str(home),
        "id": "benchmark",
    }
    (home / "champion.json").write_text(json.dumps(champion))
    (home / "config.yaml").write_text(yaml.safe_dump({"engine": engine.model_dump()}))
    (home / "keys").write_text(f"first chat,score {FIRST}\nsecond chat,score {SECOND}\n")
    return home


def reward_model(body: Path, folder: Path) -> Path:
    """A sequence-classification model with one score on the body, its head random by seed."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(body, num_labels=1, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(body)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def up(run: Path, **words: str) -> Iterator[str]:
    """The address of the run, served in a Ray of its own."""
    asked = {"run": str(run), "device": "cpu", "keys": str(run / "keys"), "per_minute": "10000000", "in_flight": "2000"}
    with ray_session(Config()), serving({**asked, **words}, say=lambda line: None, start_timeout_s=900) as url:
        yield url


def bearer(token: str = FIRST) -> dict[str, Any]:
    """The header that opens the port."""
    return {"Authorization": f"Bearer {token}"}

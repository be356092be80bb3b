"""Shared fixtures: one Ray session, a tiny random model that every real engine loads, the runs of the whole path."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# Before ray, vLLM or DeepSpeed are imported anywhere. A second thread is no help with matrices this small, and at every
# product it waits for its turn on a core that is taken.
os.environ.update({"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"})
# A training job of seconds is not left waiting for Ray's next look at it.
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer Llama with random weights and a tokenizer trained on the shipped speeches."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from psyray.data.speeches import SHIPPED

    folder = tmp_path_factory.mktemp("tiny") / "model"
    texts = [json.loads(line)["text"] for line in SHIPPED.read_text().splitlines()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1024, special_tokens=special, initial_alphabet=alphabet)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, bos_token_id=0,
        eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def whole_path(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Path]]:
    """Waits for a run of whole_path.py, which its tests name as a fixture, and gives its folder.

    The runs begin before the first test of any kind and end while others pass: most of their time goes into imports
    on one core, and the unit tests, which come first, need the other.
    """
    runs: dict[str, tuple[Path, subprocess.Popen[str]]] = {}
    named = {name for item in request.session.items for name in item.fixturenames}
    for name in sorted(named & {"undisturbed", "killed"}):
        home, model = tmp_path_factory.mktemp(name) / "runs", request.getfixturevalue("tiny_model")
        home.mkdir()
        words = map(str, (sys.executable, HERE / "whole_path.py", name, model, home))
        runs[name] = home, subprocess.Popen([*words], stderr=subprocess.PIPE, text=True, start_new_session=True)

    def ended(name: str) -> Path:
        home, process = runs[name]
        _, said = process.communicate()
        assert process.returncode == 0, said
        return home

    yield ended
    for _, process in runs.values():
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray for all tests that need one; light tasks share its logical CPUs."""
    import ray

    from psyray.cluster import ray_session
    from psyray.config import Config

    with ray_session(Config()):
        yield
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    """Debian's Chromium without a window; a missing one is a failure only where .ci/run installs it."""
    program = shutil.which("chromium")
    if program is None:
        promised = os.environ.get("CI") == "true" and "chromium" in (Path(__file__).parents[1] / ".ci/run").read_text()
        (pytest.fail if promised else pytest.skip)("no Chromium (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()

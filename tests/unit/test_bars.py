"""Where progress bars are off (TQDM_DISABLE=1), nothing else changes."""

import json
from functools import partial

import numpy as np
from tqdm import tqdm

from psyray import stream
from psyray.reward import frozen
from psyray.run import Folder

OFF = partial(tqdm, disable=True)


def test_progress_is_noted_without_a_bar(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "tqdm", OFF)
    with stream.Progress(Folder(tmp_path), "work", 10, 2) as progress:
        progress.add(3)
        progress.reach(10)
    state = json.loads((tmp_path / "progress.json").read_text())
    assert (state["done"], state["total"]) == (10, 10)


def test_every_chat_has_features_without_a_bar(monkeypatch):
    monkeypatch.setattr("tqdm.tqdm", OFF)
    monkeypatch.setattr(frozen, "chat_tokens", lambda tokenizer, chat, max_length: [1] * len(chat))
    body = object.__new__(frozen.FrozenBody)  # its model is not needed here
    body.tokenizer, body.layer, body.max_length, body.batch_size = None, 0, 8, 2
    body._mean_states = lambda tokens: np.ones((len(tokens), 3))
    chats = {str(number): [{"role": "user", "content": "hello"}] for number in range(5)}
    found = [key for part in body.means(chats) for key in part]
    assert sorted(found) == sorted(chats)

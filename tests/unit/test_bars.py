"""Where progress bars are off (TQDM_DISABLE=1), nothing else changes."""

import json
from functools import partial

import numpy as np
from tqdm import tqdm

from psyray import stream
from psyray.reward import body, frozen
from psyray.reward.body import Reading
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
    monkeypatch.setattr(body, "chat_tokens", lambda tokenizer, chat, max_length: [1] * len(chat))
    made = object.__new__(body.Body)  # its model is not needed here
    made.tokenizer, made.layers, made.max_length, made.batch_size = None, {Reading(): 0}, 8, 2
    made._read = lambda tokens: {Reading(): np.ones((len(tokens), 3))}
    ids = [str(number) for number in range(5)]
    chats = [[{"role": "user", "content": "hello"}]] * 5
    assert sorted(key for part in frozen.parts(made, ids, chats) for key in part[Reading()]) == ids

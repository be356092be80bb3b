"""Features of (conversation, response) under a frozen language model, computed once and kept by content id.

    features = cached_features(chats, resolve_model("embedded:smollm2"), layer=20, cache=Path("features"))
    features[chat_id]  # [D], the mean of layer 20 over the chat

What a middle layer knows of a reply is read by a linear head; no label is needed to compute it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from psyray.models import model_identity
from psyray.records import Message, content_id
from psyray.reward.score import chat_tokens, padded
from psyray.run import write_parquet

FloatArray = npt.NDArray[np.float64]
Chats = Mapping[str, Sequence[Message]]  # id -> the whole chat, the response last

FEATURES = pa.schema([("id", pa.string()), ("features", pa.list_(pa.float32()))])
PART = 128  # chats between two files of the cache: what a Ctrl-C may cost


def chat_id(chat: Sequence[Message]) -> str:
    """The id of a whole chat, its response included."""
    return content_id("chat", [(m["role"], m["content"]) for m in chat])


def cached_features(
    chats: Chats, model: str, *, layer: int, cache: Path, max_length: int = 1024, batch_size: int = 16
) -> dict[str, FloatArray]:
    """[D] float64 by id: the mean over tokens of the hidden states after block `layer` (0: the embeddings).

    A chat longer than `max_length` tokens loses its beginning. What the cache has is read, the rest is computed
    in order of length and written there every `PART` chats, so that a run that was stopped goes on. Raises
    ValueError for a layer that the model does not have.
    """
    folder = cache / content_id("mean", model_identity(model), layer, max_length)
    found = _read(folder)
    missing = {key: chat for key, chat in chats.items() if key not in found}
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        body = FrozenBody(model, layer=layer, max_length=max_length, batch_size=batch_size)
        for part in body.means(missing):
            _write(folder, part)
            found |= part
    return {key: np.asarray(found[key], dtype=np.float64) for key in chats}


class FrozenBody:
    """The lower blocks of a language model; only those that the layer needs are loaded."""

    def __init__(self, model: str, *, layer: int, max_length: int, batch_size: int) -> None:
        import torch
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        total = AutoConfig.from_pretrained(model).num_hidden_layers
        if not 0 <= layer <= total:
            raise ValueError(f"layer {layer}: the model has the layers 0 (embeddings) to {total}")
        self.tokenizer = AutoTokenizer.from_pretrained(model, truncation_side="left")
        # Blocks are left out on purpose; the loader would list every weight of theirs.
        logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
        # One block more than is read: the last one's output would pass the final norm, the others' do not.
        blocks = min(layer + 1, total)
        self.model = AutoModel.from_pretrained(model, num_hidden_layers=blocks, dtype=torch.bfloat16).eval()
        self.layer, self.max_length, self.batch_size = layer, max_length, batch_size

    def means(self, chats: Chats) -> Iterator[dict[str, FloatArray]]:
        """Features by id in parts of up to `PART`, short chats first, behind a bar."""
        from tqdm import tqdm

        tokens = {key: chat_tokens(self.tokenizer, chat, self.max_length) for key, chat in chats.items()}
        order = sorted(tokens, key=lambda key: (len(tokens[key]), key))
        with tqdm(total=len(order), desc=f"features of layer {self.layer}", unit="chat") as bar:
            part: dict[str, FloatArray] = {}
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                part |= dict(zip(batch, self._mean_states([tokens[key] for key in batch]), strict=True))
                bar.update(len(batch))
                if len(part) >= PART or start + len(batch) == len(order):  # a bar that is off counts nothing
                    yield part
                    part = {}

    def _mean_states(self, tokens: Sequence[Sequence[int]]) -> FloatArray:
        import torch

        ids, mask = padded(tokens, 0)
        with torch.inference_mode():
            states = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        kept = mask[:, :, None].float()
        mean_ND = (states[self.layer].float() * kept).sum(1) / kept.sum(1)
        return np.asarray(mean_ND.numpy(), dtype=np.float64)


def _read(folder: Path) -> dict[str, FloatArray]:
    found: dict[str, FloatArray] = {}
    for path in sorted(folder.glob("*.parquet")):
        part = pq.read_table(path, schema=FEATURES)
        values_ND = part["features"].combine_chunks().flatten().to_numpy().reshape(len(part), -1)
        found |= dict(zip(part["id"].to_pylist(), values_ND, strict=True))
    return found


def _write(folder: Path, part: Mapping[str, FloatArray]) -> None:
    """One file, whole or not at all; its name is its content's, so that two processes cannot mix theirs."""
    rows = [{"id": key, "features": value_D.astype(np.float32)} for key, value_D in sorted(part.items())]
    write_parquet(folder / f"{content_id(sorted(part))}.parquet", pa.Table.from_pylist(rows, schema=FEATURES))

"""A language model's states as features of a chat: of which layer, and pooled how.

    body = Body("RUN/.../model", [Reading(), Reading(20, "mean")], max_length=512)
    for rows, found in body.batches(chats):  # a chat is its messages, the response last
        found[Reading(20, "mean")]  # [len(rows), D]

Layer 0 is the embeddings, layer n what block n leaves. The last one is read behind the final norm, as heads read it.
Poolings: the last token; the mean over the chat; the mean over the response, its end of turn included. Of a model with
adapters (`reward/adapters.py`) the states under each of them stand one after another.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from psyray.arrays import FloatArray
from psyray.engines.vllm import is_adapter
from psyray.errors import PsyrayError
from psyray.models import layer_count
from psyray.records import Message
from psyray.sections.learning import Pooling, RewardSection

Chat = Sequence[Message]
ADAPTERS = "adapters"  # in a reward model's folder: theirs, named by their numbers


@dataclass(frozen=True)
class Reading:
    """Where a feature is read; by default where a reward model's own score head reads."""

    layer: int | None = None  # none: the last
    pooling: Pooling = "last"
    adapters: int = 0  # the first so many of the model's; 0: the model as it is

    @property
    def members(self) -> int:
        """How many states stand one after another in a feature."""
        return max(1, self.adapters)

    @property
    def at_the_score_head(self) -> bool:
        """Whether the state is the one that a score head was trained on."""
        return (self.layer, self.pooling) == (None, "last")

    @property
    def identity(self) -> dict[str, Any]:
        """What a fingerprint must hold of it: nothing for the default."""
        place = {} if self.at_the_score_head else {"layer": self.layer, "pooling": self.pooling}
        return place | ({"adapters": self.adapters} if self.adapters else {})


def reading_of(section: RewardSection, model: Path | str) -> Reading:
    """What a run's heads read of a reward model; the last layer by its number is the last layer.

    PsyrayError for a layer that the model does not have.
    """
    layer, pooling, adapters = section.heads.layer, section.heads.pooling, section.adapters.count
    if layer is None:
        return Reading(None, pooling, adapters)
    if layer > (total := layer_count(str(model))):
        raise PsyrayError(f"reward.heads.layer is {layer}; the model has the layers 0 (embeddings) to {total}")
    return Reading(None if layer == total else layer, pooling, adapters)


def chat_text(tokenizer: Any, chat: Chat) -> str:
    """The whole chat, its response last, as the model reads it."""
    return str(tokenizer.apply_chat_template(list(chat), tokenize=False)).rstrip("\n")


def chat_tokens(tokenizer: Any, chat: Chat, max_length: int) -> list[int]:
    """The whole chat as tokens; what is too long loses its beginning."""
    return [int(i) for i in _encoded(tokenizer, chat_text(tokenizer, chat), max_length)["input_ids"]]


def before_response(tokenizer: Any, chat: Chat, max_length: int) -> int:
    """How many of `chat_tokens` stand before the response; needs a fast tokenizer."""
    # A template may trim or rewrite what it is given: the text before the response is what another one leaves alone.
    other = [*chat[:-1], {**chat[-1], "content": "\0"}]
    text, marked = (chat_text(tokenizer, one) for one in (chat, other))
    start = next((i for i, (a, b) in enumerate(zip(text, marked, strict=False)) if a != b), len(text))
    offsets = _encoded(tokenizer, text, max_length, return_offsets_mapping=True)["offset_mapping"]
    return min(sum(int(end) <= start for _, end in offsets), len(offsets) - 1)


def _encoded(tokenizer: Any, text: str, max_length: int, **more: Any) -> Any:
    return tokenizer(text, add_special_tokens=False, truncation=True, max_length=max_length, **more)


def padded(tokens: Sequence[Sequence[int]], pad: int) -> tuple[Any, Any]:
    """(ids, mask): the rows as one tensor, filled up on the right, and where they are."""
    import torch

    ids = torch.full((len(tokens), max(map(len, tokens))), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(tokens):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask


class Tokens(NamedTuple):
    """A chat as the model reads it."""

    ids: list[int]
    before: int  # tokens before the response; 0 where nobody asks


class Body:
    """A language model's blocks up to the highest layer that is read, and what is read of them."""

    def __init__(
        self,
        model: Path | str,
        readings: Sequence[Reading],
        *,
        max_length: int,
        batch_size: int = 16,
        gpu: bool = False,
    ) -> None:
        """ValueError for a layer that is not there, PsyrayError for an adapter; all readings are of the same ones."""
        import torch
        from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(str(model), truncation_side="left")
        config = AutoConfig.from_pretrained(str(model))
        total = int(config.num_hidden_layers)
        self.layers = {reading: total if reading.layer is None else reading.layer for reading in readings}
        if beyond := [layer for layer in self.layers.values() if not 0 <= layer <= total]:
            raise ValueError(f"layer {beyond[0]}: the model has the layers 0 (embeddings) to {total}")
        # One block more than is read: the last one's output would pass the final norm, the others' do not.
        blocks = min(max(self.layers.values()) + 1, total)
        kept = {} if blocks == total else {"config": _shortened(config, blocks)}
        self.device = "cuda" if gpu else "cpu"
        [adapters] = {reading.adapters for reading in readings}
        # An adapter names the layers as they stand below a score head.
        kind = AutoModelForSequenceClassification if adapters else AutoModel
        with _quiet():  # weights are left out on purpose; the loader would list them all
            found = kind.from_pretrained(str(model), **kept, dtype=torch.bfloat16)
        self.adapted = _with_adapters(found, Path(model) / ADAPTERS, adapters) if adapters else None
        self.model = found.eval().to(self.device)
        self.total, self.max_length, self.batch_size = total, max_length, batch_size

    def batches(self, chats: Sequence[Chat]) -> Iterator[tuple[list[int], dict[Reading, npt.NDArray[np.float32]]]]:
        """(which chats, their features [N, D] by reading), short chats first; long ones lose their beginning."""
        spoken = any(reading.pooling == "response" for reading in self.layers)
        tokens = [
            Tokens(
                chat_tokens(self.tokenizer, chat, self.max_length),
                before_response(self.tokenizer, chat, self.max_length) if spoken else 0,
            )
            for chat in chats
        ]
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i].ids))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            yield rows, self._read([tokens[i] for i in rows])

    def features(self, chats: Sequence[Chat]) -> FloatArray:
        """[N, D] in the chats' order, of a body with one reading."""
        [reading] = self.layers
        features_ND = np.empty((len(chats), int(self.model.config.hidden_size) * reading.members))
        for rows, found in self.batches(chats):
            features_ND[rows] = found[reading]
        return features_ND

    def _read(self, tokens: Sequence[Tokens]) -> dict[Reading, npt.NDArray[np.float32]]:
        import torch

        ids, mask = (filled.to(self.device) for filled in padded([t.ids for t in tokens], 0))
        before = torch.tensor([t.before for t in tokens], device=self.device)
        inner = any(layer < self.total for layer in self.layers.values())
        read: dict[Reading, list[Any]] = {reading: [] for reading in self.layers}
        with torch.inference_mode():
            for model in self._members():
                out = model(input_ids=ids, attention_mask=mask, output_hidden_states=inner, use_cache=False)
                for reading, layer in self.layers.items():
                    states = out.last_hidden_state if layer == self.total else out.hidden_states[layer]
                    read[reading].append(pooled(states, mask, before, reading.pooling))
        return {reading: torch.cat(blocks, dim=1).cpu().numpy() for reading, blocks in read.items()}

    def _members(self) -> Iterator[Any]:
        """The model under each of its adapters in turn; the model where it has none."""
        if not self.adapted:
            yield self.model
            return
        for name in self.adapted.peft_config:
            self.adapted.set_adapter(name, inference_mode=True)
            yield self.model.base_model  # without the score head


def pooled(states: Any, mask: Any, before: Any, pooling: Pooling) -> Any:
    """[N, D] float32 of states [N, T, D]; mask [N, T] is 1 on tokens, `before` [N] stand before the response."""
    import torch

    if pooling == "last":
        return states[torch.arange(len(states)), mask.sum(1) - 1].float()
    if pooling == "response":
        mask = mask * (torch.arange(mask.shape[1], device=mask.device) >= before[:, None])
    kept = mask[:, :, None].float()
    return (states.float() * kept).sum(1) / kept.sum(1)


def _shortened(config: Any, blocks: int) -> Any:
    config.num_hidden_layers = blocks
    if kinds := getattr(config, "layer_types", None):  # of models whose blocks differ
        config.layer_types = kinds[:blocks]
    return config


def _with_adapters(model: Any, folder: Path, count: int) -> Any:
    """peft's wrapper of the model, whose layers it changes in place; PsyrayError where there are fewer adapters."""
    from peft import PeftModel

    if missing := [number for number in range(count) if not is_adapter(folder / str(number))]:
        raise PsyrayError(f"no adapter {missing[0]} in {folder}, but {count} are read: the heads are another model's")
    first, *others = ((folder / str(number), f"member_{number}") for number in range(count))
    adapted = PeftModel.from_pretrained(model, first[0], adapter_name=first[1], torch_device="cpu")
    for path, name in others:
        adapted.load_adapter(path, adapter_name=name, torch_device="cpu")
    return adapted


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

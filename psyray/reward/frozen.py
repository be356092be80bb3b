"""Features of (conversation, response) under a frozen language model, computed once and kept by content id.

    cache = FeatureCache(resolve_model("embedded:smollm2"), Path("features"))
    cache.fill(chats, [Reading(20, "mean"), Reading(20, "last")])  # one pass for all that is missing
    cache.features(chats, Reading(20, "mean"))[chat_id]  # [D]

What a middle layer knows of a reply is read by a linear head; no label is needed to compute it. The cache has a folder
for each reading, in float32: a chat's feature takes 4 D bytes there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from psyray.arrays import Features
from psyray.files import write_parquet
from psyray.models import model_identity
from psyray.records import content_id
from psyray.reward.body import Body, Chat, Reading

Chats = Mapping[str, Chat]  # id -> the whole chat, the response last
Part = dict[Reading, dict[str, npt.NDArray[np.float32]]]

FEATURES = pa.schema([("id", pa.string()), ("features", pa.list_(pa.float32()))])
PART = 128  # chats between two files of the cache: what a Ctrl-C may cost


def chat_id(chat: Chat) -> str:
    """The id of a whole chat, its response included."""
    return content_id("chat", [(m["role"], m["content"]) for m in chat])


class FeatureCache:
    """The features of one model that are kept in a folder; readings name their layer by its number."""

    def __init__(self, model: str, folder: Path, *, max_length: int = 1024, batch_size: int = 16) -> None:
        self.model, self.folder, self.max_length, self.batch_size = model, folder, max_length, batch_size

    def fill(self, chats: Chats, readings: Sequence[Reading], *, gpu: bool = False) -> None:
        """Compute what is missing of these features in one pass over the chats, behind a bar.

        In order of length, and written every `PART` chats, so that a pass that was stopped goes on. Raises ValueError
        for a layer that the model does not have.
        """
        known = [_ids(self._place(reading)) for reading in readings]
        if not (missing := sorted(chats.keys() - set.intersection(*known))):
            return
        body = Body(self.model, readings, max_length=self.max_length, batch_size=self.batch_size, gpu=gpu)
        for part in parts(body, missing, [chats[key] for key in missing]):
            for reading, features in part.items():
                _write(self._place(reading), features)

    def features(self, chats: Iterable[str], reading: Reading) -> Features:
        """[D] by id of what `fill` computed; KeyError for a chat that it did not."""
        found = _read(self._place(reading))
        return {key: found[key] for key in chats}

    def _place(self, reading: Reading) -> Path:
        return self.folder / content_id(reading.pooling, model_identity(self.model), reading.layer, self.max_length)


def parts(body: Body, ids: Sequence[str], chats: Sequence[Chat]) -> Iterator[Part]:
    """Features by reading and id in parts of up to `PART` chats, short ones first, behind a bar."""
    from tqdm import tqdm

    part: Part = {}
    done = held = 0
    with tqdm(total=len(chats), desc="features", unit="chat") as bar:
        for rows, found in body.batches(chats):
            for reading, features_ND in found.items():
                part.setdefault(reading, {}).update(zip([ids[row] for row in rows], features_ND, strict=True))
            bar.update(len(rows))
            done, held = done + len(rows), held + len(rows)  # a bar that is off counts nothing
            if held >= PART or done == len(chats):
                yield part
                part, held = {}, 0


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet"))


def _ids(folder: Path) -> set[str]:
    return {key for path in _files(folder) for key in pq.read_table(path, columns=["id"])["id"].to_pylist()}


def _read(folder: Path) -> dict[str, npt.NDArray[np.float32]]:
    found: dict[str, npt.NDArray[np.float32]] = {}
    for path in _files(folder):
        part = pq.read_table(path, schema=FEATURES)
        values_ND = part["features"].combine_chunks().flatten().to_numpy().reshape(len(part), -1)
        found |= dict(zip(part["id"].to_pylist(), values_ND, strict=True))
    return found


def _write(folder: Path, part: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """One file, whole or not at all; its name is its content's, so that two processes cannot mix theirs."""
    folder.mkdir(parents=True, exist_ok=True)
    values_ND = np.stack([part[key] for key in sorted(part)])
    features = pa.FixedSizeListArray.from_arrays(pa.array(values_ND.ravel()), values_ND.shape[1])
    rows = pa.table([pa.array(sorted(part)), features.cast(FEATURES.field("features").type)], schema=FEATURES)
    write_parquet(folder / f"{content_id(sorted(part))}.parquet", rows)

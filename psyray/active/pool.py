"""What acquisition gets to see in a round: the heads' belief of every response, and what was asked in rounds before.

Shapes: P speeches, K responses each, H heads or draws, E directions of doubt, A axes, M members, N rows, D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
from scipy.linalg import block_diag, eigh

from psyray.active.acquisition import Candidates, Pick
from psyray.arrays import Features, FloatArray
from psyray.files import each, write_parquet
from psyray.records import Row, table
from psyray.reward.ensemble import feature_rows, load_features, prompt_matrix
from psyray.reward.heads import Heads
from psyray.reward.posterior import PosteriorHeads
from psyray.run import Artifact, Folder

AXES = 256  # of a posterior's doubt that acquisition sees: its rules cost P K^2 A
ROWS = 1024  # responses whose features are in float64 at once: all of them are some GB where the model is large
ASKED = pa.schema([("speech_id", pa.string()), ("responses", pa.list_(pa.string()))])
ASKED_FILE = "asked.parquet"


@dataclass(frozen=True)
class Pool:
    """What is believed of a round's responses; NaN where one is absent."""

    mean_PK: FloatArray
    spread_PK: FloatArray  # of a score
    spread_PKK: FloatArray  # of a score difference


def believed(
    heads: Heads, features: Features, by_speech: Mapping[str, Sequence[Row]], k: int, rng: np.random.Generator
) -> tuple[Pool, Candidates]:
    """What the heads make of the responses, and what acquisition sees of it; `rng` turns the draws of a posterior.

    Where the posterior is known, acquisition sees it on its main axes: as features and covariance, and as draws
    whose mean and covariance are its own. An ensemble is seen as its heads' scores.
    """
    blocks = Blocks(features, by_speech, k, len(heads.mean_D))
    if not isinstance(heads, PosteriorHeads):
        scores_PKH = np.concatenate([heads.scores(rows_ND) for rows_ND in blocks]).reshape(len(by_speech), k, -1)
        return pool_of(scores_PKH), Candidates(scores_PKH)
    parts, grams_Mdd = list[Pool](), np.zeros_like(heads.root_Mdd)
    for rows_ND in blocks:
        doubt_NE = heads.doubts(rows_ND)
        mean_PK = heads.means(rows_ND).mean(axis=1).reshape(-1, k)
        parts.append(Pool(mean_PK, *spreads(doubt_NE.reshape(*mean_PK.shape, -1))))
        for gram_dd, within_Nd in zip(grams_Mdd, heads.within(doubt_NE), strict=True):
            gram_dd += products(within_Nd)
    pool = Pool(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Pool)))
    # Each member's main axes first: the products of all members' doubts at once are some GB where the model is large.
    turn_DB = heads.along(block_diag(*map(main_axes, grams_Mdd), np.eye(len(grams_Mdd))))
    seen = (products(heads.standardised(rows_ND) @ turn_DB) for rows_ND in blocks)
    turn_DA = np.asarray(turn_DB @ main_axes(np.sum(list(seen), axis=0)))
    main_PKA = np.concatenate([heads.standardised(rows_ND) @ turn_DA for rows_ND in blocks])
    main_PKA = main_PKA.reshape(*pool.mean_PK.shape, -1)
    A = main_PKA.shape[2]
    drawn_PKH = matched_draws(pool.mean_PK, main_PKA, rng)
    return pool, Candidates(drawn_PKH, features_PKD=main_PKA, covariance_DD=np.eye(A))


@dataclass(frozen=True)
class Blocks:
    """The features of some speeches at a time, [N, D] with K rows for each in order; NaN where one is absent."""

    features: Features
    by_speech: Mapping[str, Sequence[Row]]
    k: int
    width: int

    def __iter__(self) -> Iterator[FloatArray]:
        groups = list(self.by_speech.values())
        each = max(ROWS // self.k, 1)
        for start in range(0, max(len(groups), 1), each):  # one block at least, which tells the shapes
            yield feature_rows(self.features, groups[start : start + each], self.k, self.width)


def pool_of(scores_PKH: FloatArray) -> Pool:
    """What is believed where the heads' scores are all that is known."""
    mean_PK = scores_PKH.mean(axis=2)
    return Pool(mean_PK, *spreads((scores_PKH - mean_PK[:, :, None]) / np.sqrt(scores_PKH.shape[2])))


def spreads(doubt_PKE: FloatArray) -> tuple[FloatArray, FloatArray]:
    """([P, K], [P, K, K]) |z_i| and |z_i - z_j|, by differences: those of like responses are small beside either."""
    apart = [np.linalg.norm(doubt_PKE[:, i, None] - doubt_PKE, axis=2) for i in range(doubt_PKE.shape[1])]
    return np.asarray(np.linalg.norm(doubt_PKE, axis=2)), np.stack(apart, axis=1)


def products(doubt_NE: FloatArray) -> FloatArray:
    """[E, E]: those of each two columns, over the rows that are there."""
    present_NE = doubt_NE[np.isfinite(doubt_NE).all(axis=1)]
    return np.asarray(present_NE.T @ present_NE)


def main_axes(gram_EE: FloatArray, most: int = AXES) -> FloatArray:
    """[E, A]: the `most` axes along which doubts with these products are widest; all, unturned, if no more."""
    E = len(gram_EE)
    if most >= E:
        return np.eye(E)
    return np.asarray(eigh(gram_EE, subset_by_index=[E - most, E - 1], check_finite=False)[1])


def matched_draws(mean_PK: FloatArray, doubt_PKA: FloatArray, rng: np.random.Generator) -> FloatArray:
    """[P, K, 2A] scores of which mean and standard deviation over the draws are those of the belief, exactly.

    The draws stand at right angles, in opposite pairs: as many independent ones would miss both by sampling alone.
    """
    A = doubt_PKA.shape[2]
    turn_AA, _ = np.linalg.qr(rng.normal(size=(A, A)))
    moved_PKA = np.sqrt(A) * (doubt_PKA @ turn_AA)
    drawn_PKH = np.concatenate([moved_PKA, -moved_PKA], axis=2)
    drawn_PKH += mean_PK[:, :, None]
    return np.asarray(drawn_PKH)


def keep_asked(folder: Folder, groups: Sequence[Sequence[Row]], picks: Sequence[Pick]) -> None:
    """Leave beside the pairs which speeches were asked about, whatever the oracle said of them."""
    asked = [groups[pick.prompt] for pick in picks]
    rows = [{"speech_id": g[0]["speech_id"], "responses": [r["response_id"] for r in g]} for g in asked]
    write_parquet(folder.path / ASKED_FILE, table(rows, ASKED))


def asked_before(earlier: Sequence[tuple[Artifact, Artifact]], width: int) -> FloatArray:
    """[N, D]: where the speeches lie that earlier rounds asked about, each round given as (features, labels).

    A round that was labelled before this was written down gives those that the oracle decided.
    """
    found = [np.empty((0, width))]
    for features, labels in earlier:
        kept = labels.path / ASKED_FILE
        asked: dict[str, list[Row]] = {}
        if kept.exists():
            asked = {row["speech_id"]: [{"response_id": key} for key in row["responses"]] for row in each([kept])}
        else:
            for pair in labels.each(["speech_id", "chosen_id", "rejected_id", "source"]):
                if pair["source"] == "oracle":
                    both = [{"response_id": pair[key]} for key in ("chosen_id", "rejected_id")]
                    asked.setdefault(pair["speech_id"], []).extend(both)
        wanted = {row["response_id"] for responses in asked.values() for row in responses}
        found.append(prompt_matrix(load_features([features], wanted), asked))
    return np.concatenate(found)


def why(pool: Pool, pick: Pick) -> dict[str, float]:
    """What speaks for a question, for the ledger: the rule's value, mean and spread of both responses' scores."""
    found = {"value": pick.value}
    for side, place in (("a", (pick.prompt, pick.first)), ("b", (pick.prompt, pick.second))):
        found |= {
            f"{side}_mean": float(pool.mean_PK[place]),
            f"{side}_spread": float(pool.spread_PK[place]),
        }
    return found

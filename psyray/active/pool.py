"""What acquisition gets to see in a round: the heads' belief of every response, and what was asked in rounds before.

Shapes: P speeches, K responses each, H heads or draws, A axes, N speeches asked before, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from scipy.linalg import eigh

from psyray.active.acquisition import Candidates, Pick
from psyray.arrays import FloatArray
from psyray.records import Row, table
from psyray.reward.ensemble import Features, feature_matrix, load_features, prompt_matrix
from psyray.reward.heads import Heads
from psyray.reward.posterior import PosteriorHeads
from psyray.run import Artifact, Folder, each, write_parquet

AXES = 256  # of a posterior's doubt that acquisition sees: its rules cost P K^2 A
ASKED = pa.schema([("speech_id", pa.string()), ("responses", pa.list_(pa.string()))])
ASKED_FILE = "asked.parquet"


@dataclass(frozen=True)
class Pool:
    """The scores of a round's responses; NaN where one is absent."""

    mean_PK: FloatArray
    doubt_PKE: FloatArray  # |z_i - z_j| is the spread of a score difference, |z_i| that of a score
    candidates: Candidates

    @classmethod
    def of(
        cls, heads: Heads, features: Features, by_speech: Mapping[str, Sequence[Row]], k: int, rng: np.random.Generator
    ) -> Pool:
        """What the heads make of the responses; `rng` turns the draws of a posterior.

        Where the posterior is known, acquisition sees it on its main axes: as features and covariance, and as draws
        whose mean and covariance are its own. An ensemble is seen as its heads' scores.
        """
        features_PKD = feature_matrix(features, by_speech, k, len(heads.mean_D))
        P, K, D = features_PKD.shape
        rows_ND = features_PKD.reshape(P * K, D)
        mean_PK, doubt_PKE = heads.belief(rows_ND).mean_N.reshape(P, K), heads.doubts(rows_ND).reshape(P, K, -1)
        where_PD = prompt_matrix(features, by_speech)
        if isinstance(heads, PosteriorHeads):
            main_PKA = main_axes(doubt_PKE)
            A = main_PKA.shape[2]
            drawn_PKH = matched_draws(mean_PK, main_PKA, rng)
            seen = Candidates(drawn_PKH, features_PKD=main_PKA, covariance_DD=np.eye(A), prompts_PE=where_PD)
        else:
            seen = Candidates(heads.scores(rows_ND).reshape(P, K, -1), prompts_PE=where_PD)
        return cls(mean_PK, doubt_PKE, seen)


def main_axes(doubt_PKE: FloatArray, most: int = AXES) -> FloatArray:
    """[P, K, A]: the doubts along the `most` axes in which they are widest; as they are where they have no more."""
    E = doubt_PKE.shape[2]
    if most >= E:
        return doubt_PKE
    rows_NE = doubt_PKE.reshape(-1, E)
    rows_NE = rows_NE[np.isfinite(rows_NE).all(axis=1)]
    _, axes_EA = eigh(rows_NE.T @ rows_NE, subset_by_index=[E - most, E - 1])
    return np.asarray(doubt_PKE @ axes_EA)


def matched_draws(mean_PK: FloatArray, doubt_PKA: FloatArray, rng: np.random.Generator) -> FloatArray:
    """[P, K, 2A] scores of which mean and standard deviation over the draws are those of the belief, exactly.

    The draws stand at right angles, in opposite pairs: as many independent ones would miss both by sampling alone.
    """
    A = doubt_PKA.shape[2]
    turn_AA, _ = np.linalg.qr(rng.normal(size=(A, A)))
    moved_PKA = np.sqrt(A) * (doubt_PKA @ turn_AA)
    return np.asarray(mean_PK[:, :, None] + np.concatenate([moved_PKA, -moved_PKA], axis=2))


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
        found.append(prompt_matrix(load_features([features]), asked))
    return np.concatenate(found)


def why(pool: Pool, pick: Pick) -> dict[str, float]:
    """What speaks for a question, for the ledger: the rule's value, mean and spread of both responses' scores."""
    found = {"value": pick.value}
    for side, place in (("a", (pick.prompt, pick.first)), ("b", (pick.prompt, pick.second))):
        found |= {
            f"{side}_mean": float(pool.mean_PK[place]),
            f"{side}_spread": float(np.linalg.norm(pool.doubt_PKE[place])),
        }
    return found

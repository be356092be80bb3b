"""The reward ensemble in a run: features computed once by Ray Data and kept by id, heads fitted on them in seconds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from psyray.arrays import Features, FloatArray
from psyray.config import Config
from psyray.errors import PsyrayError
from psyray.files import batches
from psyray.records import MESSAGES, Row, Status
from psyray.reward.body import ADAPTERS, Reading, reading_of
from psyray.reward.heads import Heads, fit_heads, own_head, standardisation
from psyray.reward.held_out import held_out
from psyray.reward.laplace import fit_laplace
from psyray.reward.mlp import fit_mlp_heads
from psyray.reward.posterior import PosteriorHeads
from psyray.reward.ratings import RATINGS, fit_rated
from psyray.reward.score import FeatureActor, on_actors
from psyray.reward.uncertainty import Belief
from psyray.rubric import load_rubric
from psyray.run import Artifact, Folder, Run
from psyray.sections.learning import HeadsSection
from psyray.stream import stream

AT_ONCE = 512  # responses whose features are read together
FEATURES = pa.schema([("response_id", pa.string()), ("features", pa.list_(pa.float32()))])
ANSWERS = pa.schema([("response_id", pa.string()), ("messages", MESSAGES), ("text", pa.string())])
SCORES = pa.schema(
    [
        ("response_id", pa.string()),
        ("speech_id", pa.string()),
        ("mean", pa.float64()),
        ("spread", pa.float64()),
    ]
)


def features_stage(
    run: Run, name: str, config: Config, reward: Artifact, responses: Sequence[Row], source: Artifact
) -> Artifact:
    """Features of the usable responses under the reward model's body, read where `reward.heads` says."""
    max_length = config.reward.train.max_length
    reading = reading_of(config.reward, reward.model)

    def make(folder: Folder) -> Mapping[str, Any]:
        parts = folder.parts(FEATURES, "response_id")
        usable = [{key: r[key] for key in ANSWERS.names} for r in responses if r["status"] == Status.OK]
        stream(
            folder,
            parts.todo(usable),
            partial(on_actors, FeatureActor, config=config, model=reward.model, read=reading),
            parts.append,
            title=name,
            schema=ANSWERS,
            total=len(usable),
            done=len(parts.ids),
        )
        parts.finish()
        return {"responses": len(usable)}

    ids = sorted(r["response_id"] for r in responses)
    return run.stage(name, {"max_length": max_length, "of": ids, **reading.identity}, [reward, source], make)


def load_features(artifacts: Iterable[Artifact], wanted: Collection[str] | None = None) -> Features:
    """Features by response id; none wanted: all."""
    found: dict[str, npt.NDArray[np.float32]] = {}
    for ids, features_ND in feature_batches(artifacts):
        rows = [n for n, key in enumerate(ids) if wanted is None or key in wanted]
        kept_ND = features_ND if wanted is None else features_ND[rows]  # rows alone would keep their batch in memory
        found |= zip([ids[n] for n in rows], kept_ND, strict=True)
    return found


def feature_batches(artifacts: Iterable[Artifact]) -> Iterator[tuple[list[str], npt.NDArray[np.float32]]]:
    """Response ids and their features [N, D], some hundred at a time: a large model's are wide."""
    for batch in filter(len, batches(chain.from_iterable(artifact.files for artifact in artifacts), rows=AT_ONCE)):
        yield batch["response_id"].to_pylist(), batch["features"].flatten().to_numpy().reshape(len(batch), -1)


def heads_stage(
    run: Run, name: str, config: Config, reward: Artifact, features: Sequence[Artifact], pairs: Sequence[Artifact]
) -> Artifact:
    """Heads fitted on every training pair that a judge or an oracle labelled, measured on the test pairs.

    Beside them rating heads, which explain a score by principle, from the responses that were rated.
    """
    section = config.reward.heads
    reading = reading_of(config.reward, reward.model)

    def make(folder: Folder) -> Mapping[str, Any]:
        labelled, known = labelled_pairs(pairs, features)
        train = [row for row in labelled if row["split"] == "train"]
        test = [row for row in labelled if row["split"] == "test"]
        if not train:
            raise PsyrayError(f"{name}: no labelled pair to fit the reward heads on")
        chosen_ND, rejected_ND = sides(train, known)
        speech_ids = [r["speech_id"] for r in train]
        priors = own_heads(reward.model, reading)
        heads = fitted_by_member(section, chosen_ND, rejected_ND, speech_ids, priors, config.run.seed)
        replace(heads, reading=reading).save(folder.path / "heads.npz")
        ratings, principles = fit_rated(labelled, mean_of(known, reading.members), load_rubric(config.rubric))
        if ratings:
            ratings.over(reading.members).save(folder.path / RATINGS)
        counts = {"train_pairs": len(train), "test_pairs": len(test)}
        measured = held_out(margins(heads, test, known), test, own_margins(priors, test, known))
        return counts | measured | {"principles": principles}

    settings = section.model_dump(exclude={"layer", "pooling"}) | reading.identity | {"seed": config.run.seed}
    return run.stage(name, settings, [reward, *features, *pairs], make)


def labelled_pairs(artifacts: Iterable[Artifact], features: Iterable[Artifact]) -> tuple[list[Row], Features]:
    """The pairs that a judge, an oracle or a data set labelled and whose responses both have features; the features."""
    labelled = [row for artifact in artifacts for row in artifact.rows() if row["source"] != "reward"]
    known = load_features(features, {row[side] for row in labelled for side in ("chosen_id", "rejected_id")})
    return [row for row in labelled if row["chosen_id"] in known and row["rejected_id"] in known], known


def own_heads(model: Path, reading: Reading) -> list[FloatArray | None]:
    """The score head that was trained with the model, or with each adapter; none where it knows no such features."""
    folders = [model / ADAPTERS / str(number) for number in range(reading.adapters)] or [model]
    return [own_head(folder) if reading.at_the_score_head else None for folder in folders]


def own_margins(own: Sequence[FloatArray | None], pairs: Sequence[Row], features: Features) -> FloatArray | None:
    """[N]: the pairs' margins by the score head that was trained with the model, the mean over those of its adapters.

    None where the features are not what it reads.
    """
    heads = [head_D for head_D in own if head_D is not None]
    if len(heads) < len(own) or not pairs:
        return None
    chosen_ND, rejected_ND = sides(pairs, features)
    parts = np.split(chosen_ND - rejected_ND, len(heads), axis=1)
    return np.asarray(np.mean([part_ND @ head_D for part_ND, head_D in zip(parts, heads, strict=True)], axis=0))


def mean_of(features: Features, members: int) -> Features:
    """[D] by response: the mean over the members of what a response's features hold one after another."""
    if members == 1:
        return features
    return {key: feature.reshape(members, -1).mean(axis=0, dtype=np.float64) for key, feature in features.items()}


def fitted_by_member(
    section: HeadsSection,
    chosen_ND: FloatArray,
    rejected_ND: FloatArray,
    speech_ids: Sequence[str],
    priors: Sequence[FloatArray | None],
    seed: int,
) -> Heads:
    """The configured heads, an equal share of them on each member's part of the features, around its prior."""
    share = section.model_copy(update={"count": section.count // len(priors)})
    parts = zip(*(np.split(side_ND, len(priors), axis=1) for side_ND in (chosen_ND, rejected_ND)), strict=True)
    members = [
        fitted(share, chosen, rejected, speech_ids, prior, seed + number)
        for number, ((chosen, rejected), prior) in enumerate(zip(parts, priors, strict=True))
    ]
    return type(members[0]).joined(members)


def fitted(
    section: HeadsSection,
    chosen_ND: FloatArray,
    rejected_ND: FloatArray,
    speech_ids: Sequence[str],
    own_head_D: FloatArray | None,
    seed: int,
) -> Heads:
    """Heads of the configured kind around the reward model's own head (none: around 0), on standardised features."""
    mean_D, scale_D = standardisation(chosen_ND, rejected_ND)
    prior_D = None if own_head_D is None else own_head_D * scale_D
    if section.kind in ("ensemble", "mlp"):
        fit = fit_heads if section.kind == "ensemble" else partial(fit_mlp_heads, hidden=section.hidden)
        return fit(
            chosen_ND, rejected_ND, speech_ids, count=section.count, ridge=section.ridge,
            prior_spread=section.prior_spread, seed=seed, prior_D=prior_D,
        )  # fmt: skip
    posterior = fit_laplace(
        chosen_ND / scale_D, rejected_ND / scale_D,
        ridge=section.ridge, prior_D=prior_D, draws=section.count, seed=seed,
    )  # fmt: skip
    return PosteriorHeads(
        posterior.heads.weights_HD, mean_D, scale_D, posterior.weights_D[None], posterior.root_DD[None]
    )


def sides(pairs: Sequence[Row], features: Features) -> tuple[FloatArray, FloatArray]:
    """(chosen [N, D], rejected [N, D]) of the pairs."""
    chosen_ND = np.stack([features[p["chosen_id"]] for p in pairs], dtype=np.float64)
    return chosen_ND, np.stack([features[p["rejected_id"]] for p in pairs], dtype=np.float64)


def margins(heads: Heads, pairs: Sequence[Row], features: Features) -> Belief:
    """Of score(chosen) - score(rejected) of the pairs."""
    return heads.difference(*sides(pairs, features)) if pairs else Belief(np.empty(0), np.empty(0))


def feature_rows(features: Features, groups: Sequence[Sequence[Row]], k: int, width: int) -> FloatArray:
    """[P * k, D] of the speeches' responses, `k` rows for each in order; NaN for a response without features."""
    rows_ND = np.full((len(groups) * k, width), np.nan)
    for p, responses in enumerate(groups):
        for j, response in enumerate(responses):
            if response["response_id"] in features:
                rows_ND[p * k + j] = features[response["response_id"]]
    return rows_ND


def prompt_matrix(features: Features, by_speech: Mapping[str, Sequence[Row]]) -> FloatArray:
    """[P, D]: where the speeches lie, the mean of their responses' features; 0 for one without any, never asked."""
    width = len(next(iter(features.values()), ()))
    where_PD = np.zeros((len(by_speech), width))
    for p, responses in enumerate(by_speech.values()):
        if known := [features[r["response_id"]] for r in responses if r["response_id"] in features]:
            where_PD[p] = np.mean(known, axis=0, dtype=np.float64)
    return where_PD


def scores_stage(run: Run, name: str, heads: Artifact, features: Artifact, samples: Artifact) -> Artifact:
    """What the heads believe of every response's score."""

    def make(folder: Folder) -> Mapping[str, Any]:
        ensemble = Heads.load(heads.path / "heads.npz")
        speech = {r["response_id"]: r["speech_id"] for r in samples.each(["response_id", "speech_id"])}
        rows = [
            {"response_id": key, "speech_id": speech[key], "mean": float(mean), "spread": float(spread)}
            for ids, features_ND in feature_batches([features])
            for key, mean, spread in zip(ids, *ensemble.belief(features_ND), strict=True)
        ]
        folder.keep(SCORES, "response_id", rows)
        return {name: float(np.mean([row[name] for row in rows])) for name in ("mean", "spread") if rows}

    return run.stage(name, {}, [heads, features, samples], make)

"""The command `psyray layers`: which layer of a model, pooled how, tells what people prefer.

On the dev prompts of a labelled set (as `psyray agreement` reads it) every layer and pooling gets the same head: a
logistic regression on standardised features, about 0, tried on conversations that it was not fitted on. One pass over
the texts computes all features. The report prompts are left alone: `psyray label-efficiency` may use what is chosen.

Shapes: P prompts, N pairs that people decided, M readings, S strata, G ridges, R resamples or axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from psyray.active.efficiency import RESAMPLES, part_of
from psyray.active.replay import Bank
from psyray.arrays import FloatArray
from psyray.errors import PsyrayError
from psyray.evaluate.label_efficiency import LEAST, bank_of, chats_of, talks_of
from psyray.evaluate.labelled import Labelled, load_labelled
from psyray.evaluate.layers_report import page, plot
from psyray.evaluate.publish import publish
from psyray.models import cache_folder, layer_count, resolve_model
from psyray.reward.body import Reading
from psyray.reward.frozen import Chats, FeatureCache
from psyray.reward.heads import bootstraps, settle, standardisation
from psyray.reward.metrics import log_likelihood
from psyray.sections.learning import EfficiencySection, Pooling
from psyray.sections.place import TrackSection

FOLDS = 5
SLOPE = 5e-4  # at which a fit ends; far below what turns a pair
RIDGES = (1000.0, 100.0, 10.0, 1.0)  # the strongest first: the next fit begins where the last one ended


@dataclass(frozen=True)
class Request:
    """What is compared on what, and where the figures go."""

    declaration: Path
    out: Path
    section: EfficiencySection  # its model and dev_share count
    track: TrackSection
    data: Path | None = None
    gpu: bool = False
    least: int = LEAST


def measure(request: Request, say: Callable[[str], None]) -> dict[str, Any]:
    """Compare all readings; writes layers.json, .md and .png into `request.out` and an MLflow run; returns the figures.

    PsyrayError for a set without decided labels or with too few conversations in its dev part.
    """
    section = request.section
    declared, items, dropped = load_labelled(request.declaration, request.data)
    talks = talks_of(items, request.least)
    dev = [item for item in items if part_of(talks[item.speech_id], section.dev_share) == "dev"]
    prompts = {item.speech_id for item in dev}
    if (count := len({talks[prompt] for prompt in prompts})) < 2 * FOLDS:
        raise PsyrayError(
            f"{declared.name}: {count} conversations in the dev part are too few for {FOLDS} folds; raise "
            "efficiency.dev_share or give a larger set"
        )
    model = resolve_model(section.model)
    layers = layer_count(model)
    readings = [Reading(layer, pooling) for pooling in get_args(Pooling) for layer in range(layers + 1)]
    chats, cache = chats_of(dev), FeatureCache(model, cache_folder() / "features")
    cache.fill(chats, readings, gpu=request.gpu)
    margins_MN, ridges, bank = compared(dev, chats, readings, cache, request.least)
    found = {
        "set": declared.name,
        "prompts": len(prompts),
        "pairs": margins_MN.shape[1],
        "dropped": dropped,
        "settings": {"model": section.model, "dev_share": section.dev_share, "folds": FOLDS, "ridges": list(RIDGES)},
        "layers": layers,
    } | figures(margins_MN, length_margins(dev), readings, ridges, bank)
    found["configuration"] = configuration(found["readings"][0], layers)
    points = [(f"accuracy/{row['pooling']}", row["accuracy"][1], row["layer"]) for row in found["readings"]]
    publish(
        found, request.out, "layers", page=page(found), plot=lambda path: plot(found, path),
        points=sorted(points, key=lambda point: point[2]), track=request.track, say=say,
    )  # fmt: skip
    return found


def compared(
    items: Sequence[Labelled], chats: Chats, readings: Sequence[Reading], cache: FeatureCache, least: int
) -> tuple[FloatArray, list[float], Bank]:
    """(margins [M, N] on conversations left out, each reading's ridge, a bank that tells the pairs), with a bar.

    Of `RIDGES` each reading has the one under which the margins are most likely.
    """
    from tqdm import tqdm

    margins, ridges = [], []
    for reading in tqdm(readings, desc="heads", unit="reading"):
        _, bank = bank_of(items, cache.features(chats, reading), least)
        margins_GN = held_out_margins(bank)
        best = int(np.argmax([log_likelihood(margins_N) for margins_N in margins_GN]))
        margins.append(margins_GN[best])
        ridges.append(RIDGES[best])
    return np.stack(margins), ridges, bank


def held_out_margins(bank: Bank) -> FloatArray:
    """[G, N] logits of better over worse for every decided pair, from a head fitted on other conversations' pairs."""
    prompt_N, better_N, worse_N = bank.pairs()
    better_ND, worse_ND = bank.features_PKD[prompt_N, better_N], bank.features_PKD[prompt_N, worse_N]
    _, scale_D = standardisation(better_ND, worse_ND)
    # On the differences' own axes a ridge is the same, and the loss nearly round; there are no more axes than pairs.
    left_NR, singular_R, _ = np.linalg.svd((better_ND - worse_ND) / scale_D, full_matrices=False)
    talk_P = bank.conversation_P
    folds_P = (np.random.default_rng(0).permutation(talk_P.max() + 1) % FOLDS)[talk_P]
    margins_GN = np.zeros((len(RIDGES), len(prompt_N)))
    for fold in range(FOLDS):
        held_N = folds_P[prompt_N] == fold
        seen_NR, rest_NR = left_NR[~held_N], left_NR[held_N]
        offset_N, times_N = np.zeros(len(seen_NR)), np.ones(len(seen_NR))
        weights_R = np.zeros(len(singular_R))  # of the axes as they are
        for g, ridge in enumerate(RIDGES):
            unit_R = 1 / np.sqrt(singular_R**2 / 8 + ridge)
            wide_R = singular_R * unit_R
            found_R = settle(
                seen_NR * wide_R, offset_N, times_N, ridge * unit_R**2, start_R=weights_R / unit_R, slope=SLOPE
            )
            weights_R = found_R * unit_R
            margins_GN[g, held_N] = rest_NR @ (wide_R * found_R)
    return margins_GN


def length_margins(items: Sequence[Labelled]) -> FloatArray:
    """[N]: by how many characters the better reply is the longer one, pairs in the order of `Bank.pairs`."""
    lengths = {key: np.array([float(len(chat[-1]["content"]))]) for key, chat in chats_of(items).items()}
    _, bank = bank_of(items, lengths)
    prompt_N, better_N, worse_N = bank.pairs()
    return np.asarray((bank.features_PKD[prompt_N, better_N] - bank.features_PKD[prompt_N, worse_N])[:, 0])


def figures(
    margins_MN: FloatArray, length_N: FloatArray, readings: Sequence[Reading], ridges: Sequence[float], bank: Bank
) -> dict[str, Any]:
    """Every reading's figures, the most accurate first, and those of "the longer one wins".

    Accuracy is the mean over strata of the share of pairs ranked right, a tie half; `behind` is the best one's less
    this one's, and a reading is `as_good` where that interval does not lie above 0. Intervals are 95 % bootstraps over
    conversations, the same draws for all.
    """
    prompt_N, better_N, worse_N = bank.pairs()
    stratum_N = bank.strata_PKK[prompt_N, better_N, worse_N]
    all_MN = np.concatenate([margins_MN, length_N[None]])
    right_MN = (all_MN > 0) + 0.5 * (all_MN == 0)
    times_RN = bootstraps([str(t) for t in bank.conversation_P[prompt_N]], RESAMPLES, np.random.default_rng(0))
    weights_RN = np.concatenate([np.ones((1, len(prompt_N))), times_RN])  # row 0: the pairs as they are
    every_RM = _shares(right_MN, weights_RN)
    strata_SRM = np.stack(
        [_shares(right_MN[:, stratum_N == s], weights_RN[:, stratum_N == s]) for s in np.unique(stratum_N)]
    )
    names = [bank.strata[s] for s in np.unique(stratum_N)]
    mean_RM = np.nanmean(strata_SRM, axis=0)
    best = int(np.argmax(mean_RM[0, :-1]))

    def told(m: int) -> dict[str, Any]:
        strata = {name: _around(share_RM[:, m]) for name, share_RM in zip(names, strata_SRM, strict=True)}
        return {"accuracy": _around(mean_RM[:, m]), "all": _around(every_RM[:, m]), "strata": strata}

    rows = []
    for m in np.argsort(-mean_RM[0, :-1], kind="stable"):
        behind = _around(mean_RM[:, best] - mean_RM[:, m])
        reading = {"layer": readings[m].layer, "pooling": readings[m].pooling, "ridge": ridges[m]}
        rows.append(reading | told(m) | {"behind": behind, "as_good": behind[0] <= 0})
    return {"strata": names, "readings": rows, "longer_wins": told(len(readings))}


def _shares(right_MN: FloatArray, weights_RN: FloatArray) -> FloatArray:
    """[R, M]: weighted shares; NaN where a resample has none of the pairs."""
    total_R1 = weights_RN.sum(axis=1, keepdims=True)
    return np.asarray(np.where(total_R1 > 0, weights_RN @ right_MN.T / np.maximum(total_R1, 1), np.nan))


def _around(values_R: FloatArray) -> list[float]:
    """[low, value, high]: the value comes first, its resamples follow."""
    low, high = np.nanpercentile(values_R[1:], [2.5, 97.5])
    return [float(low), float(values_R[0]), float(high)]


def configuration(best: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The settings that choose a reading, as they stand in a file; a run calls its model's last layer none."""
    run = {"layer": None if best["layer"] == layers else best["layer"], "pooling": best["pooling"]}
    return {
        "reward": {"heads": run | {"ridge": best["ridge"]}},
        "efficiency": {key: best[key] for key in ("layer", "pooling")},
    }

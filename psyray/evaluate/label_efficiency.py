"""The command `psyray label-efficiency`: labels spent against held-out accuracy, every strategy beside `random`.

A labelled set (as `psyray agreement` reads it) is split by conversation. The replies' features under a frozen language
model are computed once; then every strategy asks for labels in batches, and after each batch a Bayesian head is
fitted to all labels so far. `psyray/active/replay.py` is the replay, `psyray/active/efficiency.py` the figures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from psyray.active.acquisition import ACQUISITIONS
from psyray.active.efficiency import BASELINE, Part, figures, part_of, shared_budgets, split, study
from psyray.active.replay import Bank, Learner
from psyray.errors import PsyrayError
from psyray.evaluate.efficiency_report import page, plot
from psyray.evaluate.labelled import Labelled, load_labelled
from psyray.evaluate.publish import publish
from psyray.models import cache_folder, resolve_model
from psyray.records import Message, Verdict, conversation_id
from psyray.reward.body import Reading
from psyray.reward.frozen import Chats, FeatureCache, chat_id
from psyray.sections.data import SpeechesSection
from psyray.sections.learning import EfficiencySection
from psyray.sections.place import TrackSection
from psyray.track import Point

LEAST = SpeechesSection().min_chars  # where nobody says otherwise


@dataclass(frozen=True)
class Request:
    """What to study, and where the figures go."""

    declaration: Path
    out: Path
    section: EfficiencySection
    track: TrackSection
    data: Path | None = None
    part: Part = "report"
    least: int = LEAST

    @property
    def learner(self) -> Learner:
        """The head that every strategy's labels are learnt by."""
        section = self.section
        return Learner(section.components, section.whiten, section.ridge, section.draws)


def measure(request: Request, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the study; writes efficiency.json, .md and .png into `request.out` and an MLflow run; returns the figures.

    PsyrayError for a set without decided labels, too few prompts, or a budget that the pools do not hold.
    """
    from tqdm import tqdm

    section = request.section
    declared, items, dropped = load_labelled(request.declaration, request.data)
    prompts, bank = featured(items, section, request.least)
    talks = talks_of(items, request.least)
    chosen = [row for row, prompt in enumerate(prompts) if part_of(talks[prompt], section.dev_share) == request.part]
    if min(map(len, split(chosen, section.pool_share, 0, bank.conversation_P))) < 2:
        raise PsyrayError(f"{declared.name}: {len(chosen)} prompts in the {request.part} part are too few to split")
    strategies = [BASELINE, *(name for name in section.strategies or ACQUISITIONS if name != BASELINE)]
    with tqdm(total=len(strategies) * section.seeds, unit="replay", desc="label efficiency") as bar:
        curves = study(
            bank,
            chosen,
            strategies,
            request.learner,
            budgets=range(section.batch, section.budget + 1, section.batch),
            batch=section.batch,
            seeds=range(section.seeds),
            pool_share=section.pool_share,
            start=section.start,
            jobs=os.cpu_count() or 1,
            each=bar.update,
        )
    reached = shared_budgets(curves)
    if section.aim not in reached:
        raise PsyrayError(f"the pools hold {reached[-1] if reached else 0} labels, fewer than the aim, {section.aim}")
    found = {
        "set": declared.name,
        "prompts": {"all": len(prompts), request.part: len(chosen)},
        "dropped": dropped,
        "settings": section.model_dump(mode="json") | {"part": request.part},
        "strata": list(bank.strata),
        "strategies": figures(curves, bank.strata, aim=section.aim),
    }
    publish(
        found, request.out, "efficiency", page=page(found), plot=lambda path: plot(found, path),
        points=curve_points(found), track=request.track, say=say,
    )  # fmt: skip
    return found


def featured(items: Sequence[Labelled], section: EfficiencySection, least: int = LEAST) -> tuple[list[str], Bank]:
    """(prompt ids, their bank): features of every response, read from the cache or computed."""
    chats, reading = chats_of(items), Reading(section.layer, section.pooling)
    cache = FeatureCache(resolve_model(section.model), cache_folder() / "features")
    try:
        cache.fill(chats, [reading])
    except ValueError as error:  # a layer that the model does not have
        raise PsyrayError(f"efficiency.layer: {error}") from None
    return bank_of(items, cache.features(chats, reading), least)


def talks_of(items: Sequence[Labelled], least: int) -> dict[str, str]:
    """Of each prompt the conversation that it is one length of, by their ids (`least`: see `conversation_id`)."""
    return {item.speech_id: conversation_id(item.speech_id, item.messages, least) for item in items}


def chats_of(items: Sequence[Labelled]) -> Chats:
    """The conversations of a set with each of their replies, by content id."""
    return {chat_id(chat): chat for item in items for chat in _chats(item)}


def _chats(item: Labelled) -> tuple[list[Message], list[Message]]:
    a, b = ([*item.messages, {"role": "assistant", "content": text}] for text in (item.a, item.b))
    return a, b


def bank_of(items: Sequence[Labelled], features: Mapping[str, Any], least: int = LEAST) -> tuple[list[str], Bank]:
    """The bank of labelled comparisons; prompts in the order of their ids, replies in that of theirs.

    A tie between people is no label. Of two items about the same texts the first counts.
    """
    replies: dict[str, dict[str, None]] = {}
    for item in items:
        replies.setdefault(item.speech_id, {}).update(dict.fromkeys(map(chat_id, _chats(item))))
    prompts = sorted(replies)
    place = {reply: (p, k) for p, prompt in enumerate(prompts) for k, reply in enumerate(sorted(replies[prompt]))}
    P, K, D = len(prompts), max(map(len, replies.values())), len(next(iter(features.values())))
    strata = tuple(dict.fromkeys(item.stratum for item in sorted(items, key=lambda item: item.stratum)))
    features_PKD = np.full((P, K, D), np.nan)
    for reply, where in place.items():
        features_PKD[where] = features[reply]
    labels_PKK, strata_PKK = np.zeros((P, K, K), dtype=np.intp), np.zeros((P, K, K), dtype=np.intp)
    for item in items:
        (p, i), (_, j) = (place[chat_id(chat)] for chat in _chats(item))
        side = {Verdict.A: 1, Verdict.B: -1}.get(item.human, 0)
        if side and not labels_PKK[p, i, j]:
            labels_PKK[p, i, j], labels_PKK[p, j, i] = side, -side
            strata_PKK[p, i, j] = strata_PKK[p, j, i] = strata.index(item.stratum)
    if not labels_PKK.any():
        raise PsyrayError("the set holds no comparison that people decided: nothing to learn from")
    talks = talks_of(items, least)
    number = {talk: n for n, talk in enumerate(dict.fromkeys(talks[prompt] for prompt in prompts))}
    talks_P = np.array([number[talks[prompt]] for prompt in prompts])
    return prompts, Bank(features_PKD, labels_PKK, strata_PKK, strata, talks_P)


def curve_points(found: Mapping[str, Any]) -> list[Point]:
    """Each strategy's accuracy and lead over random as curves over the labels."""
    return [
        (f"{key}/{name}", row[key][1], row["labels"])
        for name, told in found["strategies"].items()
        for row in told["budgets"]
        for key in ("accuracy", "ahead")
    ]

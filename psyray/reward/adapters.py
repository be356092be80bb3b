"""LoRA adapters of the reward model: an ensemble whose members read differently, not only judge differently.

The stage leaves the reward model with its adapters in `model/adapters/0`, `1` and so on, so that whatever takes the
model's folder has them too. Each learns the reward model's loss from where the model stands, with a seed of its own, on
a bootstrap of the speeches (reward LoRA ensembles: arXiv 2401.00243). A response's features are its states under each
adapter, one after another, and a head reads one member's: so heads still follow new labels in seconds.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from psyray.config import Config
from psyray.looks import CHOICE, aside, check_parts, read_choice
from psyray.reward.body import ADAPTERS
from psyray.reward.train import dev_pairs, examples, losses, train_loop, usable
from psyray.run import Artifact, Folder, Run
from psyray.sections.learning import DevSection, RewardSection
from psyray.train import STEPS, read_steps, run_training


@dataclass
class Member(Folder):
    """The folder in which one of the adapters is trained; how far it is is told as a part of the stage."""

    stage: Folder = field(kw_only=True)
    number: int = field(kw_only=True)
    of: int = field(kw_only=True)

    def progress(self, done: int, total: int, unit: str = "rows") -> None:
        """As of `Folder`; members have about as many steps each."""
        self.stage.progress(self.number * total + done, self.of * total, unit)


def adapters_stage(run: Run, config: Config, reward: Artifact, pairs: Artifact) -> Artifact:
    """The stage `reward-adapters`: the reward model with its adapters; where none are asked for, the model as it is.

    Goes on after the last adapter that is done, and in the next one from its last checkpoint.
    """
    section = config.reward.adapters
    if not section.count:
        return reward

    def make(folder: Folder) -> Mapping[str, Any]:
        link_files(reward.model, folder.path / "model")
        check_dev(config, pairs)
        for number in range(section.count):
            kept = folder.path / "model" / ADAPTERS / str(number)
            member = Member(folder.path / f"member-{number}", stage=folder, number=number, of=section.count)
            if not kept.exists():
                train_member(member, config, reward, pairs)
                kept.parent.mkdir(exist_ok=True)
                (member.path / STEPS).rename(member.path / "adapter" / STEPS)
                if (choice := member.path / CHOICE).exists():
                    choice.rename(member.path / "adapter" / CHOICE)
                (member.path / "adapter").rename(kept)  # last: what has this name is whole
            shutil.rmtree(member.path, ignore_errors=True)
        adapters = folder.path / "model" / ADAPTERS
        return {"adapters": section.count, "steps": curves(adapters, section.count)} | choices(adapters, section.count)

    told = {"use_margin": config.reward.use_margin, "groups": config.reward.groups, **losses(config.reward)}
    settings = section.model_dump() | told | {"seed": config.run.seed}
    return run.stage("reward-adapters", settings, [reward, pairs], make)


def train_member(member: Member, config: Config, reward: Artifact, pairs: Artifact) -> None:
    """Train one adapter; it is then in the folder's `adapter`, its steps beside it."""
    section, seed, least = config.reward.adapters.train, config.run.seed, config.speeches.min_chars
    times = drawn(pairs, config.reward, seed, member.number, section.dev, least)
    member.path.mkdir(exist_ok=True)
    run_training(
        member,
        train_loop,
        examples(member, config.reward, pairs, times, lambda row: not aside(row, section.dev, least)),
        {"model": str(reward.model), **losses(config.reward), "seed": seed + 1 + member.number, "merge": False},
        section,
        config.engine,
        config.cluster,
        title=f"adapter {member.number + 1} of {member.of}",
        dev=examples(member, config.reward, pairs, keep=lambda row: aside(row, section.dev, least)),
    )


def check_dev(config: Config, pairs: Artifact) -> None:
    """PsyrayError where adapters put speeches aside and dev or training is left without a pair."""
    if dev := config.reward.adapters.train.dev:
        found = pairs.each(["split", "margin"])
        count = sum(row["split"] == "train" and usable(row, config.reward) for row in found)
        measured = dev_pairs(config.reward, pairs, dev, config.speeches.min_chars)
        check_parts("reward.adapters.train.dev", dev, measured, count)


def drawn(
    pairs: Artifact, reward: RewardSection, seed: int, number: int, dev: DevSection | None, least: int
) -> dict[str, int]:
    """How often member `number` sees each training speech: as many draws as there are speeches, with replacement.

    Those put aside as dev are not among them, nor those without a pair that the loss can take.
    """
    found = pairs.each(["speech_id", "messages", "split", "margin"])
    train = (row for row in found if row["split"] == "train" and usable(row, reward))
    ids = sorted({row["speech_id"] for row in train if not aside(row, dev, least)})
    times = np.random.default_rng([seed, number]).multinomial(len(ids), np.full(len(ids), 1 / len(ids)))
    return dict(zip(ids, times.tolist(), strict=True))


def curves(folder: Path, count: int) -> list[dict[str, Any]]:
    """The logged steps of all adapters side by side: {step, adapter-0: {loss, ...}, adapter-1: ...}."""
    found: dict[float, dict[str, Any]] = {}
    for number in range(count):
        for entry in read_steps(folder / str(number)):
            step = entry.pop("step")
            found.setdefault(step, {"step": step})[f"adapter-{number}"] = entry
    return [found[step] for step in sorted(found)]


def choices(folder: Path, count: int) -> dict[str, Any]:
    """What each adapter's looks at dev made of it, as numbers of the stage; empty where there was no dev."""
    found = {f"adapter-{number}": read_choice(folder / str(number)) for number in range(count)}
    known = {name: choice["dev"] for name, choice in found.items() if choice}
    return {"dev": known} if known else {}


def link_files(model: Path, folder: Path) -> None:
    """Make the folder hold the model's files too: as hard links, or copies where the file system has none."""
    folder.mkdir(exist_ok=True)
    for file in model.iterdir():
        if not file.is_file() or (folder / file.name).exists():
            continue
        try:
            os.link(file, folder / file.name)
        except OSError:  # tolerated: there are no hard links here, or not between these two folders
            draft = folder / f".{file.name}"
            shutil.copy2(file, draft)
            draft.replace(folder / file.name)

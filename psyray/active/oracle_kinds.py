"""Who labels what acquisition picks in a round: one plain dict of kinds, `oracle.kind` names one.

An oracle answers pairs of responses through the label ledger, so that a restart neither asks nor pays twice. A new
kind is a class with `id`, `identity` and `label`, and an entry in `ORACLES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from psyray.active import oracles
from psyray.active.experts import Experts
from psyray.active.labelled_set import LabelledPairs, labelled_source
from psyray.active.noise import Noisy
from psyray.active.oracles import Label, Pair
from psyray.config import Config
from psyray.data.judge import Desk
from psyray.run import Folder

Say = Callable[[str], None]


class Oracle(Protocol):
    """Says which of two responses is better; `identity` is what stands for it in a stage's fingerprint."""

    @property
    def id(self) -> str: ...

    @property
    def identity(self) -> dict[str, Any]: ...

    def label(
        self, folder: Folder, asked: Sequence[Pair], *, purpose: str, strategy: str, budget: int
    ) -> tuple[list[Label | None], dict[str, Any]]: ...


@dataclass(frozen=True)
class JudgeOracle:
    """The run's judge, or its panel."""

    desk: Desk

    @property
    def id(self) -> str:
        """The judge's."""
        return self.desk.judge.id

    @property
    def identity(self) -> dict[str, Any]:
        """The desk's where it compares."""
        return self.desk.labels_identity

    def label(
        self, folder: Folder, asked: Sequence[Pair], *, purpose: str, strategy: str, budget: int
    ) -> tuple[list[Label | None], dict[str, Any]]:
        """As `oracles.label`."""
        return oracles.label(folder, self.desk, asked, purpose=purpose, strategy=strategy, budget=budget)


def noisy(config: Config, desk: Desk, say: Say) -> Oracle:
    """The oracle that `oracle.of` names, with some of its answers flipped."""
    return Noisy(desk, ORACLES[config.oracle.of](config, desk, say), config.oracle.flip, config.oracle.seed)


ORACLES: Mapping[str, Callable[[Config, Desk, Say], Oracle]] = {
    "judge": lambda config, desk, say: JudgeOracle(desk),
    "experts": lambda config, desk, say: Experts(desk, config.oracle, say),
    "replay": lambda config, desk, say: LabelledPairs(desk, labelled_source(config.oracle), config.speeches.scrub),
    "noisy": noisy,
}


def make_oracle(config: Config, desk: Desk, say: Say) -> Oracle:
    """The configured oracle; PsyrayError where what it reads is not there."""
    return ORACLES[config.oracle.kind](config, desk, say)

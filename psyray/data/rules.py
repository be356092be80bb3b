"""Which two judged responses make a preference pair, and which one is chosen: pure rules over one speech's rows."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import floor, log2

import numpy as np

from psyray.errors import PsyrayError
from psyray.records import Row, normalise, pair_row
from psyray.rubric import Rubric
from psyray.sections.data import PairsSection

SAFETY = "safety"  # vetoes by default, in a rubric that has it
SLACK = 1e-6  # ratings are 32-bit: a difference this little below the gap is the gap


@dataclass(frozen=True)
class Rules:
    """The section's rules under a rubric; `make` checks one against the other."""

    section: PairsSection
    rubric: Rubric
    veto: tuple[str, ...]

    @classmethod
    def make(cls, section: PairsSection, rubric: Rubric) -> Rules:
        """PsyrayError names a principle that the rubric lacks, or a count that it cannot reach."""
        for setting, names in (("principles", section.principles), ("veto", section.veto or [])):
            if unknown := sorted(set(names) - set(rubric.keys)):
                raise PsyrayError(
                    f"pairs.{setting}: the rubric {rubric.name} has no principle {', '.join(unknown)}; "
                    f"it has {', '.join(rubric.keys)}"
                )
        if section.at_least > len(rubric.keys):
            raise PsyrayError(f"pairs.at_least is {section.at_least}, but the rubric has {len(rubric.keys)} principles")
        default = [SAFETY] if SAFETY in rubric.keys else []
        return cls(section, rubric, tuple(default if section.veto is None else section.veto))

    def measure(self, ratings: Mapping[str, float]) -> float:
        """What orders the responses: the weighted mean or sum, or the plain mean of `pairs.principles`."""
        if self.section.gap_on == "total":
            return sum(p.weight * ratings[p.key] for p in self.rubric.principles)
        if named := self.section.principles:
            return sum(ratings[key] for key in named) / len(named)
        return self.rubric.score(ratings)

    def against(self, chosen: Row, rejected: Row) -> str | None:
        """Why the two make no pair in this direction; None where they do."""
        if chosen["normal"] == rejected["normal"]:
            return "same text"
        if not self._wide_enough(chosen, rejected):
            return "gap too small"
        for key in self.veto:
            if chosen["ratings"][key] < rejected["ratings"][key]:
                return f"better but lower on {key}"
        ratio = self.section.max_length_ratio
        if ratio and _longer(chosen["normal"], rejected["normal"]) > ratio:
            return "over pairs.max_length_ratio"
        return None

    def _wide_enough(self, chosen: Row, rejected: Row) -> bool:
        gap = self.section.gap - SLACK
        lead = chosen["measure"] - rejected["measure"]
        if self.section.gap_on != "principle":
            return bool(lead >= gap)
        keys = self.section.principles or self.rubric.keys
        wide = sum(chosen["ratings"][key] - rejected["ratings"][key] >= gap for key in keys)
        return bool(lead > 0 and wide >= self.section.at_least)


def _longer(a: str, b: str) -> float:
    short, long = sorted((len(a), len(b)))
    return long / max(short, 1)


def pairs_of_speech(responses: Sequence[Row], rules: Rules, dropped: Counter[str]) -> list[Row]:
    """PAIRS rows of one speech's judged responses, widest first; `dropped` counts why candidates became none.

    `rule` all takes every two responses, best_worst only the two ends. The margin is in the unit of `gap_on`.
    """
    if len(responses) < 2:
        dropped["one response only"] += 1
        return []
    seen = [r | {"measure": rules.measure(r["ratings"]), "normal": normalise(r["text"])} for r in responses]
    ordered = sorted(seen, key=lambda r: (r["measure"], r["response_id"]))
    found = []
    for rejected, chosen in combinations(ordered, 2) if rules.section.rule == "all" else [(ordered[0], ordered[-1])]:
        if reason := rules.against(chosen, rejected):
            dropped[reason] += 1
        else:
            margin = chosen["measure"] - rejected["measure"]
            found.append(pair_row(chosen, chosen, rejected, margin=margin, source="judge"))
    found.sort(key=lambda p: (-p["margin"], p["pair_id"]))
    kept = found[: rules.section.max_per_speech]
    dropped["over pairs.max_per_speech"] += len(found) - len(kept)
    return kept


class LengthBalance:
    """Which pairs stay so that the chosen text is longer as often as it is shorter.

    Of each split and each band of the length ratio (a factor of the square root of 2 wide), the commoner direction
    loses its surplus: the pairs whose id hashes highest, which is a draw that neither ratings nor texts steer. Texts
    of one length stay.

    This is case-control sampling: under Bradley-Terry, dropping by outcome within a band shifts the log odds of "the
    longer one wins" by one constant a band and leaves what any other feature says (Prentice and Pyke, 1979). So it
    takes away length as a shortcut, along with whatever of it was deserved. `pairs.max_length_ratio` selects by the
    texts alone, which biases no label, but balances nothing: within the bound the longer one may still always win.

    Holds 8 bytes a pair: `add` every pair, then ask `keeps`.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[str, int, bool], array[int]] = defaultdict(lambda: array("Q"))
        self._last: dict[tuple[str, int, bool], int] | None = None

    def add(self, pair: Row) -> None:
        """Count a pair."""
        if group := _group(pair):
            self._seen[group].append(_draw(pair))

    def keeps(self, pair: Row) -> bool:
        """Whether a pair that was added stays."""
        if self._last is None:
            self._last = {group: self._threshold(group) for group in self._seen}
        group = _group(pair)
        return group is None or _draw(pair) <= self._last[group]

    def _threshold(self, group: tuple[str, int, bool]) -> int:
        split, band, chosen_longer = group
        draws = self._seen[group]
        room = len(self._seen.get((split, band, not chosen_longer), ()))
        if room >= len(draws):
            return 2**64
        return int(np.partition(np.frombuffer(draws, np.uint64), room - 1)[room - 1]) if room else -1


def _group(pair: Row) -> tuple[str, int, bool] | None:
    chosen, rejected = (normalise(pair[side]) for side in ("chosen", "rejected"))
    if len(chosen) == len(rejected):
        return None
    return pair["split"], floor(2 * log2(_longer(chosen, rejected))), len(chosen) > len(rejected)


def _draw(pair: Row) -> int:
    return int(pair["pair_id"], 16)

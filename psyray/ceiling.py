"""The ceiling on answers that cannot be used: past it a stage stops, rather than go on with what is left.

A single one among several is let pass, since of nine answers it is more than a tenth; a ceiling of 0 means none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from psyray.errors import PsyrayError


@dataclass(frozen=True)
class Ceiling:
    """The share of answers that may be unusable, and the setting that says it."""

    share: float
    setting: str

    def passed(self, unusable: int, count: int) -> bool:
        """Whether too many of `count` answers are unusable."""
        single = unusable == 1 < count and self.share > 0
        return unusable > self.share * count and not single


def check_ceiling(
    stage: str, what: str, errors: Counter[str], count: int, ceiling: Ceiling, mend: Callable[[], str]
) -> None:
    """PsyrayError where `errors`, those of the unusable among `count` answers, pass the ceiling.

    It says `what` the unusable are, such as `responses failed`; `mend` says how to go on, and may put them aside first.
    """
    bad = errors.total()
    if not ceiling.passed(bad, count):
        return
    [(error, _)] = errors.most_common(1)
    raise PsyrayError(
        f"{stage}: {bad} of {count} {what} ({bad / count:.0%}), more than {ceiling.setting} ({ceiling.share:.0%}); "
        f"most often: {error[:300]}. {mend()}"
    )

"""When answers that cannot be used are too many."""

from collections import Counter

import pytest

from psyray.ceiling import Ceiling, check_ceiling
from psyray.errors import PsyrayError


@pytest.mark.parametrize(
    ("unusable", "count", "share", "stops"),
    [
        (0, 0, 0.1, False), (0, 4, 0.0, False), (1, 4, 0.1, False), (1, 2, 0.1, False),  # a single one among several
        (1, 1, 0.1, True), (4, 4, 0.1, True),  # all of them
        (4, 4, 1.0, False), (1, 1, 1.0, False),  # which is what a ceiling of 1 says
        (1, 4, 0.0, True),  # none may be
        (2, 4, 0.1, True), (2, 20, 0.1, False), (3, 20, 0.1, True),
    ],
)  # fmt: skip
def test_what_passes_a_ceiling(unusable: int, count: int, share: float, stops: bool) -> None:
    assert Ceiling(share, "judge.max_invalid_share").passed(unusable, count) is stops


def test_the_error_names_stage_count_setting_cause_and_mend() -> None:
    done: list[str] = []

    def mend() -> str:
        done.append("set aside")
        return "Mend it."

    ceiling = Ceiling(0.1, "judge.max_invalid_share")
    check_ceiling("judgements", "answers are bad", Counter({"gone": 1}), 20, ceiling, mend)
    assert done == []
    said = (
        r"^judgements: 3 of 20 answers are bad \(15%\), more than judge\.max_invalid_share \(10%\); most often: gone\. "
        r"Mend it\.$"
    )
    with pytest.raises(PsyrayError, match=said):
        check_ceiling("judgements", "answers are bad", Counter({"gone": 2, "late": 1}), 20, ceiling, mend)
    assert done == ["set aside"]

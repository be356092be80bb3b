"""What several judges say together: the pure rules of a panel, and how far its judges agree.

Each judge of a panel is asked by itself and its answers are ledger rows of their own, so a judge that joins a panel
later brings what was bought from it before. The rules:

- A response, or a comparison, that fewer than `panel.quorum` judges (none set: all) gave a usable answer for is
  invalid. No rating is made up for the one that is missing. Where the budget did not reach so many it was not judged.
- `mean` and `median` are taken principle by principle over the judges that answered. `majority` is the whole number
  that at least `panel.agree` judges (none set: more than half of the panel) gave; where there is none for a principle
  the response is invalid.
- On the principles of `panel.strictest_on` the lowest rating counts, whatever the rule.
- Judges that compare side by side vote: the verdict of at least `panel.agree` judges, else a tie.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

import numpy as np

from psyray.arrays import FloatArray
from psyray.evaluate.agreement import CODE, alpha, number_or_none, with_interval
from psyray.records import Row, Status, Verdict
from psyray.rubric import Rubric, UnusableAnswer
from psyray.sections.data import PanelSection

Ratings = Mapping[str, float]
SAMPLE = 2000  # responses that the judges' agreement is measured on: alpha needs a matrix for each


def merge(ratings: Sequence[Ratings | None], rubric: Rubric, panel: PanelSection) -> dict[str, float]:
    """The panel's ratings from each judge's, None for one without; UnusableAnswer where the rules give none."""
    given = [r for r in ratings if r is not None]
    if len(given) < panel.needed:
        raise UnusableAnswer(f"{len(given)} of {len(ratings)} judges gave a usable answer, {panel.needed} must")
    return {key: _merged(key, [r[key] for r in given], panel) for key in rubric.keys}


def _merged(key: str, values: Sequence[float], panel: PanelSection) -> float:
    if key in panel.strictest_on:
        return min(values)
    if panel.rule == "mean":
        return fmean(values)
    if panel.rule == "median":
        return median(values)
    (value, count), *_ = Counter(round(v) for v in values).most_common(1)
    if count < panel.majority:
        raise UnusableAnswer(f"no {panel.majority} judges give the same rating for {key}")
    return float(value)


def vote(verdicts: Sequence[Verdict], panel: PanelSection) -> Verdict:
    """The panel's verdict from each judge's on the same comparison."""
    valid = [v for v in verdicts if v is not Verdict.INVALID]
    if len(valid) < panel.needed or not valid:
        return Verdict.INVALID
    (leader, count), *_ = Counter(valid).most_common(1)
    return leader if count >= panel.majority else Verdict.TIE


def panel_rows(answered: Sequence[Sequence[Row]], panel_id: str, rubric: Rubric, panel: PanelSection) -> list[Row]:
    """JUDGEMENTS rows of the panel from those of its judges, joined by response id, in the first judge's order.

    What each judge said stays in `raw_text` as JSON, null for one that the budget did not reach. A response that was
    put to fewer judges than must answer has no row, like any other that the budget did not reach.
    """
    by_judge = [{row["response_id"]: row for row in rows} for rows in answered]
    asked = Counter(key for rows in by_judge for key in rows)
    whole = [key for key, count in asked.items() if count >= panel.needed]
    return [_panel_row([rows.get(key) for rows in by_judge], panel_id, rubric, panel) for key in whole]


def _panel_row(given: Sequence[Row | None], panel_id: str, rubric: Rubric, panel: PanelSection) -> Row:
    rows = [row for row in given if row is not None]
    errors = [f"{row['judge']}: {row['error']}" for row in rows if row["error"]]
    ratings: dict[str, float] | None = None
    try:
        ratings = merge([row["ratings"] if row else None for row in given], rubric, panel)
    except UnusableAnswer as error:
        errors.insert(0, str(error))
    said = [row and {key: row[key] for key in ("judge", "ratings", "raw_text", "error")} for row in given]
    return {
        "response_id": rows[0]["response_id"],
        "speech_id": rows[0]["speech_id"],
        "crisis": rows[0].get("crisis"),
        "judge": panel_id,
        "ratings": ratings,
        "score": rubric.score(ratings) if ratings else None,
        "status": Status.OK if ratings else Status.INVALID,
        "error": "; ".join(errors),
        "raw_text": json.dumps(said),
        "attempts": sum(row["attempts"] for row in rows),
    }


def judges_agreement(judged: Iterable[Row], rubric: Rubric) -> dict[str, Any]:
    """Krippendorff's alpha (interval) among a panel's judges over its JUDGEMENTS rows.

    Over all principles with its 95 % interval clustered by speech, and for each; on whole-number ratings of the first
    SAMPLE responses by id, which is a random sample. None where it is not defined.
    """
    sampled = heapq.nsmallest(SAMPLE, judged, key=lambda row: str(row["response_id"]))
    if not sampled:
        return {}
    missing = dict.fromkeys(rubric.keys, float("nan"))
    said = [
        [(judge and judge["ratings"]) or missing for judge in json.loads(row["raw_text"])] for row in sampled
    ]  # fmt: skip
    ratings_NKJ = np.round([[[judge[key] for judge in row] for key in rubric.keys] for row in said])

    def over_all(rows_NKJ: FloatArray) -> float:
        return alpha(rows_NKJ.reshape(-1, rows_NKJ.shape[-1]), "interval")

    found = with_interval(ratings_NKJ, [row["speech_id"] for row in sampled], over_all)
    by_key = {k: number_or_none(alpha(ratings_NKJ[:, i], "interval")) for i, k in enumerate(rubric.keys)}
    return found | {"principles": by_key, "responses": len(sampled)}


def verdicts_agreement(verdicts: Sequence[Sequence[Verdict | None]], speech_ids: Sequence[str]) -> dict[str, Any]:
    """Krippendorff's alpha (nominal) among judges over [comparison][judge] verdicts, None for one not asked."""
    codes_NJ = np.asarray([[CODE[verdict or Verdict.INVALID] for verdict in each] for each in verdicts])
    return with_interval(codes_NJ, speech_ids, alpha)

"""The stage `reward-topics`: how right the last heads are on each topic that clients bring.

Nothing is made from it, so topics can be picked anew, or for the first time, without a round being done again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from psyray.data.speeches import TOPICS_SHOWN
from psyray.records import Row
from psyray.reward.ensemble import labelled_pairs, margins
from psyray.reward.heads import Heads
from psyray.reward.held_out import Strata
from psyray.reward.metrics import length_baseline, part
from psyray.run import Artifact, Folder, Run

NONE, OTHERS = "none", "others"


def by_topic_stage(
    run: Run, heads: Artifact, features: Sequence[Artifact], pairs: Sequence[Artifact], topics: Artifact
) -> Artifact:
    """Accuracy of `heads` by topic on the held-out pairs; `topics` has `speech_id` and `topic`, null or "" for none."""

    def make(folder: Folder) -> Mapping[str, Any]:
        labelled, known = labelled_pairs(pairs, features)
        test = [row for row in labelled if row["split"] == "test"]
        found = {row["speech_id"]: row["topic"] for row in topics.each(["speech_id", "topic"])}
        names = [found.get(row["speech_id"]) or NONE for row in test]
        margins_N = margins(Heads.load(heads.path / "heads.npz"), test, known).mean_N
        return {"strata": by_topic(margins_N, test, names)}

    return run.stage("reward-topics", {}, [heads, *features, *pairs, topics], make)


def by_topic(
    margins_N: npt.NDArray[np.float64], pairs: Sequence[Row], topics: Sequence[str], most: int = TOPICS_SHOWN
) -> Strata:
    """Accuracy on the pairs of each topic, those of most pairs first and the rest as one; empty where none has any."""
    if set(topics) <= {NONE}:
        return {}
    largest = [name for name, _ in sorted(Counter(topics).items(), key=lambda item: (-item[1], item[0]))][:most]
    shown_N = np.asarray([name if name in set(largest) else OTHERS for name in topics])
    speeches = [row["speech_id"] for row in pairs]
    length_N = length_baseline([row["chosen"] for row in pairs], [row["rejected"] for row in pairs])
    order = [*largest, *([OTHERS] if OTHERS in shown_N and OTHERS not in largest else [])]
    return {"topic": {name: part(margins_N, length_N, speeches, shown_N == name) for name in order}}

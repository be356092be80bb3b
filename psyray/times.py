"""Where a round's time went, from the seconds that its stages wrote into their manifests.

A judge that vLLM starts here, or that is asked over a network, is in `labels` and `evaluation` with all that it took.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from psyray.run import Artifact

PARTS = ("engine start", "sampling", "scoring", "labels", "training", "evaluation")
ROUND = re.compile(r"round-(\d+)/(\w+?)(-again)?$")  # a round's stage
PART_OF = {
    "samples": "sampling",
    "features": "scoring",
    "scores": "scoring",
    "labels": "labels",
    "heads": "training",
    "policy": "training",
    "probe": "evaluation",
    "second": "evaluation",
    "gate": "evaluation",
}


def round_of(stage: str) -> int | None:
    """The round that a stage is of, by its name; None for a stage of no round."""
    found = ROUND.match(stage)
    return int(found[1]) if found else None


def spent(artifact: Artifact) -> tuple[int, dict[str, float]] | None:
    """(round, seconds by part) of one stage; None for a stage of no round.

    What an engine took to start is a part of its own, where the stage noted it.
    """
    found = ROUND.match(artifact.name)
    if not found or found[2] not in PART_OF:
        return None
    seconds = float(artifact.manifest["seconds"])
    start = min(seconds, float(artifact.stats.get("engine_start_s") or 0))
    parts = {"engine start": start} if start else {}
    return int(found[1]), parts | {PART_OF[found[2]]: seconds - start}


def by_round(artifacts: Iterable[Artifact]) -> dict[int, dict[str, float]]:
    """Round -> part -> seconds, in the order of `PARTS`, for the parts that there were."""
    sums: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for artifact in artifacts:
        if found := spent(artifact):
            for part, seconds in found[1].items():
                sums[found[0]][part] += seconds
    return {n: in_order(sums[n]) for n in sorted(sums)}


def in_order(parts: Mapping[str, float]) -> dict[str, float]:
    """The parts as `PARTS` has them."""
    return {part: parts[part] for part in PARTS if part in parts}

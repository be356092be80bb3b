"""Which open questions wait for whom, in words: a run that waits for people must not look like one that is at work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from psyray.active.database import Database, lacking
from psyray.active.place import place_of
from psyray.active.queue import ExpertQueue
from psyray.active.standing import Waiting
from psyray.run import find_run
from psyray.status import read_config

NAMED = 3  # questions that a message names


@dataclass(frozen=True)
class Wait:
    """The open questions that lack answers, and who has come so far."""

    questions: Sequence[Waiting]

    @property
    def for_nobody(self) -> list[Waiting]:
        """Those that nobody who has come may still answer."""
        return [waiting for waiting in self.questions if not waiting.may]

    @property
    def stuck(self) -> bool:
        """Whether the wait would never end with those who have come."""
        return bool(self.questions) and len(self.for_nobody) == len(self.questions)

    def told(self) -> str:
        """Which questions wait for whom, and the mend where some wait for nobody; empty where none waits."""
        some = Counter(name for waiting in self.questions for name in waiting.may)
        waits = [f"{name} may answer {count}" for name, count in sorted(some.items())]
        told = [f"{len(self.questions)} open questions lack answers" + (f": {', '.join(waits)}" if waits else "")]
        return "; ".join(told + ([self._nobody()] if self.for_nobody else [])) if self.questions else ""

    def _nobody(self) -> str:
        left = self.for_nobody
        ids = ", ".join(waiting.question_id for waiting in left[:NAMED]) + (", ..." if len(left) > NAMED else "")
        lacking = sum(waiting.lacking for waiting in left)
        skipped = Counter(name for waiting in left for name in waiting.skipped)
        had = sorted({name for waiting in left for name in (*waiting.answered, *waiting.skipped)})
        why = f"{', '.join(had)} had them, and {lacking} answers are lacking" if had else "no expert has answered yet"
        undo = [f"have {' or '.join(sorted(skipped))} undo a skip"] if skipped else []
        mend = [
            f"Give {'another' if had else 'an'} expert a key",
            *undo,
            "or stop and run the same command with oracle.wait_s",
        ]
        return f"{len(left)} wait for nobody ({ids}): {why}. {', '.join(mend)} and oracle.fall_back"


def wait_of(run: Path) -> str:
    """What a run that asks experts waits for, from its ledger; empty where it asks nobody or lacks nothing."""
    oracle = read_config(find_run(run)).get("oracle") or {}
    if "experts" not in (oracle.get("kind"), oracle.get("of") if oracle.get("kind") == "noisy" else ""):
        return ""
    place = place_of(run)
    if lacking(place.ledger):
        return ""  # looking must not make one
    database = Database(place.ledger)
    told = Wait(ExpertQueue(database, place.runs).waiting()).told()
    database.close()
    return told

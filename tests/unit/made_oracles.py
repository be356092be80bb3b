"""Pairs of a good and a bad text, and an oracle that is asked about them; the desk and the folder are fixtures."""

from __future__ import annotations

from psyray.active.experts import Experts
from psyray.data.judge import Desk
from psyray.records import Verdict
from psyray.run import Folder
from psyray.sections.learning import OracleSection

SPEECH = [{"role": "user", "content": "I cannot sleep since my father died."}]
WHY = {"value": 0.5}


def pairs(count: int) -> list[tuple[dict, dict, dict]]:
    """(good, bad) and (bad, good) by turns."""
    made = []
    for i in range(count):
        good, bad = ({"messages": SPEECH, "text": f"{word} {i}"} for word in ("good", "bad"))
        made.append((good, bad, WHY) if i % 2 else (bad, good, WHY))
    return made


def people(desk: Desk, said: list[str] | None = None, **settings) -> Experts:
    section = OracleSection(kind="experts", **{"undo_s": 0, **settings})
    return Experts(desk, section, (said if said is not None else []).append, poll_s=0.01)


def ask(oracle, folder: Folder, count: int, budget: int = 100):
    return oracle.label(folder, pairs(count), purpose="round-1", strategy="drts", budget=budget)


def verdicts(labels) -> list[Verdict | None]:
    return [label and label[0] for label in labels]

"""Made-up judged responses, and a run whose pairs the real stage makes of them."""

import json
import random
from pathlib import Path
from typing import Any

from made_stage import made_stage

from psyray.config import Config
from psyray.data.pairs import pairs_stage
from psyray.data.topics import TOPICS
from psyray.records import JUDGEMENTS, PAIRS, RESPONSES, SPEECHES, Row, content_id, pair_row, speech_id
from psyray.rubric import load_rubric
from psyray.run import Artifact, Run
from psyray.sections.data import PairsSection

RUBRIC = load_rubric("counselling")
SPEECH = [{"role": "user", "content": "I cannot sleep."}]


def judged(*ratings: Any, speech: str = "s", texts: list[str] | None = None) -> list[Row]:
    """Rows of one speech; a number rates every principle alike."""
    every = [r if isinstance(r, dict) else dict.fromkeys(RUBRIC.keys, r) for r in ratings]
    return [
        {"response_id": f"{speech}{i}", "speech_id": speech, "messages": SPEECH, "split": "train", "model": "m",
         "text": texts[i] if texts else f"reply {i}", "ratings": rated}
        for i, rated in enumerate(every)
    ]  # fmt: skip


def made_rows(speeches: int, seed: int = 1) -> tuple[list[Row], list[Row]]:
    """Responses, three to a speech, and their judgements, both in any order; every fourth speech is held out."""
    order = random.Random(seed)
    responses = [
        row | {"status": "ok", "split": "test" if number % 4 == 0 else "train", "responder": "r", "seed": 0}
        for number in range(speeches)
        for row in judged(*(order.choice([1.0, 2.0, 3.0, 4.0]) for _ in range(3)), speech=content_id(number))
    ]
    judgements = [
        {"response_id": r["response_id"], "speech_id": r["speech_id"], "judge": "j", "ratings": r["ratings"],
         "score": RUBRIC.score(r["ratings"]), "status": "ok"}
        for r in responses
    ]  # fmt: skip
    for rows in (responses, judgements):
        order.shuffle(rows)
    return responses, judgements


def _inputs(run: Run, responses: list[Row], judgements: list[Row]) -> tuple[Artifact, Artifact]:
    given = made_stage(
        run, "responses", RESPONSES, "response_id", responses, settings={"of": len(responses)},
        stats={"ok": len(responses), "failed": 0},
    )  # fmt: skip
    return given, made_stage(
        run, "judgements", JUDGEMENTS, "response_id", judgements, settings={"of": len(judgements)},
        stats={"judge": "j", "ok": len(judgements)},
    )  # fmt: skip


def made_pairs(home: Path, responses: list[Row], judgements: list[Row], **settings: Any) -> Artifact:
    """The real stage `pairs` over these rows, in a run at `home`."""
    run = Run(home, say=lambda line: None)
    with run.open(Config().model_dump(mode="json")):
        return pairs_stage(run, PairsSection(**settings), RUBRIC, *_inputs(run, responses, judgements))


def finished_run(
    home: Path, speeches: int = 24, seed: int = 1, rated: dict[float, float] | None = None, **settings: Any
) -> Artifact:
    """A run with speeches, responses, judgements, pairs and one round's labels; its pairs.

    Every fifth speech ends a conversation; every sixth speaks of a crisis; a third of the responses has a model that
    was loaded from a path. `rated` puts other ratings in the place of the whole numbers.
    """
    responses, judgements = made_rows(speeches, seed)
    said = {content_id(n): _speech(n) for n in range(speeches)}
    for row in responses:
        speech, last = said[row["speech_id"]], row["response_id"][-1]
        row |= {key: speech[key] for key in ("speech_id", "messages", "split")}
        row |= {"text": f"{row['text']} to {speech['speech_id']}", "model": "/models/llama 3b/" if last == "0" else "m"}
    for row in judgements:
        row["speech_id"] = said[row["speech_id"]]["speech_id"]
        row["ratings"] = {key: (rated or {}).get(value, value) for key, value in row["ratings"].items()}
    run = Run(home, say=lambda line: None)
    with run.open(Config().model_dump(mode="json")):
        dropped = {"read": speeches + 3, "dropped": {"too short": 3}}
        made_stage(run, "speeches", SPEECHES, "speech_id", said.values(), stats=dropped)
        section = PairsSection(**{"gap": 1.0} | settings)
        made = pairs_stage(run, section, RUBRIC, *_inputs(run, responses, judgements))
        asked = said[content_id(1)]
        first, second, _ = (r | {"ratings": None} for r in responses if r["speech_id"] == asked["speech_id"])
        oracle = pair_row(asked, first, second, margin=1.0, source="oracle")
        made_stage(run, "round-1/labels", PAIRS, "pair_id", [oracle], stats={"agreement": 0.75})
    return made


def _speech(number: int) -> Row:
    messages = [{"role": "user", "content": f"I cannot sleep, for the {number}th night."}]
    if number % 5 == 0:
        messages = [*SPEECH, {"role": "assistant", "content": "Since when?"}, *messages]
    return {
        "speech_id": speech_id(messages),
        "messages": messages,
        "split": "test" if number % 4 == 0 else "train",
        "topic": ("sleep", "work", "a | b")[number % 3],
        "subtopic": "",
        "crisis": number % 6 == 0,
    }


def add_topics(home: Path, speeches: list[Row]) -> None:
    """The stage `topics` in the run: every second speech has one, the others' answers could not be used."""
    run = Run(home, say=lambda line: None)
    run.stages = json.loads((home / "run.json").read_text())["stages"]
    picked = [
        {"speech_id": s["speech_id"], "topic": "picked" if n % 2 else None, "subtopic": "so" if n % 2 else None}
        for n, s in enumerate(speeches)
    ]
    with run.open(Config().model_dump(mode="json")):
        made_stage(run, "topics", TOPICS, "speech_id", picked)

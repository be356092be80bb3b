"""The expert queue over HTTP, and the page on which experts answer: blind, one question at a time.

    serve run serve.annotate:build run=RUN keys=FILE

    GET  /                   the page                     GET  /experts/progress     counts, the expert's own too
    GET  /experts/next       a question, 204 if none      GET  /experts/agreement    with others, all and the last 20
    POST /experts/answer     left, right, tie, ...        GET  /experts/rubric       principles, their scale, a contact
    POST /experts/undo       the last answer, taken back  GET  /healthz              200 while the ledger answers
    POST /experts/release    the question, for others

An expert is a key with the role `annotate` (serve/access.py). The answers are in the label ledger's database when a
reply comes, so that the server may be killed at any moment; several servers may serve one ledger. No client text is
logged or stands in errors.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

from psyray.active.leases import Answered, Gone, Lease, NoTicket, QueueError
from psyray.active.ledger import Ledger
from psyray.active.place import place_of
from psyray.active.queue import ExpertQueue
from psyray.active.votes import Choice
from psyray.rubric import Rubric, load_rubric
from serve.access import VARIABLE, Key, Limits, keys_with
from serve.champion import Words
from serve.health import Health
from serve.mistakes import in_one_line
from serve.pages import asker, deployed, page_app
from serve.refusals import Strict

MAX_BODY = 64 * 1024  # bytes; an answer is a note of MAX_NOTE characters and a few ratings
MAX_NOTE = 4_000
LAST = 20  # answers that `agreement` looks at beside all
STATUS: dict[type[QueueError], int] = {NoTicket: 404, Answered: 409, Gone: 410}


class Args(Words):
    """The words of `serve.annotate:build`."""

    usage = "serve run serve.annotate:build run=RUN"

    run: Path = Field(description="the folder of a run whose questions experts answer")
    keys: Path | None = Field(None, description=f"file of keys (serve/access.py); none: ${VARIABLE}")
    per_minute: int = Field(600, ge=1, description="requests a minute of one expert")
    contact: str = Field("", max_length=200, description="whom experts may turn to, shown on the page")


@dataclass(frozen=True)
class Desk:
    """What a server needs of a run: where the questions are, how they are shown, and who may answer."""

    ledger: str
    runs: frozenset[str]  # what the run may be called in the ledger
    rubric: Rubric
    lease_s: float
    keys: tuple[Key, ...]
    per_minute: int = 600
    contact: str = ""


@in_one_line
def build(args: dict[str, str]) -> Any:
    """The Serve application of a run's expert queue; PsyrayError names what is wrong with the arguments or the run."""
    return deployed("Annotate", http_app, lambda: open_desk(Args.read(args)))


def open_desk(asked: Args) -> Desk:
    """What the run's configuration says of its experts; PsyrayError where there is no run or no key."""
    place = place_of(asked.run, "start one with `psyray run CONFIG oracle.kind=experts run.path={folder}`")
    keys = keys_with("annotate", asked.keys, "expert")
    rubric, lease_s = load_rubric(place.config.rubric), place.config.oracle.lease_s
    return Desk(place.ledger, place.runs, rubric, lease_s, keys, asked.per_minute, asked.contact)


class Given(Strict):
    """An expert's answer."""

    question_id: str = Field(max_length=128, pattern=r"^[!-~]+$")  # PostgreSQL takes no NUL for a text
    choice: Choice
    ratings: dict[str, dict[str, int]] = Field(
        default_factory=dict, description="by left and right, then by principle; as many as the expert likes"
    )
    note: str = Field("", max_length=MAX_NOTE)


def http_app(desk: Desk) -> FastAPI:
    """The application around the run's queue."""
    limits = Limits(body_bytes=MAX_BODY, per_minute=desk.per_minute)
    queue = ExpertQueue(Ledger(desk.ledger).database, desk.runs)
    health = Health(lambda: asyncio.to_thread(queue.progress, question_ids=[]))
    app = page_app("psyray experts", "annotate", [experts], desk.keys, limits, health)
    app.state.desk, app.state.queue = desk, queue
    app.add_exception_handler(QueueError, _cannot)
    return app


def _queue(request: Request) -> ExpertQueue:
    queue: ExpertQueue = request.app.state.queue
    return queue


Queue = Annotated[ExpertQueue, Depends(_queue)]
Expert = Annotated[str, Depends(asker)]
experts = APIRouter(prefix="/experts")


@experts.get("/next")
def following(expert: Expert, queue: Queue, request: Request) -> Response:
    """The question that is the expert's now; 204 where there is none for them."""
    lease = queue.lease(expert, request.app.state.desk.lease_s)
    return _shown(lease) if lease else Response(status_code=204)


@experts.post("/answer")
def answer(given: Given, expert: Expert, queue: Queue, request: Request) -> JSONResponse:
    """Keep the answer; 404, 409 or 410 where it is not, or no longer, the expert's to give."""
    _check_ratings(given.ratings, request.app.state.desk.rubric)
    queue.answer(expert, given.question_id, given.choice, given.ratings, given.note)
    return JSONResponse(queue.progress(expert))


@experts.post("/undo")
def undo(expert: Expert, queue: Queue, request: Request) -> Response:
    """Take the last answer back and show its question; 404 where there is none, 410 where it is final."""
    return _shown(queue.undo(expert, request.app.state.desk.lease_s))


@experts.post("/release")
def release(expert: Expert, queue: Queue) -> JSONResponse:
    """Give the question that the expert holds back to others, for a break or the end of the day."""
    return JSONResponse({"released": queue.release(expert)})


@experts.get("/progress")
def progress(expert: Expert, queue: Queue) -> JSONResponse:
    """Counts over the run's questions, and the expert's own."""
    return JSONResponse({"expert": expert, **queue.progress(expert)})


@experts.get("/agreement")
def agreement(expert: Expert, queue: Queue) -> JSONResponse:
    """How far the expert's answers agree with others' on the same questions."""
    return JSONResponse({"all": queue.agreement(expert), "last": queue.agreement(expert, LAST)})


@experts.get("/rubric")
def rubric(expert: Expert, request: Request) -> JSONResponse:
    """What responses may be rated by, and whom to turn to."""
    desk: Desk = request.app.state.desk
    shown = desk.rubric
    principles = [{"key": p.key, "name": p.name, "guidance": p.guidance} for p in shown.principles]
    scale = {"low": shown.low, "high": shown.high, "principles": principles}
    names = {"speaker": shown.speaker, "answerer": shown.answerer}
    return JSONResponse(scale | names | {"contact": desk.contact})


def _shown(lease: Lease) -> JSONResponse:
    shown = asdict(lease)
    if lease.said is None:
        del shown["said"]
    return JSONResponse(shown)


def _check_ratings(ratings: dict[str, dict[str, int]], rubric: Rubric) -> None:
    """422 for a side, principle or number that the rubric does not have."""
    for side, values in ratings.items():
        if side not in ("left", "right"):
            raise HTTPException(422, "ratings: a side is left or right")
        if set(values) - set(rubric.keys):
            raise HTTPException(422, f"ratings.{side}: the principles are {', '.join(rubric.keys)}")
        if any(not rubric.low <= value <= rubric.high for value in values.values()):
            raise HTTPException(422, f"ratings.{side}: a rating is a whole number from {rubric.low} to {rubric.high}")


async def _cannot(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, next(code for kind, code in STATUS.items() if isinstance(error, kind)))

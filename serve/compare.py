"""Two served policies side by side in conversation: a person writes, both answer, blind, and the person chooses.

    serve run configs/serve.yaml                                            with the policies on one port, at /compare/
    serve run serve.compare:build run=RUN keys=FILE url=URL [models=NAME,NAME] [reveal=true]      policies elsewhere

    GET  /                the page                        POST /turns/choose   which answer is better
    POST /turns/say       words; both answers, streamed   POST /turns/view     what the reward model thinks of both
    GET  /turns/about     principles, scale, a contact    GET  /healthz        200 while the ledger answers

The policies and the reward model are asked at `url`, in OpenAI's format, with the token in PSYRAY_POLICY_KEY. Who may
use the page is a key with the role `compare`. At each turn the sides are drawn anew, and the conversation goes on with
the answer that was chosen, so that what is kept is a choice between two answers to the same words. Choices go into the
run's label ledger as a kind of their own (psyray/active/conversations.py). A turn that is not chosen is in this
process's memory only; nothing that is said is logged or stands in errors.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from pydantic import Field, model_validator
from starlette.responses import JSONResponse, StreamingResponse

from psyray.active.conversations import Chosen, keep
from psyray.active.ledger import Ledger
from psyray.active.place import ledger_name, place_of
from psyray.active.votes import Choice
from psyray.errors import PsyrayError
from psyray.rubric import Rubric, load_rubric
from serve.access import VARIABLE, Key, Limits, keys_with
from serve.champion import Words
from serve.endpoint import Endpoint, NoAnswer
from serve.health import Health
from serve.mistakes import in_one_line
from serve.pages import asker, deployed, page_app
from serve.refusals import Strict
from serve.turn import SIDES, Turn

TOKEN = "PSYRAY_POLICY_KEY"
MAX_BODY = 1_000_000  # bytes
MAX_CHARS = 16_000  # of one text
MAX_MESSAGES = 63


class Args(Words):
    """The words of `serve.compare:build`."""

    usage = "serve run serve.compare:build run=RUN"

    run: Path = Field(description="the folder of the run whose ledger keeps the choices")
    url: str = Field("http://127.0.0.1:8000", pattern=r"^https?://", description="the server of the policies")
    models: str = Field("", description="two names of it, NAME,NAME; none: the first two that it lists")
    keys: Path | None = Field(None, description=f"file of keys (serve/access.py); none: ${VARIABLE}")
    keep: bool = Field(True, description="whether choices are written into the ledger")
    reveal: bool = Field(False, description="whether each choice is followed by the policies' names")
    per_minute: int = Field(600, ge=1, description="requests a minute of one person")
    contact: str = Field("", max_length=200, description="whom people may turn to, shown on the page")
    timeout_s: float = Field(300, gt=0, description="how long an answer may take")

    @property
    def pair(self) -> tuple[str, str] | None:
        """The two names; PsyrayError where they are not two different ones."""
        names = [name.strip() for name in self.models.split(",") if name.strip()]
        if self.models and len(set(names)) != 2:
            raise PsyrayError(f"models={self.models}: give two different names, NAME,NAME, or none")
        return (names[0], names[1]) if names else None


@dataclass(frozen=True)
class Room:
    """What a server needs: the policies, who may talk to them, and where choices are kept (None: nowhere)."""

    endpoint: Endpoint
    models: tuple[str, str] | None
    rubric: Rubric
    keys: tuple[Key, ...]
    ledger: str | None
    run: str
    reveal: bool = False
    per_minute: int = 600
    contact: str = ""


@in_one_line
def build(args: dict[str, str]) -> Any:
    """The Serve application; PsyrayError names what is wrong with the arguments or the run."""
    return deployed("Compare", http_app, lambda: open_room(Args.read(args)))


def open_room(asked: Args) -> Room:
    """What the arguments and the run's settings say; PsyrayError where there is no run or no key."""
    place, keys = place_of(asked.run), keys_with("compare", asked.keys, "person")
    endpoint = Endpoint(asked.url.rstrip("/"), os.environ.get(TOKEN, "").strip(), asked.timeout_s)
    ledger = place.ledger if asked.keep else None
    run = ledger_name(place.config, place.folder)
    return Room(endpoint, asked.pair, load_rubric(place.config.rubric), keys, ledger, run,
                asked.reveal, asked.per_minute, asked.contact)  # fmt: skip


class Spoken(Strict):
    role: Literal["user", "assistant"]
    content: str = Field(min_length=1, max_length=MAX_CHARS)


class Said(Strict):
    """The conversation so far, which ends in the person's new words."""

    messages: list[Spoken] = Field(min_length=1, max_length=MAX_MESSAGES)

    @model_validator(mode="after")
    def speaks_by_turns(self) -> Self:
        if [m.role for m in self.messages] != [("user", "assistant")[i % 2] for i in range(len(self.messages))]:
            raise ValueError("user and assistant speak by turns, the user first")
        if self.messages[-1].role != "user":
            raise ValueError("the last message is the user's")
        return self


class OfTurn(Strict):
    turn_id: str = Field(max_length=64)


class Given(OfTurn):
    """A choice between the answers of a turn."""

    choice: Literal[Choice.LEFT, Choice.RIGHT, Choice.TIE, Choice.HARMFUL]
    note: str = Field("", max_length=4_000)


def http_app(room: Room) -> FastAPI:
    """The application around the room."""
    limits = Limits(body_bytes=MAX_BODY, per_minute=room.per_minute)
    ledger = Ledger(room.ledger) if room.ledger else None

    async def look() -> None:
        if ledger:
            await asyncio.to_thread(ledger.spent, room.run)

    app = page_app("psyray conversations", "compare", [turns], room.keys, limits, Health(look))
    app.state.room, app.state.open = room, dict[str, Turn]()  # each person's latest turn
    app.state.ledger = ledger
    app.add_exception_handler(NoAnswer, _no_answer)
    return app


def _room(request: Request) -> Room:
    room: Room = request.app.state.room
    return room


Person = Annotated[str, Depends(asker)]
Here = Annotated[Room, Depends(_room)]
turns = APIRouter(prefix="/turns")


@turns.get("/about")
async def about(person: Person, room: Here) -> JSONResponse:
    """What the page shows beside the conversation."""
    scale = {"low": room.rubric.low, "high": room.rubric.high, "speaker": room.rubric.speaker}
    principles = [{"key": p.key, "name": p.name} for p in room.rubric.principles]
    kept = room.ledger is not None
    return JSONResponse(scale | {"principles": principles, "kept": kept, "contact": room.contact, "person": person})


@turns.post("/say")
async def say(said: Said, person: Person, room: Here, request: Request) -> StreamingResponse:
    """Both policies' answers as events; what the person had not chosen yet is given up."""
    turn = Turn.draw([m.model_dump() for m in said.messages], room.models or await _listed(room.endpoint))
    request.app.state.open[person] = turn
    language = request.headers.get("Accept-Language", "")
    return StreamingResponse(_lines(turn, room.endpoint, language), media_type="text/event-stream")


@turns.post("/view")
async def view(of: OfTurn, person: Person, room: Here, request: Request) -> JSONResponse:
    """Score, spread and principles of both answers; a choice that comes after it is marked as such."""
    turn = _turn(request, person, of.turn_id)
    if turn.scores is None:
        turn.scores = await room.endpoint.scores(turn.messages, [turn.texts[side] for side in SIDES])
    turn.seen |= turn.choice is None
    return JSONResponse(dict(zip(SIDES, turn.scores, strict=True)))


@turns.post("/choose")
async def choose(given: Given, person: Person, room: Here, request: Request) -> JSONResponse:
    """Take the choice, keep it in the ledger, and say with which side the conversation goes on."""
    turn, ledger = _turn(request, person, given.turn_id), request.app.state.ledger
    write = partial(keep, ledger, room.run, _chosen(turn, given, person, room.rubric)) if ledger else None
    keeps = write is not None and not turn.same
    # In a thread, so that it is written to the end though the person may go away.
    if await asyncio.to_thread(turn.settle, given.choice, write if keeps else None) != given.choice:
        raise HTTPException(409, "you have chosen already, and otherwise; a choice is final")
    goes_on = {Choice.RIGHT: "right", Choice.HARMFUL: None}.get(given.choice, "left")
    return JSONResponse({"kept": keeps, "goes_on": goes_on, "policies": turn.policies if room.reveal else None})


async def _lines(turn: Turn, endpoint: Endpoint, language: str) -> AsyncIterator[str]:
    async with aclosing(turn.events(endpoint, language)) as events:
        async for event in events:
            yield f"data: {json.dumps(event)}\n\n"


def _turn(request: Request, person: str, turn_id: str) -> Turn:
    """The person's turn, both answers there; 404 for any other, 409 before."""
    turn: Turn | None = request.app.state.open.get(person)
    if turn is None or turn.turn_id != turn_id:
        raise HTTPException(404, "these answers are gone: the server was started again, or you went on elsewhere")
    if not turn.ready_at:
        raise HTTPException(409, "the answers are not there yet, or one failed: say it again")
    return turn


def _chosen(turn: Turn, given: Given, person: str, rubric: Rubric) -> Chosen:
    """The choice as it is kept: by policy, not by side."""
    order = turn.a_first
    return Chosen(
        turn_id=turn.turn_id,
        who=person,
        rubric=rubric.id,
        messages=turn.messages,
        policies=(turn.policies[order[0]], turn.policies[order[1]]),
        texts=(turn.texts[order[0]], turn.texts[order[1]]),
        choice=given.choice,
        a_left=turn.a_left,
        seconds=time.time() - turn.ready_at,
        scores_seen=turn.seen,
        scores=[turn.scores[SIDES.index(side)] for side in order] if turn.scores else None,
        note=given.note,
    )


async def _listed(endpoint: Endpoint) -> tuple[str, str]:
    names = await endpoint.names()
    if len(names) < 2:
        raise NoAnswer(f"it lists {len(names)} model; two are needed to compare")
    return names[0], names[1]


async def _no_answer(request: Request, error: Exception) -> JSONResponse:
    detail = f"the policies' server cannot be used: {error}"
    return JSONResponse({"detail": detail}, 503, headers={"Retry-After": "5"})

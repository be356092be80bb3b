"""A stand-in for a served run with two policies: OpenAI's chat as a stream, and scores. No model is involved."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from psyray.rubric import load_rubric

TOKEN = "the-policies-own-token"
POLICIES = ("psyray-round-1", "psyray-round-2")
SAID = {
    "psyray-round-1": ["You should simply go out more.", "Have you tried to think of something else?"],
    "psyray-round-2": [
        "It sounds lonely in the evenings since she left. What are they like now?",
        "That makes sense: the quiet reminds you of her. What would you want her to know?",
    ],
}


def stand_in(said: Mapping[str, Sequence[str]] = SAID) -> FastAPI:
    """The application; `app.state.asked` holds every chat request, `app.state.fails` the models that break off."""
    principles = [principle.key for principle in load_rubric("counselling").principles]
    app = FastAPI()
    app.state.asked, app.state.fails = [], set()

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        cards = {"champion": POLICIES[1]} | {name: name for name in POLICIES}  # the first is another name of the last
        return {"data": [{"id": name, "metadata": {"name": means}} for name, means in cards.items()]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return JSONResponse({"error": {"message": "unauthorized"}}, 401)
        body = await request.json()
        app.state.asked.append(body)
        if body["model"] not in POLICIES:
            return JSONResponse({"error": {"message": "no such model"}}, 404)
        crisis = "kill myself" in body["messages"][-1]["content"]
        turns = said[body["model"]]
        text = "Please call somebody." if crisis else turns[(len(body["messages"]) // 2) % len(turns)]
        headers = {"X-Psyray-Crisis": "true"} if crisis else {}
        stream = words(body["model"], text, body["model"] in app.state.fails)
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)

    @app.post("/reward/score")
    async def score(request: Request) -> dict[str, Any]:
        items = (await request.json())["items"]
        scores = [
            {
                "score": (length := len(i["response"])) / 50,
                "spread": 0.12,
                "principles": {key: 3 + length * place % 17 / 10 for place, key in enumerate(principles, 1)},
            }
            for i in items
        ]
        return {"model": "psyray-reward", "scores": scores}

    return app


async def words(model: str, text: str, fails: bool) -> AsyncIterator[str]:
    """The text word by word; without its end where it fails."""
    for place, word in enumerate(text.split(" ")):
        await asyncio.sleep(0.01)
        delta = {"content": (" " if place else "") + word}
        yield f"data: {json.dumps({'model': model, 'choices': [{'index': 0, 'delta': delta}]})}\n\n"
        if fails and place == 1:
            return
    yield f"data: {json.dumps({'choices': []})}\n\n"
    yield "data: [DONE]\n\n"

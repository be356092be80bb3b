"""What a client in a crisis is answered: a fixed reply from a file instead of the policy's, in the client's language.

    serve run serve.app:build run=RUN guard=reply            the shipped replies (psyray/assets/crisis_replies.yaml)
    serve run serve.app:build run=RUN replies=FILE           your own: a text for each locale and for `default`
    serve run serve.app:build run=RUN guard=mark             the policy answers, and only the header marks it

The rule is that of psyray/crisis.py, and of the model that the operator names beside it (serve/ear.py). Every flagged
request is counted in `psyray_crisis_requests`, which Ray exports to Prometheus; no word of the client is kept.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from starlette.responses import JSONResponse, Response, StreamingResponse

from psyray import crisis
from psyray.errors import PsyrayError
from serve.wishes import wishes

SHIPPED = Path(crisis.__file__).parent / "assets/crisis_replies.yaml"
DEFAULT = "default"


@dataclass(frozen=True)
class Replies:
    """Texts by locale, lower case, with one for every other under `default`."""

    texts: Mapping[str, str]

    def for_client(self, accepted: str, spoken: Collection[str] = ()) -> str:
        """The text for an Accept-Language header and the languages that the client wrote in.

        Whoever writes German reads German, whatever a browser or a program says: of the locales in the header those
        of a spoken language come first, then that language, then the others.
        """
        wanted = wishes(accepted)
        own = [locale for locale in wanted if locale.partition("-")[0] in spoken]
        for locale in (*own, *spoken, *wanted):
            for name in (locale, locale.partition("-")[0]):
                if name in self.texts:
                    return self.texts[name]
        return self.texts[DEFAULT]


def read_replies(file: Path | None) -> Replies:
    """The replies of a file, or the shipped ones; PsyrayError names what is wrong with it."""
    file = file or SHIPPED
    mend = f"its entries are a locale and a text, one of them `{DEFAULT}`; see {SHIPPED.name} in psyray/assets"
    if not file.is_file():
        raise PsyrayError(f"no file of replies at {file}; {mend}")
    try:
        tree = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise PsyrayError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(tree, dict) or not all(isinstance(text, str) and text.strip() for text in tree.values()):
        raise PsyrayError(f"{file} holds something else than texts; {mend}")
    if DEFAULT not in tree:
        raise PsyrayError(f"{file} has no text `{DEFAULT}` for clients of other locales; {mend}")
    return Replies({str(locale).lower(): text.strip() for locale, text in tree.items()})


def crisis_hits(messages: Iterable[Mapping[str, Any]]) -> list[crisis.Hit]:
    """The kinds of crisis that the client's own messages speak of, and in which language; of earlier ones too."""
    return crisis.hits(*crisis.spoken((str(m.get("role")), words(m.get("content"))) for m in messages))


def client_texts(messages: Iterable[Mapping[str, Any]]) -> list[str]:
    """What the client said, text by text."""
    texts = [words(message.get("content")) for message in messages if message.get("role") == "user"]
    return [text for text in texts if text.strip()]


def words(content: Any) -> str:
    """A message's words; OpenAI's format also allows a list of parts."""
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", "") for part in content or [] if isinstance(part, Mapping))


def safe_reply(text: str, model: str, *, stream: bool) -> Response:
    """The text as a chat completion in OpenAI's format, whole or as a stream of one piece."""
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
    if stream:
        return StreamingResponse(_events(head, text), media_type="text/event-stream")
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    return JSONResponse(head | {"object": "chat.completion", "choices": [choice], "usage": usage})


def _events(head: Mapping[str, Any], text: str) -> Iterator[str]:
    deltas: list[tuple[dict[str, str], str | None]] = [({"role": "assistant", "content": text}, None), ({}, "stop")]
    for delta, finish in deltas:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        yield f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"
    yield "data: [DONE]\n\n"

"""Who may ask what, how often and how much: bearer keys with roles, and limits, in front of every application here.

A key is a line `NAME ROLE[,ROLE...] TOKEN` in the file that `keys=FILE` names, or in the environment variable
`PSYRAY_KEYS` (lines or `;`). Roles: `chat`, `score`, `annotate`, `compare`, and `admin`, who may do all. Only SHA-256
hashes of tokens leave this process for the replicas. Without keys the port is open: fit for loopback only.

Refusals say what, never why: 401 for no or a wrong key, 403 for one without the role, 408 for a body that does not
come in time, 413 for one that is too large, 429 for a key that asks too often or too much at once, and 503 where too
many requests are under way, the last two with `Retry-After`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from psyray.errors import PsyrayError
from serve.refusals import openai_error

VARIABLE = "PSYRAY_KEYS"
ROLES = ("chat", "score", "annotate", "compare", "admin")
FREE = ("/healthz",)  # for load balancers; tells no more than whether the engine answers
TOO_LARGE, TOO_SLOW = "the request is too large", "the request did not come in time"
TOO_OFTEN = "too many requests"
_NAME = re.compile(r"[\w.-]{1,64}")
MAX_MESSAGES = 1024  # of one conversation, whatever a server is set to
SHORTEST = 16  # characters of a token that is worth the name


@dataclass(frozen=True)
class Key:
    """Who holds a token and what it is good for; the token itself is not kept."""

    name: str
    roles: frozenset[str]
    digest: bytes = field(repr=False)

    def may(self, role: str) -> bool:
        """Whether the key is good for a role."""
        return role in self.roles or "admin" in self.roles


class Bounds(BaseModel):
    """What of the limits the words of an application may set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    per_minute: int = Field(120, ge=1, description="requests a minute of one key (without keys: of all together); each "
                            "answer of a request counts")  # fmt: skip
    in_flight: int = Field(256, ge=1, description="requests under way at once; one more gets 503; of one key half")
    body_bytes: int = Field(4_000_000, ge=1_000, description="largest request")
    messages: int = Field(64, ge=1, le=MAX_MESSAGES, description="messages of one conversation")
    tokens: int = Field(16_384, ge=1, description="new tokens that one request may ask for, over all its answers")


class Limits(Bounds):
    """What one caller, and all together, may ask of one replica of the port."""

    body_s: float = Field(30, gt=0, description="seconds in which a request's body must be there")

    @property
    def of_one_key(self) -> int:
        """How many requests of one key may be under way: no key alone shuts out the others."""
        return max(1, self.in_flight // 2)


def read_keys(file: Path | None) -> tuple[Key, ...]:
    """The keys of the file, or else of the environment; none: anyone may ask.

    PsyrayError names the line that is wrong, never the token in it.
    """
    if file is None:
        return parse_keys(os.environ.get(VARIABLE, "").replace(";", "\n").splitlines(), VARIABLE)
    if not file.is_file():
        raise PsyrayError(f"no file of keys at {file}; its lines are: NAME ROLE[,ROLE] TOKEN")
    keys = parse_keys(file.read_text().splitlines(), str(file))
    if not keys:
        raise PsyrayError(f"{file} holds no key, which would leave the port open; leave keys= out if that is meant")
    return keys


def keys_with(role: str, file: Path | None, whom: str) -> tuple[Key, ...]:
    """As `read_keys`; PsyrayError where no key has the role, which each `whom` needs."""
    keys = read_keys(file)
    if not any(key.may(role) for key in keys):
        raise PsyrayError(f"no key has the role {role}: give keys=FILE, or set {VARIABLE}, with a line for each {whom}")
    return keys


def parse_keys(lines: Iterable[str], where: str) -> tuple[Key, ...]:
    """Keys from their lines; empty lines and those that begin with # say nothing."""
    keys: list[Key] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        words = line.split()
        at = f"{where}, line {number}"
        if len(words) != 3:
            raise PsyrayError(f"{at}: expected NAME ROLE[,ROLE] TOKEN, found {len(words)} words")
        name, roles, token = words[0], words[1].split(","), words[2]
        if not _NAME.fullmatch(name):
            raise PsyrayError(f"{at}: a name has at most 64 letters, digits and . _ - only")
        if unknown := [role for role in roles if role not in ROLES]:
            raise PsyrayError(f"{at}: unknown role {unknown[0]!r} of {name}; roles are {', '.join(ROLES)}")
        if len(token) < SHORTEST:
            raise PsyrayError(
                f"{at}: the token of {name} is shorter than {SHORTEST} characters; try `openssl rand -hex 24`"
            )
        digest = hashlib.sha256(token.encode()).digest()
        if any(key.name == name or key.digest == digest for key in keys):
            raise PsyrayError(f"{at}: {name} or its token is there twice; each key is one person's or one program's")
        keys.append(Key(name, frozenset(roles), digest))
    return tuple(keys)


def role_of(path: str) -> str:
    """The role that a path asks for; what is not known is for the admin."""
    known = {"/v1/": "chat", "/reward/": "score", "/experts/": "annotate", "/turns/": "compare"}
    return next((role for start, role in known.items() if path.startswith(start)), "admin")


def path_of(scope: Scope) -> str:
    """The path below the prefix that the application is mounted at."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


class Rate:
    """A bucket of requests for each name, refilled evenly over the minute."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self.clock = per_minute, clock
        self._full: dict[str, float] = {}  # when the name's bucket will be full again

    def wait(self, name: str, count: int = 1) -> float:
        """Take so many requests; 0, or the seconds after which as many are left, in which case none is taken."""
        now, cost = self.clock(), count * 60 / self.per_minute
        full = max(self._full.get(name, now), now)
        if (over := full + cost - now - 60) > 1e-9:
            return over
        self._full[name] = full + cost
        return 0.0


class Gate:
    """ASGI middleware that lets a request in by its key, size and rate, and counts what is under way.

    The key's name is put into the request's `scope["psyray.key"]`, for routes that remember who asked, and under
    `psyray.more` what takes further requests from its rate, for routes where one request is the work of several.
    """

    def __init__(self, app: ASGIApp, keys: tuple[Key, ...], limits: Limits, free: Collection[str] = FREE) -> None:
        self.app, self.keys, self.limits, self.free = app, keys, limits, free
        self.rate, self.under_way = Rate(limits.per_minute), Counter[str]()  # by the key's name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "lifespan"):  # no route here speaks anything else, so none looks for a key
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "lifespan" or path_of(scope) in self.free:
            await self.app(scope, receive, send)
            return
        refusal, name = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        self.under_way[name] += 1
        try:
            known = {"psyray.key": name, "psyray.more": partial(self._more, name)}
            await self.app({**scope, **known}, Metered(receive, self.limits), send)
        finally:
            self.under_way[name] -= 1

    def _more(self, name: str, count: int) -> None:
        """Take `count` more requests, of a full minute's all at most; HTTPException where they are not left."""
        if wait := self.rate.wait(name, min(count, self.limits.per_minute - 1)):
            raise HTTPException(429, TOO_OFTEN, {"Retry-After": str(math.ceil(wait))})

    def _refusal(self, scope: Scope) -> tuple[JSONResponse | None, str]:
        headers = {name.lower(): value for name, value in scope["headers"]}
        key = self._key(headers.get(b"authorization", b""))
        if self.keys and key is None:
            return refuse(401, "unauthorized", {"WWW-Authenticate": "Bearer"}), ""
        if key is not None and not key.may(role_of(path_of(scope))):
            return refuse(403, "forbidden"), ""
        if _length(headers.get(b"content-length", b"")) > self.limits.body_bytes:
            return refuse(413, TOO_LARGE), ""
        if self.under_way.total() >= self.limits.in_flight:
            return refuse(503, "too many requests are under way", {"Retry-After": "1"}), ""
        name = key.name if key else ""
        if key is not None and self.under_way[name] >= self.limits.of_one_key:
            return refuse(429, "too many requests at once", {"Retry-After": "1"}), ""
        if wait := self.rate.wait(name):
            return refuse(429, TOO_OFTEN, {"Retry-After": str(math.ceil(wait))}), ""
        return None, name

    def _key(self, header: bytes) -> Key | None:
        """The key whose token the header holds; every key is compared, so that time tells nothing."""
        kind, _, token = header.partition(b" ")
        digest = hashlib.sha256(token.strip()).digest()
        found = [key for key in self.keys if hmac.compare_digest(key.digest, digest)]
        return found[0] if found and kind.lower() == b"bearer" else None


class Metered:
    """A request's body as it comes in, counted and timed: a header may say less than comes, or nothing may come."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self.receive, self.left = receive, limits.body_bytes
        self.until, self.whole = time.monotonic() + limits.body_s, False

    async def __call__(self) -> Message:
        if self.whole:  # what is still waited for is the client's going away, as long as the answer takes
            return await self.receive()
        try:
            message = await asyncio.wait_for(self.receive(), self.until - time.monotonic())
        except TimeoutError:
            raise HTTPException(408, TOO_SLOW, headers={"Connection": "close"}) from None
        self.whole = not message.get("more_body", False)
        self.left -= len(message.get("body", b""))
        if self.left < 0:
            raise HTTPException(413, TOO_LARGE)
        return message


def _length(header: bytes) -> int:
    return int(header[:18]) if header.isdigit() else 0  # what is no number is the server's to refuse


def refuse(status: int, words: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """A refusal in OpenAI's format, which every client of these routes can read."""
    return openai_error(status, words, "access", headers)

"""A client of OpenAI-compatible chat endpoints that a bill of thousands can be trusted to.

`Client.ask` puts one question until there is an answer that can be read, `retries` further times at most. Every way
to fail is an error text that starts with its class (`timeout`, `http 503`, `refused 401`, `garbled`, ...) and holds
nothing that a client said. All requests share one pace and one purse (psyray.engines.pace) and one journal.

It halts, with the requests under way finished and kept, when the money does not reach, when the endpoint fails
`IN_A_ROW` rows one after the other, when it asks for a longer rest than `LONGEST_REST_S`, or when it does not tell
the `usage` that `max_cost` needs.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import SecretStr

from psyray.addresses import redact
from psyray.engines.journal import Call, Journal
from psyray.engines.pace import NO_MONEY, Halted, Pace, Purse, backoff, pause, retry_after
from psyray.engines.thinking import OPEN
from psyray.errors import PsyrayError
from psyray.records import Message, Row, well_formed
from psyray.rubric import UnusableAnswer
from psyray.sections.data import EndpointSection

RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
IN_A_ROW = 20  # rows, or answers without usage
LONGEST_REST_S = 600.0
LARGEST_ANSWER = 4 * 2**20  # bytes
BYTES_PER_TOKEN = 4.0  # of a request, until the first usage says better

T = TypeVar("T")


@dataclass(frozen=True)
class Reply:
    """What one request brought: an answer's text, or an error and whether a further try may mend it."""

    status: str
    error: str = ""
    again: bool = False
    rest_s: float | None = None  # the endpoint's Retry-After
    text: str | None = None
    finish: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass
class Outcome(Generic[T]):
    """What became of one row; `value` is None where there is an error."""

    value: T | None = None
    call: Call | None = None  # the last answer
    error: str = ""
    attempts: int = 0
    cost: float = 0.0
    latency_s: float = 0.0  # from the first request of this process to the end


class Client:
    """Asks one endpoint for one model's answers; lives in an event loop. `name` stands for it in errors."""

    def __init__(
        self, endpoint: EndpointSection, model: str, key: SecretStr, journal: Journal, name: str = "judge"
    ) -> None:
        self.endpoint, self.model, self.key, self.journal, self.name = endpoint, model, key, journal, name
        self.url = f"{(endpoint.url or '').rstrip('/')}/chat/completions"
        purse = Purse(endpoint.max_cost, journal.totals.cost)
        self.pace = Pace(endpoint.concurrency, purse, endpoint.requests_per_minute, endpoint.tokens_per_minute)
        self.failed_in_a_row = self.unpriced_in_a_row = 0
        self._bytes, self._tokens = 0, 0
        self._session: Any = None

    async def ask(self, key: str, messages: list[Message], sampling: Row, read: Callable[[Call], T]) -> Outcome[T]:
        """The first answer that `read` does not refuse with UnusableAnswer; Halted where no more may be asked.

        Answers that the journal holds come first and are free. They count as attempts; failed requests of earlier
        processes do not, since what failed them may be mended.
        """
        if self.pace.halted.is_set():
            raise Halted
        outcome, began = Outcome[T](), 0.0
        for call in self.journal.answers(key):
            if _take(outcome, call, read):
                return outcome
        asked = {"model": self.model, "messages": messages} | sampling | self.endpoint.body
        body = json.dumps({field: value for field, value in asked.items() if value is not None}).encode()
        most_tokens = int(asked.get("max_completion_tokens") or asked.get("max_tokens") or sampling["max_tokens"])
        while outcome.attempts <= self.endpoint.retries:
            attempt = outcome.attempts + 1
            reply, call = await self._call(key, attempt, body, most_tokens)
            began = began or time.monotonic() - call.latency_s
            outcome.latency_s = time.monotonic() - began
            if reply.text is not None:
                if _take(outcome, call, read):
                    break
                continue
            outcome.attempts, outcome.error = attempt, reply.error
            outcome.cost += call.cost or 0.0
            if not reply.again:
                break
            if attempt <= self.endpoint.retries:
                await self._rest(reply, attempt)
        self._watch(outcome)
        return outcome

    async def _call(self, key: str, attempt: int, body: bytes, most_tokens: int) -> tuple[Reply, Call]:
        """One request, in its turn, with a line in the journal before and after it."""
        prompt = len(body) / (self._bytes / self._tokens if self._tokens else BYTES_PER_TOKEN)
        held = self._price(prompt, most_tokens)
        await self.pace.turn(prompt + most_tokens, held)
        sent_at, used, cost = time.monotonic(), None, 0.0
        try:
            self.journal.sent(key, attempt)
            reply = await self._post(body)
            priced = reply.prompt_tokens is not None and reply.completion_tokens is not None
            if priced:
                used = float((reply.prompt_tokens or 0) + (reply.completion_tokens or 0))
                cost = self._price(reply.prompt_tokens or 0, reply.completion_tokens or 0)
                self._bytes, self._tokens = self._bytes + len(body), self._tokens + (reply.prompt_tokens or 0)
            # A refusal is no service and costs nothing; a cut connection or an answer without usage may have cost.
            known = priced or (reply.status.isdigit() and reply.status != "200")
            call = Call(
                key, attempt, reply.status, reply.prompt_tokens, reply.completion_tokens, cost if known else None,
                round(time.monotonic() - sent_at, 3), reply.text, reply.finish,
            )  # fmt: skip
            self.journal.got(call)
        finally:
            self.pace.done(prompt + most_tokens, used, held, cost)
        if reply.status == "429" or reply.rest_s is not None:
            self._slow_down(reply, attempt, sent_at)
        elif reply.text is not None:
            self.pace.good()
            self._check_usage(priced)
        return reply, call

    async def _post(self, body: bytes) -> Reply:
        import aiohttp

        if self._session is None:
            headers = {"Content-Type": "application/json"}
            if secret := self.key.get_secret_value():
                headers["Authorization"] = f"Bearer {secret}"
            self._session = aiohttp.ClientSession(
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=self.endpoint.timeout_s),
                connector=aiohttp.TCPConnector(limit=self.endpoint.concurrency),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        try:
            # A redirect could lead to a host that nobody configured.
            async with self._session.post(self.url, data=body, allow_redirects=False) as reply:
                if reply.status != 200:
                    again = reply.status in RETRIED
                    error = f"{'http' if again else 'refused'} {reply.status}"
                    return Reply(str(reply.status), error, again, retry_after(reply.headers) if again else None)
                raw = bytearray()
                async for chunk in reply.content.iter_any():
                    raw += chunk
                    if len(raw) > LARGEST_ANSWER:
                        return Reply("too large", f"too large: an answer of more than {LARGEST_ANSWER} bytes", True)
        except TimeoutError:
            return Reply("timeout", f"timeout: no answer within {self.endpoint.timeout_s:g} s", True)
        except (aiohttp.ClientError, OSError) as error:  # unreachable, or cut off
            return Reply("connection", f"connection: {type(error).__name__}", True)
        return _read_reply(bytes(raw))

    def _price(self, prompt_tokens: float, completion_tokens: float) -> float:
        prompt, completion = self.endpoint.price_per_million_tokens
        return (prompt_tokens * prompt + completion_tokens * completion) / 1e6

    async def _rest(self, reply: Reply, attempt: int) -> None:
        await pause(self.pace.halted, backoff(attempt, reply.rest_s))
        if self.pace.halted.is_set():
            raise Halted

    def _slow_down(self, reply: Reply, attempt: int, sent_at: float) -> None:
        """One answer `busy` is meant for all requests."""
        if (reply.rest_s or 0.0) > LONGEST_REST_S:
            self.pace.halt(f"the endpoint answers {reply.error} and asks for a rest of {reply.rest_s:.0f} s")
        self.pace.busy(backoff(attempt, None) if reply.rest_s is None else reply.rest_s, sent_at)

    def _check_usage(self, priced: bool) -> None:
        self.unpriced_in_a_row = 0 if priced else self.unpriced_in_a_row + 1
        if self.endpoint.max_cost is not None and self.unpriced_in_a_row >= IN_A_ROW:
            self.pace.halt(f"{IN_A_ROW} answers in a row hold no usage, so {self.name}.max_cost cannot be kept")

    def _watch(self, outcome: Outcome[T]) -> None:
        """Halt where the endpoint serves nobody any more, and keep the rows that failed by it open (Halted).

        An answer that cannot be used is service all the same.
        """
        self.failed_in_a_row = 0 if outcome.call is not None else self.failed_in_a_row + 1
        if self.failed_in_a_row < IN_A_ROW:
            return
        hints = {
            "refused": f"; see whether the key in ${self.endpoint.api_key_env}, the model's name and the URL are right",
            "connection": "; see whether the endpoint is up and the URL is right",
            "garbled": "; see whether the URL is that of an OpenAI-compatible endpoint, up to its /v1",
        }
        self.pace.halt(
            f"the endpoint at {redact(self.endpoint.url or '')} failed {IN_A_ROW} rows in a row, the last with "
            f"`{outcome.error}`" + hints.get(re.split("[: ]", outcome.error)[0], "")
        )
        raise Halted

    async def close(self) -> None:
        """Let go of the connections and of the journal, so that another process may go on; for a client at rest."""
        if self._session is not None:
            await self._session.close()
        self.journal.close()

    async def stopped(self) -> PsyrayError:
        """Why no more is asked, what was spent, and how to go on; waits until no request is under way, and closes."""
        await self.pace.idle()
        await self.close()
        spent, name, why = self.journal.totals, self.name, self.pace.why
        mend = "mend the cause"
        if why == NO_MONEY:
            why = f"{name}.max_cost ({self.endpoint.max_cost:g}) does not reach for a further request"
            mend = f"raise {name}.max_cost"
        priced = any(self.endpoint.price_per_million_tokens)
        counts = {"lost": spent.lost, "without a price": spent.unpriced} if priced else {}
        unknown = [f"{count} {what}" for what, count in counts.items() if count]
        return PsyrayError(
            f"{name}: {why}. So far "
            + (f"{spent.cost:.4f} was spent: " if priced else "")
            + f"{spent.calls} calls"
            + (f" ({', '.join(unknown)}: what they cost is not known)" if unknown else "")
            + f", {spent.prompt_tokens} prompt and {spent.completion_tokens} completion tokens. Every answer is kept; "
            f"{mend} and run the same command again to go on"
        )


def _take(outcome: Outcome[T], call: Call, read: Callable[[Call], T]) -> bool:
    """Add an answer to a row's outcome; whether it can be used."""
    outcome.call, outcome.attempts, outcome.error = call, call.attempt, ""
    outcome.cost += call.cost or 0.0
    try:
        outcome.value = read(call)
    except UnusableAnswer as problem:
        outcome.error = str(problem)
    return not outcome.error


def _read_reply(raw: bytes) -> Reply:
    """An answer in the OpenAI chat format; an error of the class `garbled` for anything else."""
    try:
        answer = json.loads(raw)
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        message, finish = choice["message"], choice.get("finish_reason") or ""
        # An endpoint that gives thoughts apart has no content where the limit came before their end.
        thought = message.get("reasoning_content") or message.get("reasoning")
        text = message.get("content") or (OPEN if thought else "")
        prompt, completion = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    except (ValueError, RecursionError):
        return Reply("garbled", "garbled: the answer is no JSON", True)
    except (KeyError, IndexError, TypeError, AttributeError):
        return Reply("garbled", "garbled: the answer is not in the OpenAI chat format", True)
    if not isinstance(text, str):
        error = "garbled: the answer's content is no text"
        return Reply("garbled", error, True, prompt_tokens=prompt, completion_tokens=completion)
    return Reply("200", text=well_formed(text), finish=str(finish), prompt_tokens=prompt, completion_tokens=completion)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 else None

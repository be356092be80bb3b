"""Chat endpoints on Ray Data: one actor asks for all rows, under one pace, one purse and one journal.

Rows flow: each block of rows has a thread of the actor, all threads share one event loop, and a block that waits for
a slow answer keeps none of the others. `HttpRater` judges, `HttpGenerator` answers; what a row's error may say, and
when the whole stops, is said in psyray.engines.chat.
"""

from __future__ import annotations

import asyncio
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

from pydantic import SecretStr

from psyray.engines.chat import Client
from psyray.engines.journal import Journal
from psyray.engines.pace import Halted
from psyray.errors import PsyrayError
from psyray.records import Row
from psyray.rubric import Rubric
from psyray.sections.data import EndpointSection

BLOCKS_AT_ONCE = 256  # each is a thread of the actor


def api_key(endpoint: EndpointSection) -> SecretStr:
    """The endpoint's key, from the environment only; empty where it needs none."""
    return SecretStr(os.environ.get(endpoint.api_key_env, "").strip())


class _Worker(ABC):
    """A Ray Data batch function: many threads bring rows, one event loop asks for them all."""

    def __init__(self, endpoint: EndpointSection, model: str, key: SecretStr, folder: Path, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        Thread(target=self.loop.run_forever, daemon=True).start()
        self.client = Client(endpoint, model, key, Journal(folder), name)

    def __call__(self, batch: Any) -> Iterator[Any]:
        """One row out for each row in; PsyrayError where the client stopped."""
        import pyarrow as pa

        rows = asyncio.run_coroutine_threadsafe(self._all(batch.to_pylist()), self.loop).result()
        yield pa.Table.from_pylist(rows, schema=self.schema())

    async def _all(self, rows: list[Row]) -> list[Row]:
        done = await asyncio.gather(*(self.one(row) for row in rows), return_exceptions=True)
        failed = [result for result in done if isinstance(result, BaseException)]
        if not failed:
            return [row for row in done if not isinstance(row, BaseException)]
        for error in failed:
            if not isinstance(error, Halted):
                self.client.pace.halt(str(error) if isinstance(error, PsyrayError) else type(error).__name__)
                await self.client.stopped()
                raise error
        raise await self.client.stopped()

    def close(self) -> None:
        """Let go of connections, journal and thread."""
        asyncio.run_coroutine_threadsafe(self.client.close(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)

    @abstractmethod
    def one(self, row: Row) -> Coroutine[Any, Any, Row]:
        """The row that answers a row."""

    @abstractmethod
    def schema(self) -> Any:
        """The Arrow schema of the rows that come out."""


class HttpRater(_Worker):
    """Rows {key, messages, response} in, one judge's outcome (psyray.engines.judges) for each out."""

    def __init__(
        self, rubric: Rubric, endpoint: EndpointSection, model: str, max_tokens: int, key: SecretStr, folder: Path
    ) -> None:
        super().__init__(endpoint, model, key, folder, "judge")
        self.rubric, self.sampling = rubric, {"temperature": 0, "max_tokens": max_tokens}

    async def one(self, row: Row) -> Row:
        from psyray.engines.judges import outcome

        question = self.rubric.question(row["messages"], row["response"])
        found = await self.client.ask(
            row["key"], question, self.sampling, lambda call: self.rubric.parse(call.text or "")
        )
        return outcome(
            row["key"],
            found.value,
            raw_text=(found.call.text or "") if found.call else "",
            error=found.error,
            attempts=found.attempts,
            latency_s=found.latency_s,
            cost=found.cost,
        )

    def schema(self) -> Any:
        import pyarrow as pa

        texts = [(name, pa.string()) for name in ("key", "ratings", "raw_text", "error")]
        return pa.schema([*texts, ("attempts", pa.int64()), ("latency_s", pa.float64()), ("cost", pa.float64())])


class HttpGenerator(_Worker):
    """Rows {key, messages, sampling, draw} in, {key, draw, text, tokens, ...} out, as vLLM gives them."""

    async def one(self, row: Row) -> Row:
        messages = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
        found = await self.client.ask(row["key"], messages, json.loads(row["sampling"]), lambda call: call)
        call = found.value
        return {
            "key": row["key"],
            "draw": row.get("draw"),
            "text": call.text if call else None,
            "tokens": call.completion_tokens if call else None,
            "logprobs": "",
            "__inference_error__": found.error,
        }

    def schema(self) -> Any:
        import pyarrow as pa

        texts = [(name, pa.string()) for name in ("key", "draw", "text", "logprobs", "__inference_error__")]
        return pa.schema([*texts, ("tokens", pa.int64())])


def rate(dataset: Any, rubric: Rubric, endpoint: EndpointSection, model: str, max_tokens: int, folder: Path) -> Any:
    """Rate every row's `response` to its `messages`; the journal of calls lies in `folder`, which all nodes see."""
    arguments = (rubric, endpoint, model, max_tokens, api_key(endpoint), folder)
    return _on_one_actor(dataset, HttpRater, endpoint, arguments)


def generate(dataset: Any, model: str, endpoint: EndpointSection, folder: Path, name: str = "responder") -> Any:
    """Answer every row's `messages` under its `sampling`; the rows of `psyray.engines.vllm.generate`.

    `folder` holds the journal of calls, is seen by all nodes, and belongs to this endpoint and model alone; `name`
    stands before `max_cost` in errors. A PsyrayError of the actor stops the dataset (psyray.errors.from_workers).
    """
    return _on_one_actor(dataset, HttpGenerator, endpoint, (endpoint, model, api_key(endpoint), folder, name))


def _on_one_actor(dataset: Any, function: type[_Worker], endpoint: EndpointSection, arguments: tuple[Any, ...]) -> Any:
    """One process for all rows, so that its limits are the limits.

    As long as fewer rows are stuck than there are blocks in the actor, there is work for every request that may be
    under way, however slow some answers are.
    """
    from ray.data import ActorPoolStrategy

    blocks = min(endpoint.concurrency + 4, BLOCKS_AT_ONCE)
    return dataset.map_batches(
        function,
        fn_constructor_args=arguments,
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            size=1,
            max_concurrent_calls_per_actor=blocks,
            max_tasks_in_flight_per_actor=blocks + 4,
            enable_true_multi_threading=True,
        ),
        num_cpus=0.25,
    )

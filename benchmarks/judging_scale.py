"""The judging stage at scale: throughput, memory, and whether every row is judged and paid for once.

    python benchmarks/judging_scale.py                        # 20,000 rows
    python benchmarks/judging_scale.py --rows 1000000 --path /data/bench
    python benchmarks/judging_scale.py --kill 5               # SIGKILL at five random moments, the same command again

A made-up `responses` stage of --rows rows goes through `psyray.data.judge.judgements_stage` with the HTTP engine and an
endpoint of its own process that answers at once (or after --latency seconds). The stage runs in a child process, as
`psyray run` would, and is watched from here: a line for each tenth, then the counts of the endpoint, the journal and
the ledger beside each other. Exit status 1 where a row is missing, is there twice, or was paid for without need. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from apart import folder, verdict, with_parent

MIB = 2**20
KEYS = ("empathy", "relevance", "clarity", "safety", "exploration", "autonomy", "staging")
NUMBER = re.compile(rb"Reply number (\d+)\.")


# ---------------------------------------------------------------- the endpoint


class Stub(asyncio.Protocol):
    """A chat endpoint that rates at once and counts how often each row was asked; GET gives the counts."""

    asked = array("H")
    latency = 0.0
    began = ended = 0.0  # when the first request came, and when the last answer went

    def __init__(self) -> None:
        self.buffer = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            length = re.search(rb"content-length: (\d+)", head)
            size = end + 4 + (int(length[1]) if length else 0)
            if len(self.buffer) < size:
                return
            body, self.buffer = self.buffer[end + 4 : size], self.buffer[size:]
            answer = self.rate(body) if head.startswith(b"post") else self.counts()
            asyncio.get_running_loop().call_later(self.latency, self.send, answer)

    def rate(self, body: bytes) -> bytes:
        found = NUMBER.search(body)
        assert found
        number = int(found[1])
        Stub.asked[number] += 1
        Stub.ended = time.monotonic() + Stub.latency
        Stub.began = Stub.began or time.monotonic()
        ratings = {key: 1 + (number // 5**i) % 5 for i, key in enumerate(KEYS)}
        usage = {"prompt_tokens": len(body) // 4, "completion_tokens": 40}
        choice = {"message": {"role": "assistant", "content": json.dumps(ratings)}, "finish_reason": "stop"}
        return json.dumps({"choices": [choice], "usage": usage}).encode()

    @staticmethod
    def counts() -> bytes:
        counts = {"calls": sum(Stub.asked), "rows": sum(map(bool, Stub.asked)), "again": sum(n > 1 for n in Stub.asked)}
        return json.dumps(counts | {"span_s": Stub.ended - Stub.began}).encode()

    def send(self, answer: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        self.transport.write(head % len(answer) + answer)


async def serve(rows: int, latency: float) -> None:
    """Serve on a free port, which is printed, until killed."""
    Stub.asked, Stub.latency = array("H", bytes(2 * rows)), latency
    server = await asyncio.get_running_loop().create_server(Stub, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextmanager
def endpoint(rows: int, latency: float) -> Iterator[str]:
    """The address of one in a process of its own."""
    command = [sys.executable, __file__, "--stub", "--rows", str(rows), "--latency", str(latency)]
    stub = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=with_parent)
    try:
        assert stub.stdout
        yield f"http://127.0.0.1:{int(stub.stdout.readline())}/v1"
    finally:
        stub.kill()


def counts(url: str) -> dict[str, Any]:
    """What the endpoint was asked."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=60) as reply:
        return dict(json.loads(reply.read()))


# ---------------------------------------------------------------- the stage, in a process of its own


def judge_all(path: Path, url: str, rows: int, concurrency: int) -> None:
    """Make the rows and judge them; what is done already is not done again."""
    from psyray.active.ledger import Ledger
    from psyray.cluster import ray_session
    from psyray.config import load_config
    from psyray.data.judge import Desk, judgements_stage
    from psyray.engines.judges import make_judge
    from psyray.rubric import load_rubric
    from psyray.run import Run

    judge = {"engine": "http", "model": "stub", "url": url, "concurrency": concurrency}
    prices = "judge.price_per_million_tokens=[1.0, 2.0]"
    config = load_config(None, [*(f"judge.{key}={value}" for key, value in judge.items()), prices])
    rubric = load_rubric(config.rubric)
    with ray_session(config), Run(path / "run").open({}) as run:
        responses = run.stage("responses", {"rows": rows}, [], lambda folder: make_responses(folder.path, rows))
        made = make_judge(config.judge, rubric, config.engine, config.cluster.wait_s)
        desk = Desk(made, rubric, Ledger(f"sqlite:///{path}/labels.db"), str(run.path), config.judge)
        judgements_stage(run, desk, responses)


def make_responses(folder: Path, rows: int) -> Mapping[str, Any]:
    """Write `rows` made-up responses as a finished stage has them: sorted by id, in files of 50,000."""
    from psyray.files import write_parquet
    from psyray.records import RESPONSES, content_id, table
    from psyray.run import ROWS_PER_FILE

    ids = sorted((content_id("row", number), number) for number in range(rows))
    for file, start in enumerate(range(0, rows, ROWS_PER_FILE)):
        chunk = [response(key, number) for key, number in ids[start : start + ROWS_PER_FILE]]
        write_parquet(folder / f"data-{file:05d}.parquet", table(chunk, RESPONSES))
    return {"ok": rows}


def response(key: str, number: int) -> dict[str, Any]:
    """One row of the stage `responses`; four in a row answer the same speech."""
    said = f"I am client {number // 4}. Since the move I lie awake, and at work I pretend that all is well."
    return {
        "response_id": key,
        "speech_id": f"speech-{number // 4}",
        "messages": [{"role": "user", "content": said}],
        "split": "train",
        "responder": "made-up",
        "model": "none",
        "seed": number % 4,
        "text": f"It sounds lonely to hold that alone, and tiring. Reply number {number}.",
        "tokens": 20,
        "truncated": False,
        "repeated": 0.0,
        "status": "ok",
        "error": "",
        "raw_text": "",
        "attempts": 1,
    }


# ---------------------------------------------------------------- watching it


@dataclass
class Watch:
    """The child at work, seen from outside: how far it is, and its driver's resident memory."""

    rows: int
    path: Path
    began: float = field(default_factory=time.monotonic)
    tenth: int = 0
    peak: int = 0
    last: tuple[float, int] = (0.0, 0)

    def done(self) -> int:
        """Rows that the stage says are done."""
        found = list(self.path.glob("run/stages/judgements/*/progress.json"))
        return int(json.loads(found[0].read_text())["done"]) if found else 0

    def look(self, child: psutil.Process) -> int:
        """Print a line for each new tenth; the rows that are done."""
        try:
            resident = child.memory_info().rss
        except psutil.NoSuchProcess:  # ended since the last look
            return self.done()
        self.peak, done, now = max(self.peak, resident), self.done(), time.monotonic() - self.began
        if (tenth := done * 10 // self.rows) > self.tenth:
            self.tenth = tenth
            then, before = self.last
            speed = (done - before) / max(now - then, 1e-9)
            memory = f"driver {resident / MIB:6,.0f} MiB"
            print(f"{self.tenth:2d}/10 {done:9,d} rows {now:8.1f} s {speed:8,.0f} rows/s  {memory}")
            self.last = (now, done)
        return done


def run_stage(args: argparse.Namespace, url: str) -> Watch:
    """Run the stage to its end, killed at `--kill` random moments on the way."""
    watch, dice = Watch(args.rows, args.path), random.Random(args.seed)
    moments = sorted(dice.uniform(0.05, 0.95) * args.rows for _ in range(args.kill))
    command = [sys.executable, __file__, "--stage", url, "--path", str(args.path), "--rows", str(args.rows)]
    while True:
        words = [*command, "--concurrency", str(args.concurrency)]
        child = subprocess.Popen(words, stdout=subprocess.DEVNULL, preexec_fn=with_parent)
        process = psutil.Process(child.pid)
        while child.poll() is None:
            if watch.look(process) and moments and counts(url)["rows"] > moments[0]:
                print(f"      SIGKILL after {counts(url)['rows']:,d} rows were asked")
                os.kill(child.pid, signal.SIGKILL)
                child.wait()
                moments = [m for m in moments[1:] if m > counts(url)["rows"]]
                break
            time.sleep(0.2)
        else:
            if child.returncode:
                sys.exit(f"the stage ended with {child.returncode}")
            return watch


def audit(path: Path, rows: int, asked: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The counts of endpoint, journal, ledger and result beside each other, and what is wrong with them."""
    import duckdb

    from psyray.active.ledger import Ledger
    from psyray.engines.journal import read_totals

    (stage,) = (m.parent for m in path.glob("run/stages/judgements/*/manifest.json"))
    (source,) = (m.parent for m in path.glob("run/stages/responses/*/manifest.json"))
    judged, wanted = (f"read_parquet('{folder}/data-*.parquet')" for folder in (stage, source))
    sql = duckdb.connect()
    sql.execute("SET memory_limit = '1GB'")

    def one(query: str) -> int:
        return int((sql.execute(query).fetchone() or (0,))[0])

    totals = read_totals(stage / "calls")
    (charge,) = Ledger(f"sqlite:///{path}/labels.db").summary(str(path / "run"))
    found = {
        "ids missing": one(f"SELECT count(*) FROM {wanted} ANTI JOIN {judged} USING (response_id)"),
        "ids twice": one(f"SELECT count(*) - count(DISTINCT response_id) FROM {judged}"),
        "rows usable": one(f"SELECT count(*) FROM {judged} WHERE status = 'ok'"),
        "endpoint: calls": asked["calls"],
        "endpoint: rows asked again": asked["again"],
        "journal: calls": totals.calls,
        "journal: lost": totals.lost,
        "manifest: calls": json.loads((stage / "manifest.json").read_text())["stats"]["calls"]["calls"],
        "journal: cost": round(totals.cost, 6),
        "ledger: bought": charge["bought"],
        "ledger: answered": charge["answered"],
        "ledger: cost": round(charge["cost"], 6),
    }
    wrong = [f"{what}: {found[what]}" for what in ("ids missing", "ids twice") if found[what]]
    wrong += [f"{what}: {found[what]}, not {rows}" for what in ("rows usable", "ledger: bought") if found[what] != rows]
    if found["manifest: calls"] != totals.calls:
        wrong.append("the stage's own count of calls is another")
    # A call is in the journal before it goes out: the last of a killed process may never have reached the endpoint.
    if not totals.calls - totals.lost <= asked["calls"] <= totals.calls:
        wrong.append("the endpoint saw other calls than the journal")
    if asked["again"] > totals.lost:
        wrong.append("rows were asked again whose answer was there")
    if abs(totals.cost - charge["cost"]) > 1e-6 * totals.cost:
        wrong.append("journal and ledger hold different sums of money")
    return found, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--kill", type=int, default=0, help="how often the stage is killed")
    parser.add_argument("--concurrency", type=int, default=64, help="requests under way at once")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds that the endpoint takes for an answer")
    parser.add_argument("--path", type=Path, help="an empty folder; none: a temporary one, removed at the end")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of --kill")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--stub", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stub:
        asyncio.run(serve(args.rows, args.latency))
    if args.stage:
        judge_all(args.path, args.stage, args.rows, args.concurrency)
        return 0
    with folder(args.path) as args.path, endpoint(args.rows, args.latency) as url:
        watch = run_stage(args, url)
        found, wrong = audit(args.path, args.rows, counts(url))
    seconds = time.monotonic() - watch.began
    print(f"\n{seconds:.1f} s in all with starting Ray, driver's peak {watch.peak / MIB:,.0f} MiB")
    return verdict(found, wrong, "every row is there once and was paid for once")


if __name__ == "__main__":
    sys.exit(main())

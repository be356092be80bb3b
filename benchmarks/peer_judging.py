"""Judging over HTTP beside distilabel: throughput, and what a `kill -9` at about 90 % costs each.

    python -m venv /data/peer && /data/peer/bin/pip install 'distilabel[openai]' requests
    python benchmarks/peer_judging.py --peer /data/peer/bin/python --rows 5000 --latency 0.1 --repeats 3

Both ask the same made-up endpoint (benchmarks/judging_scale.py) the same prompts, as many at once. distilabel sends
batches of that size and waits for the slowest of each, as its `AsyncLLM` does. Each repeat runs one after the other:
first undisturbed (rows a second between the endpoint's first request and its last answer), then killed with its whole
process group once 90 % of the rows were asked, and started again by the same command. Printed: the seconds from that
start to the end, the rows that were asked again, and the rows that are missing or twice in the result. A side that
asks nothing for --patience seconds and does not end hangs: it is killed, and has no seconds and no result. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from apart import with_parent
from judging_scale import counts, endpoint, make_responses

HERE = Path(__file__).parent


def psyray_command(args: argparse.Namespace, folder: Path, url: str) -> list[str]:
    """The stage `judgements` of a run in the folder."""
    script = [sys.executable, str(HERE / "judging_scale.py"), "--stage", url, "--path", str(folder)]
    return [*script, "--rows", str(args.rows), "--concurrency", str(args.concurrency)]


def peer_command(args: argparse.Namespace, folder: Path, url: str) -> list[str]:
    """The same prompts through distilabel."""
    prompts = folder / "prompts.jsonl"
    if not prompts.exists():
        write_prompts(folder, prompts, args.rows)
    script = [str(args.peer), str(HERE / "peers/distilabel_judging.py")]
    return [*script, str(prompts), url, str(folder), str(args.concurrency)]


def write_prompts(folder: Path, target: Path, rows: int) -> None:
    """What psyray's judge would send, as JSON lines."""
    import pyarrow.parquet as pq

    from psyray.rubric import load_rubric

    rubric = load_rubric("counselling")
    (folder / "made").mkdir()
    make_responses(folder / "made", rows)
    with target.open("w") as out:
        for row in pq.read_table(folder / "made").to_pylist():
            asked = rubric.question(row["messages"], row["text"])
            out.write(json.dumps({"key": row["response_id"], "messages": asked}) + "\n")


def psyray_keys(folder: Path) -> list[str]:
    """The ids in the finished stage."""
    import pyarrow.parquet as pq

    (stage,) = (manifest.parent for manifest in folder.glob("run/stages/judgements/*/manifest.json"))
    return [key for file in stage.glob("data-*.parquet") for key in pq.read_table(file)["response_id"].to_pylist()]


def peer_keys(folder: Path) -> list[str]:
    """The ids in distilabel's result that have an answer."""
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    return [row["key"] for row in rows if row["generation"]]


SIDES = {"psyray": (psyray_command, psyray_keys), "distilabel": (peer_command, peer_keys)}


class Hangs(Exception):
    """A side that neither asks nor ends."""


def run(command: list[str], log: Path, url: str, patience: float, kill_at: int | None = None) -> float:
    """Seconds that the command took; killed with its process group once `kill_at` rows were asked, or if it hangs."""
    began = changed = time.monotonic()
    calls = 0
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with log.open("ab") as out:
        child = subprocess.Popen(
            command, stdout=out, stderr=out, start_new_session=True, env=environment, preexec_fn=with_parent
        )
        while child.poll() is None:
            asked = counts(url)
            if asked["calls"] != calls:
                calls, changed = asked["calls"], time.monotonic()
            hangs = time.monotonic() - changed > patience
            if hangs or (kill_at is not None and asked["rows"] >= kill_at):
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                if hangs:
                    raise Hangs
                return time.monotonic() - began
            time.sleep(0.1)
    if child.returncode or kill_at is not None:
        sys.exit(f"{command[0]} ended with {child.returncode} before it should; its last words:\n{tail(log)}")
    return time.monotonic() - began


def tail(log: Path) -> str:
    """The end of a log."""
    return log.read_bytes()[-2000:].decode(errors="replace")


def undisturbed(side: str, args: argparse.Namespace) -> dict[str, float]:
    """Rows a second at the endpoint, and seconds in all with every start-up."""
    command, keys = SIDES[side]
    with tempfile.TemporaryDirectory() as place, endpoint(args.rows, args.latency) as url:
        folder = Path(place)
        seconds = run(command(args, folder, url), folder / "log", url, args.patience)
        asked, found = counts(url), keys(folder)
        assert len(set(found)) == args.rows, f"{side}: {len(set(found))} of {args.rows} rows are there"
        return {"rows_s": args.rows / asked["span_s"], "seconds": seconds}


def killed(side: str, args: argparse.Namespace) -> dict[str, float]:
    """What starting again after a kill at 90 % takes, asks twice, and loses."""
    command, keys = SIDES[side]
    with tempfile.TemporaryDirectory() as place, endpoint(args.rows, args.latency) as url:
        folder = Path(place)
        words = command(args, folder, url)
        run(words, folder / "log", url, args.patience, kill_at=int(0.9 * args.rows))
        try:
            seconds = run(words, folder / "log", url, args.patience)
        except Hangs:
            return {"hangs": 1, "asked_again": counts(url)["again"]}
        asked, found = counts(url), Counter(keys(folder))
        lost, twice = args.rows - len(found), found.total() - len(found)
        return {"hangs": 0, "asked_again": asked["again"], "resume_s": seconds, "lost": lost, "twice": twice}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="a Python that has distilabel[openai]")
    parser.add_argument("--rows", type=int, default=5_000)
    parser.add_argument("--concurrency", type=int, default=64, help="requests under way at once; distilabel's batch")
    parser.add_argument("--latency", type=float, default=0.1, help="seconds that the endpoint takes for an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--patience", type=float, default=120, help="seconds without a request that mean it hangs")
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for repeat in range(args.repeats):
        for side in SIDES:
            found[side].append(undisturbed(side, args) | killed(side, args))
            print(repeat + 1, side, {key: round(value, 2) for key, value in found[side][-1].items()}, flush=True)
    print(json.dumps(summary(found)))


def summary(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians and ranges of both sides, and the ratio of their throughputs in each repeat."""
    told: dict[str, Any] = {
        side: {
            key: {"median": round(statistics.median(v), 2), "range": [round(min(v), 2), round(max(v), 2)]}
            for key in dict.fromkeys(key for run in runs for key in run)
            for v in [[run[key] for run in runs if key in run]]
        }
        for side, runs in found.items()
    }
    ratios = [own["rows_s"] / peer["rows_s"] for own, peer in zip(*found.values(), strict=True)]
    told["throughput_ratio"] = {"median": round(statistics.median(ratios), 2), "range": [round(r, 2) for r in
                                (min(ratios), max(ratios))]}  # fmt: skip
    return told


if __name__ == "__main__":
    main()

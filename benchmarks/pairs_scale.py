"""Time and memory of pairs and their export, for as many made-up responses as wanted.

    python benchmarks/pairs_scale.py --responses 100000
    python benchmarks/pairs_scale.py --responses 1000000 --folder /data/tmp

Makes the artifacts `speeches`, `responses` and `judgements` (4 responses a speech, texts of about 600 characters,
whole-number ratings), then runs the real stage `pairs` in a real run, and `psyray export` on it. The rows are written
straight to Parquet by a process of its own, so that only the two measured steps stand in the figures. The last line
on standard output is JSON. Of each step: seconds on the clock and on the CPUs, seconds before the first row, for each
tenth of its rows, and after the last (merging, the layout, the card); MiB of resident memory, DuckDB's included, at
the start, at the peak, and the highest in each tenth of the time, sampled twenty times a second.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pyarrow.parquet as pq
from tqdm import tqdm

import psyray.data.export
import psyray.stream
from psyray.config import Config
from psyray.data.pairs import pairs_stage
from psyray.records import JUDGEMENTS, RESPONSES, SPEECHES, Row, content_id, speech_id, table
from psyray.rubric import load_rubric
from psyray.run import ROWS_PER_FILE, Artifact, Folder, Run
from psyray.sections.data import PairsSection

RUBRIC = load_rubric("counselling")
SCHEMAS = {"speeches": SPEECHES, "responses": RESPONSES, "judgements": JUDGEMENTS}
PER_SPEECH = 4
SYLLABLES = [a + b + c for a in "bdfglmnprst" for b in "aeiou" for c in ("n", "rt", "ll", "sk", "m")]


class Bar(tqdm):  # type: ignore[type-arg]
    """A progress bar that notes when each row was done."""

    marks: ClassVar[list[tuple[float, int]]] = []  # time, rows done since the step began

    def update(self, n: float | None = 1) -> bool | None:
        done = self.marks[-1][1] if self.marks else 0
        self.marks.append((time.monotonic(), done + int(n or 0)))
        return super().update(n)


def cpu_seconds(process: psutil.Process) -> float:
    """Seconds that all of the process's threads computed."""
    times = process.cpu_times()
    return float(times.user + times.system)


def measured(step: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """What the step returns, and its seconds and MiB."""
    process, stop, samples = psutil.Process(), threading.Event(), list[tuple[float, float]]()

    def sample() -> None:
        while not stop.wait(0.05):
            samples.append((time.monotonic(), process.memory_info().rss / 2**20))

    Bar.marks.clear()
    began, before, cpu = time.monotonic(), process.memory_info().rss / 2**20, cpu_seconds(process)
    watcher = threading.Thread(target=sample)
    watcher.start()
    try:
        result = step()
    finally:
        stop.set()
        watcher.join()
    ended, rows = time.monotonic(), Bar.marks[-1][1]
    at = [next(when for when, done in Bar.marks if done >= rows * tenth / 10) for tenth in range(1, 11)]
    first = Bar.marks[0][0]
    slices = [began + (ended - began) * tenth / 10 for tenth in range(11)]
    return result, {
        "seconds": round(ended - began, 1),
        "cpu_seconds": round(cpu_seconds(process) - cpu, 1),
        "rows": rows,
        "before_first_row_s": round(first - began, 1),
        "seconds_by_tenth": [round(b - a, 1) for a, b in zip([first, *at], at, strict=False)],
        "after_last_row_s": round(ended - at[-1], 1),
        "before_mib": round(before),
        "peak_mib": round(max(mib for _, mib in samples)),
        "mib_by_tenth": [
            round(max((mib for when, mib in samples if a <= when <= b), default=before)) for a, b in pairwise(slices)
        ],
    }


def sentences(count: int) -> list[str]:
    """Made-up sentences that texts are put together from."""
    draw = random.Random(1)
    words = [draw.choice(SYLLABLES) + draw.choice(SYLLABLES) for _ in range(2000)]
    return [" ".join(draw.choices(words, k=draw.randrange(4, 13))).capitalize() + "." for _ in range(count)]


def made_up(responses: int) -> Iterator[dict[str, list[Row]]]:
    """One speech after the other: its row, its responses' rows and their judgements'."""
    draw, pool = random.Random(0), sentences(5000)
    for number in range(responses // PER_SPEECH):
        messages = [{"role": "user", "content": " ".join(draw.choices(pool, k=6))}]
        speech: Row = {"speech_id": speech_id(messages), "messages": messages, "topic": f"topic {number % 42}"}
        speech |= {"split": "test" if number % 10 == 0 else "train", "subtopic": "", "crisis": number % 49 == 0}
        answers: list[Row] = []
        judgements: list[Row] = []
        for i in range(PER_SPEECH):
            key = content_id("response", speech["speech_id"], i)
            reply = " ".join(draw.choices(pool, k=draw.randrange(2, 19)))
            answers.append({**speech, "response_id": key, "responder": f"r{i}", "model": f"model-{(number + i) % 20}"})
            answers[-1] |= {"seed": i, "text": reply, "status": "ok", "raw_text": reply}
            ratings = {principle: float(draw.randint(1, 5)) for principle in RUBRIC.keys}
            judgements.append({"response_id": key, "speech_id": speech["speech_id"], "judge": "made up"})
            judgements[-1] |= {"ratings": ratings, "score": RUBRIC.score(ratings), "status": "ok"}
        yield {"speeches": [speech], "responses": answers, "judgements": judgements}


def inputs(run: Run, responses: int) -> list[Artifact]:
    """The stages `speeches`, `responses` and `judgements`, made or found."""

    def write(folder: Folder) -> dict[str, Any]:
        name = folder.path.parent.name
        waiting: list[Row] = []
        files = 0
        for number, rows in enumerate(tqdm(made_up(responses), name, responses // PER_SPEECH), 1):
            waiting += rows[name]
            if len(waiting) >= ROWS_PER_FILE or number == responses // PER_SPEECH:
                pq.write_table(table(waiting, SCHEMAS[name]), folder.path / f"data-{files:05d}.parquet")
                waiting, files = [], files + 1
        return {}

    return [run.stage(name, {"responses": responses}, [], write) for name in SCHEMAS]


def make_run(home: Path, responses: int) -> None:
    """A run that has its inputs."""
    run = Run(home, say=lambda line: None)
    with run.open(Config().model_dump(mode="json")):
        inputs(run, responses)


def main() -> None:
    """Make the inputs, measure both steps, print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="where the run lies while it is measured; none: the system's")
    parser.add_argument("--balance-length", action="store_true", help="measure pairs.balance_length too")
    options = parser.parse_args()
    psyray.stream.tqdm = psyray.data.export.tqdm = Bar  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        home = Path(folder) / "run"
        maker = multiprocessing.get_context("spawn").Process(target=make_run, args=(home, options.responses))
        maker.start()
        maker.join()
        run = Run(home, say=lambda line: print(line, file=sys.stderr))
        section = PairsSection(gap=0.5, balance_length=options.balance_length)
        with run.open(Config().model_dump(mode="json")):
            _, responses, judgements = inputs(run, options.responses)
            pairs, stage = measured(lambda: pairs_stage(run, section, RUBRIC, responses, judgements))
        known, export = measured(lambda: psyray.data.export.export_run(home, Path(folder) / "export", full=True))
        seen = {"responses": options.responses, "stats": pairs.stats, "splits": known["splits"]}
        print(json.dumps(seen | {"pairs": stage, "export": export}, indent=1))


if __name__ == "__main__":
    main()

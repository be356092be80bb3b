"""Time and memory from a round's features on disk to the questions chosen, for every acquisition rule.

    python benchmarks/acquisition_scale.py --prompts 200 --responses 4 --dim 256
    python benchmarks/acquisition_scale.py --prompts 10000 --responses 8 --dim 4096 --path KEPT

Makes a round's samples and features (float32, of a falling spectrum, as wide as --dim: 4096 is an 8B Llama's) and heads
of each kind, fitted on 1,000 made-up pairs, each once and in a process of its own. Then each kind of heads meets each
rule in a fresh process, which chooses --batch questions as a round's labels do. Its peak is the highest resident memory
of that process, Python and its libraries included; its seconds begin with reading the samples. Linux only. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from apart import folder, last_line

from psyray.active.acquisition import ACQUISITIONS
from psyray.active.labelling import by_speech, choose
from psyray.config import Config
from psyray.records import RESPONSES, Row, content_id, table
from psyray.reward.ensemble import FEATURES, fitted
from psyray.run import ROWS_PER_FILE, Artifact, Folder, Run
from psyray.sections.learning import HeadsSection, LoopSection

KINDS = ("ensemble", "mlp", "laplace")
PAIRS = 1000  # that heads are fitted on
AT_ONCE = 4096  # rows that are made and written together


def made_features(rows: int, dim: int, seed: int) -> npt.NDArray[np.float32]:
    """[rows, dim]: normal, each feature narrower than the one before."""
    noise_ND = np.random.default_rng(seed).standard_normal((rows, dim), dtype=np.float32)
    return np.asarray(noise_ND / np.sqrt(1 + np.arange(dim, dtype=np.float32)))


def sampled(prompts: int, responses: int) -> Iterator[Row]:
    """The rows of a round's samples."""
    for p in range(prompts):
        speech = content_id("speech", p)
        for k in range(responses):
            yield {
                "response_id": content_id("response", speech, k), "speech_id": speech, "split": "train", "status": "ok",
                "messages": [{"role": "user", "content": f"Speech {p}. " * 20}], "text": f"Reply {k}. " * 40,
                "truncated": False,
            }  # fmt: skip


def write_samples(given: argparse.Namespace, made: Folder) -> dict[str, Any]:
    """The samples, in order of their ids, as the stage leaves them."""
    rows = sorted(sampled(given.prompts, given.responses), key=lambda row: str(row["response_id"]))
    pq.write_table(table(rows, RESPONSES), made.path / "data-00000.parquet")
    return {}


def write_features(given: argparse.Namespace, made: Folder) -> dict[str, Any]:
    """The features of the samples, as the stage leaves them."""
    ids = sorted(str(row["response_id"]) for row in sampled(given.prompts, given.responses))
    for number, first in enumerate(range(0, len(ids), ROWS_PER_FILE)):
        parts, held = list[pa.Table](), ids[first : first + ROWS_PER_FILE]
        for start in range(0, len(held), AT_ONCE):
            some = held[start : start + AT_ONCE]
            values = pa.array(made_features(len(some), given.dim, first + start).ravel())
            lists = pa.FixedSizeListArray.from_arrays(values, given.dim).cast(FEATURES.field("features").type)
            parts.append(pa.table([pa.array(some), lists], schema=FEATURES))
        pq.write_table(pa.concat_tables(parts), made.path / f"data-{number:05d}.parquet")
    return {}


def write_heads(given: argparse.Namespace, kind: str, made: Folder) -> dict[str, Any]:
    """Heads of a kind, around a score head, fitted on pairs that it decides."""
    first, second = (made_features(PAIRS, given.dim, -seed % 2**32).astype(np.float64) for seed in (1, 2))
    own_D = np.random.default_rng(3).normal(size=given.dim) / np.sqrt(given.dim)
    wins_N1 = ((first - second) @ own_D > 0)[:, None]
    chosen, rejected = np.where(wins_N1, first, second), np.where(wins_N1, second, first)
    section = HeadsSection.model_validate({"kind": kind})
    fitted(section, chosen, rejected, [str(n) for n in range(PAIRS)], own_D, 0).save(made.path / "heads.npz")
    return {}


def inputs(home: Path, given: argparse.Namespace, kinds: list[str]) -> tuple[Artifact, Artifact, dict[str, Artifact]]:
    """(samples, features, heads by kind), made or found."""
    run = Run(home, say=lambda line: None)
    size = {"prompts": given.prompts, "responses": given.responses, "dim": given.dim}
    with run.open(Config().model_dump(mode="json")):
        samples = run.stage("round-0/samples", size, [], partial(write_samples, given))
        features = run.stage("round-0/features", size, [samples], partial(write_features, given))
        heads = {kind: run.stage(f"heads-{kind}", size, [], partial(write_heads, given, kind)) for kind in kinds}
    return samples, features, heads


def choice(home: Path, given: argparse.Namespace, kind: str, rule: str) -> dict[str, Any]:
    """What choosing took in this process, and a sum of what was chosen."""
    samples, features, heads = inputs(home, given, [kind])
    loop = LoopSection(k=given.responses, budget=given.batch, acquisition=rule)
    began = time.monotonic()
    _, picks = choose(Config(loop=loop), 1, heads[kind], features, by_speech(samples), [])
    seconds = round(time.monotonic() - began, 1)
    asked = content_id([(pick.prompt, pick.first, pick.second) for pick in picks])
    return {"peak_mib": peak_mib(), "seconds": seconds, "questions": len(picks), "asked": asked}


def peak_mib() -> int:
    """The highest resident memory of this process so far; `getrusage` would count its parent's."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return round(int(status["VmHWM"].split()[0]) / 2**10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rules", nargs="+", choices=list(ACQUISITIONS), default=list(ACQUISITIONS))
    parser.add_argument("--path", type=Path, help="a folder where the features are kept; none: a temporary one")
    parser.add_argument("--here", action="store_true", help="one kind and one rule, in this process, on features kept")
    given = parser.parse_args()
    if given.here:
        print(json.dumps(choice(given.path / "run", given, given.kinds[0], given.rules[0])))
        return
    found: dict[str, dict[str, Any]] = {kind: {} for kind in given.kinds}
    size = [word for name in ("prompts", "responses", "dim", "batch") for word in (f"--{name}", getattr(given, name))]
    with folder(given.path) as place:
        maker = multiprocessing.get_context("spawn").Process(target=inputs, args=(place / "run", given, given.kinds))
        maker.start()
        maker.join()
        for kind in given.kinds:
            for rule in given.rules:
                one = last_line(__file__, *size, "--path", place, "--kinds", kind, "--rules", rule, "--here")
                found[kind][rule] = json.loads(one)
                print(f"{kind:10} {rule:12} {found[kind][rule]}", file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

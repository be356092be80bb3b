"""The generation stage beside bare vLLM: the same prompts, model, sampling and machine, engine start left out.

    python benchmarks/generation.py --rows 256 1024 --repeats 2

For each number of rows and repeat, `LLM.chat` of bare vLLM and the stage (`psyray.data.generate.answer_all` in a Ray of
its own) answer the same prompts, each in a process of its own, one after the other. The clock of bare vLLM runs from
the call to its return. The clock of the stage runs until all rows lie in its sorted Parquet, less what it reports as
the engine's start (until the first result, less the seconds that the engine spent on it). Sampling is greedy and the
end of text is ignored, so that both generate the same number of tokens. The last line is JSON: tokens a second of
both, their ratio with its range over the repeats, and what a row costs the stage beyond bare vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apart import last_line
from prompts import conversation

from psyray.config import Config, load_config
from psyray.data import generate
from psyray.models import embedded_model
from psyray.records import Row, speech_id
from psyray.run import Folder


def settings(tokens: int) -> Config:
    """The demo's engine, greedy sampling."""
    words = [f"policy.max_tokens={tokens}", "policy.temperature=0", "engine.max_num_seqs=256"]
    return load_config(None, words)


def draws(count: int, config: Config) -> Iterator[Row]:
    """`count` draws over the shipped speeches."""
    for messages in map(conversation, range(count)):
        speech = {"speech_id": speech_id(messages), "messages": messages, "split": "train"}
        row = generate.draw_row(speech, config.policy, "benchmark", 0)
        row["sampling"] |= {"ignore_eos": True}
        yield row


def bare(count: int, tokens: int) -> float:
    """Seconds that `LLM.chat` takes for all prompts."""
    from psyray.engines.vllm import cpu_environment

    config = settings(tokens)
    os.environ.update(cpu_environment(config.engine.kv_cache_gib) | {"VLLM_LOGGING_LEVEL": "ERROR"})
    from vllm import LLM, SamplingParams

    engine = config.engine
    model = LLM(
        str(embedded_model()), dtype=engine.dtype, max_model_len=engine.max_model_len,
        max_num_seqs=engine.max_num_seqs, enforce_eager=True, enable_prefix_caching=True,
    )  # fmt: skip
    prompts = [row["prompt"] for row in draws(count, config)]
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    began = time.monotonic()
    answers = model.chat(prompts, sampling, use_tqdm=False)
    seconds = time.monotonic() - began
    assert sum(len(a.outputs[0].token_ids) for a in answers) == count * tokens
    return seconds


def stage(count: int, tokens: int) -> float:
    """Seconds of the stage from the engine's first request to the sorted Parquet."""
    from psyray.cluster import ray_session

    config = settings(tokens)
    with tempfile.TemporaryDirectory() as place, ray_session(config):
        began = time.monotonic()
        stats = generate.answer_all(
            Folder(Path(place)), lambda: draws(count, config), count, config, title=f"{count} rows"
        )
        seconds = time.monotonic() - began - float(stats["engine_start_s"])
    assert stats["ok"] == count, stats
    return seconds


def measured(which: str, count: int, tokens: int) -> float:
    """Seconds of one measurement in a process of its own."""
    return float(last_line(__file__, "--one", which, "--rows", count, "--tokens", tokens))


def compare(count: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Both sides at one number of rows."""
    seconds = [(measured("bare", count, tokens), measured("stage", count, tokens)) for _ in range(repeats)]
    ratios = [alone / staged for alone, staged in seconds]
    alone, staged = (statistics.median(side) for side in zip(*seconds, strict=True))
    return {
        "rows": count,
        "tokens_a_row": tokens,
        "bare_tokens_s": round(count * tokens / alone, 1),
        "stage_tokens_s": round(count * tokens / staged, 1),
        "ratio": round(alone / staged, 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "overhead_ms_a_row": round(1000 * (staged - alone) / count, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--tokens", type=int, default=32, help="of an answer; fewer show a row's overhead better")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--one", choices=["bare", "stage"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print({"bare": bare, "stage": stage}[given.one](given.rows[0], given.tokens))
        return
    found = []
    for count in given.rows:
        found.append(compare(count, given.tokens, given.repeats))
        print(found[-1], file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""Stages one after another on a Ray that was told of eight GPUs, with a stand-in for vLLM; for tests only.

Run as a program of its own by test_gpus_on_ray.py, since a process has one Ray: `eight_gpus.py MODEL` prints a line
of JSON for each engine, the GPUs that every replica saw.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import ray
import ray.data.llm
from ray.llm._internal.batch.stages.base import StatefulStageUDF

from psyray.cluster import require
from psyray.engines.vllm import generate
from psyray.needs import scoring, training
from psyray.sections.data import EngineSection
from psyray.sections.learning import TrainSection

GPUS, WAIT_S = 8, 20.0


class Engine(StatefulStageUDF):
    """Answers with the GPUs that Ray lets it see."""

    def __init__(self, data_column: str, expected_input_keys: list[str], **_: Any) -> None:
        super().__init__(data_column, expected_input_keys)

    async def udf(self, batch: list[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
        for row in batch:
            seen = {
                "generated_text": os.environ["CUDA_VISIBLE_DEVICES"],
                self.IDX_IN_BATCH_COLUMN: row["__idx_in_batch"],
            }
            yield seen | {"num_generated_tokens": 1, "time_taken_llm": 0.0}


def standing_in(config: Any, **more: Any) -> Any:
    processor = build(config, **more)
    for stage in processor.stages.values():
        stage.fn = Engine
    return processor


build, ray.data.llm.build_processor = ray.data.llm.build_processor, standing_in


def main(model: str) -> None:
    row = {"messages": [{"role": "user", "content": "I cannot sleep."}], "sampling": "{}"}
    for replicas, parallel in ((1, 8), (4, 2), (8, 1)):
        engine = EngineSection(device="gpu", replicas=replicas, tensor_parallel=parallel)
        rows = ray.data.from_items([row | {"key": str(i)} for i in range(64)], override_num_blocks=16)
        seen = {answer["text"] for answer in generate(rows, model, engine, WAIT_S).iter_rows()}
        print(json.dumps(sorted(seen)), flush=True)
    require(scoring(engine, gpu=True), WAIT_S, "the reward model")
    require(training(TrainSection(micro_batch=1, workers=8), gpu=True), WAIT_S, "the policy")


if __name__ == "__main__":
    ray.init(address="local", num_cpus=GPUS + 2, num_gpus=GPUS, include_dashboard=False, log_to_driver=False)
    main(sys.argv[1])

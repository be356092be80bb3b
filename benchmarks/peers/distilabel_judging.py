"""distilabel's part of benchmarks/peer_judging.py, run by a Python that has `distilabel[openai]` and no psyray.

    python distilabel_judging.py PROMPTS.jsonl URL FOLDER BATCH

PROMPTS.jsonl holds rows of `key` and `messages`; the answers go to FOLDER/answers.jsonl, the cache to FOLDER/cache.
"""

import os
import sys
from pathlib import Path

os.environ["DISTILABEL_LOG_LEVEL"] = "WARNING"  # or a line for every request would slow it down

from distilabel.models import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromFileSystem
from distilabel.steps.tasks import ChatGeneration


def main() -> None:
    prompts, url, folder, batch = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    with Pipeline(name="judging", cache_dir=folder / "cache") as pipeline:
        read = LoadDataFromFileSystem(data_files=prompts, filetype="json", batch_size=batch)
        llm = OpenAILLM(
            model="stub", base_url=url, api_key="none", generation_kwargs={"temperature": 0, "max_new_tokens": 128}
        )
        read >> ChatGeneration(llm=llm, input_batch_size=batch, add_raw_output=False, add_raw_input=False)
    found = pipeline.run(use_cache=True)["default"]["train"]
    found.select_columns(["key", "generation"]).to_json(folder / "answers.jsonl")


if __name__ == "__main__":
    main()

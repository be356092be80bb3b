"""`psyray run` with stand-ins for vLLM, both trainers and MLflow, run by test_waiting_loop.py; all else is real.

python tests/integration/waiting_run.py run configs/demo.yaml [key=value ...]
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from typing import Any

from psyray import loop, pipeline
from psyray.cli import main
from psyray.config import Config
from psyray.data import generate
from psyray.policy import dpo
from psyray.records import RESPONSES, Row
from psyray.reward import train
from psyray.run import Folder

GOOD = "It sounds heavy to carry that alone. What has been the hardest part of this week for you?"
POOR = "Just stop thinking about it."


def made_answers(
    folder: Folder, draws: Callable[[], Iterable[Row]], count: int, config: Config, *, title: str, **_: Any
) -> Any:
    """Made-up texts: by turns one that takes the client up and one that does not."""
    parts = folder.parts(RESPONSES, "response_id")
    known = {"status": "ok", "truncated": False, "repeated": 0.0, "error": "", "raw_text": "", "attempts": 1}
    for place, row in enumerate(draws()):
        if row["response_id"] not in parts.ids:
            text = f"{POOR if place % 2 else GOOD} ({title} {place})"
            parts.append([row | known | {"text": text, "tokens": len(text.split())}])
    parts.finish()
    return generate.summary(parts.each(generate.SUMMED))


def copied_model(
    folder: Folder, work: Any, examples: Iterable[Row], settings: Any, *_: Any, title: str, dev: Iterable[Row]
) -> Any:
    """The model as it was before: a trainer that learns nothing."""
    count = sum(1 for _ in examples)
    shutil.copytree(settings["model"], folder.path / "model", dirs_exist_ok=True)
    return [{"step": 1, "loss": 1.0, "examples": count}]


class Untracked:
    """A tracker that keeps nothing."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> Untracked:
        return self

    def __exit__(self, *_: object) -> None: ...

    def stage(self, *_: Any, **__: Any) -> None: ...

    register = text = stage


if __name__ == "__main__":
    pipeline.Tracker = Untracked  # type: ignore[assignment, misc]
    generate.answer_all = loop.answer_all = made_answers  # type: ignore[assignment]
    train.run_training = dpo.run_training = copied_model  # type: ignore[assignment]
    main()

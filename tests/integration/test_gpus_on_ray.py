"""What Ray does with GPUs that stages ask for and give back, on GPUs that it was told of and that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parent / "eight_gpus.py"


def test_engines_over_several_gpus_get_those_of_one_another_and_leave_them(tiny_model: Path) -> None:
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_DATA_USE_DATASOURCE_V2": "0"}
    command = [sys.executable, str(PROGRAM), str(tiny_model)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=220)
    assert done.returncode == 0, done.stderr[-3000:]
    engines = [[seen.split(",") for seen in json.loads(line)] for line in done.stdout.splitlines() if line[:1] == "["]
    assert len(engines) == 3
    for replicas, parallel in zip(engines, (8, 2, 1), strict=True):
        assert {len(gpus) for gpus in replicas} == {parallel}  # all of an engine's GPUs in one process

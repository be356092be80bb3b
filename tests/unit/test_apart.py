"""What a benchmark starts ends with it, also where it is killed."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CHILD = "import os, sys, time; open(sys.argv[-1], 'w').write(str(os.getpid())); time.sleep(60)"


@pytest.mark.parametrize(
    "work", ["last_line(child, pid)", "PSYRAY[:] = [sys.executable, child]\npsyray_run({}, place, 'run', pid)"]
)
def test_a_benchmark_that_is_killed_leaves_nothing_running(tmp_path: Path, work: str) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    places = f"place = Path({str(tmp_path)!r})\nchild, pid = str(place / 'child.py'), str(place / 'pid')"
    script = f"import sys\nfrom pathlib import Path\nfrom apart import *\n{places}\n{work}"
    parent = subprocess.Popen([sys.executable, "-c", script], env={"PYTHONPATH": str(BENCHMARKS)})
    until = time.monotonic() + 30
    while not (told := tmp_path / "pid").exists() or not told.read_text():
        assert time.monotonic() < until and parent.poll() is None
        time.sleep(0.05)
    child = psutil.Process(int(told.read_text()))
    parent.kill()
    parent.wait()
    try:
        child.wait(10)
    finally:
        if child.is_running():
            child.kill()


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.py")), ids=lambda script: script.stem)
def test_whatever_a_benchmark_starts_is_started_so(script: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    starts = [call for call in calls if ast.unparse(call.func) in ("subprocess.Popen", "subprocess.run")]
    assert all("preexec_fn=with_parent" in map(ast.unparse, call.keywords) for call in starts)

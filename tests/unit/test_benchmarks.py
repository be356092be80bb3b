"""Every benchmark teaches by --help, and the commands that its help and the docs give are ones that it takes."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py") if "argparse" in path.read_text())


@cache
def help_of(script: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_commands_given_for_a_benchmark_name_flags_that_it_has(script):
    pages = [help_of(script), *(page.read_text() for page in (ROOT / "docs").glob("*.md"))]
    whole = [page.replace("\\\n", " ") for page in pages]
    lines = [line for page in whole for line in re.findall(rf"python benchmarks/{script}([^`\n]*)", page)]
    assert lines, "its help shows no command"
    for line in lines:
        for flag in (word for word in shlex.split(line, comments=True) if word.startswith("--")):
            assert re.search(rf"^ *{flag}\b", help_of(script), re.MULTILINE), flag

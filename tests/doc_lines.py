"""The lines of code in the docs that call a program, for the tests that read and run them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
JOB = re.compile(r"ray job submit .*? -- python (?:-m psyray|jobs/(pipeline|report)\.py) (.*)")
JOBS = {"pipeline": "run ", "report": "report ", None: ""}


def lines(program: str) -> list[str]:
    """The command lines of the docs that call a program, without what the shell does with them."""
    calls = re.compile(rf"^\s*(?:\$ )?(?:\w+=\S* )*({program} [^`\n]*)$", re.MULTILINE)
    found = (line for page in PAGES for line in calls.findall(page.read_text().replace("\\\n", " ")))
    return list(dict.fromkeys(line.partition(" > ")[0] for line in found))


def commands() -> list[list[str]]:
    """What the docs give to `psyray`, also in the jobs that they submit."""
    jobs = (JOBS[job[1]] + job[2] for line in lines("ray") if (job := JOB.match(line)))
    return [shlex.split(line, comments=True) for line in (*(line[7:] for line in lines("psyray")), *jobs)]

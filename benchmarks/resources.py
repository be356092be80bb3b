"""Wall time and peak memory of a command with everything that it starts.

    python benchmarks/resources.py -- psyray run configs/demo.yaml --serve run.path=/tmp/run

Memory is the sum of the proportional set sizes (each shared page counted once, split among its users), sampled every
few seconds over the command's process tree; a process whose parent died still counts. Linux only. The last line on
standard error is JSON: {"seconds", "peak_gib", "peak_at_s", "peak_processes", "exit"}; `peak_processes` maps the
largest commands at the peak to their GiB.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field

import psutil
from apart import with_parent

GIB = 2**30
PAUSE_S = 5.0  # reading the sizes of a hundred processes takes a good part of a second


@dataclass
class Peak:
    """The largest sample so far."""

    total: int = 0
    at_s: float = 0.0
    processes: dict[str, int] = field(default_factory=dict)


def tree(known: dict[int, psutil.Process]) -> list[psutil.Process]:
    """The live processes among `known` and all their descendants; `known` gains those it lacked."""
    for process in list(known.values()):
        try:
            known.update((child.pid, child) for child in process.children(recursive=True))
        except psutil.NoSuchProcess:  # ended since the last sample
            known.pop(process.pid, None)
    return list(known.values())


def sample(known: dict[int, psutil.Process]) -> dict[str, int]:
    """Bytes of proportional set size by command name."""
    sizes: dict[str, int] = {}
    for process in tree(known):
        try:
            name = " ".join(process.cmdline()[:2])[-60:] or process.name()
            sizes[name] = sizes.get(name, 0) + process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.ZombieProcess):  # ended while it was read
            continue
    return sizes


def main(command: list[str]) -> int:
    """Run the command, sample until it ends, print what was seen; the command's exit status."""
    if not command:
        sys.exit((__doc__ or "").strip())
    began, peak = time.monotonic(), Peak()
    child = subprocess.Popen(command, preexec_fn=with_parent)
    known = {child.pid: psutil.Process(child.pid)}
    while child.poll() is None:
        sizes = sample(known)
        if (total := sum(sizes.values())) > peak.total:
            peak = Peak(total, time.monotonic() - began, sizes)
        time.sleep(PAUSE_S)
    largest = sorted(peak.processes.items(), key=lambda item: -item[1])[:6]
    seen = {
        "seconds": round(time.monotonic() - began, 1),
        "peak_gib": round(peak.total / GIB, 2),
        "peak_at_s": round(peak.at_s, 1),
        "peak_processes": {name: round(size / GIB, 2) for name, size in largest},
        "exit": child.returncode,
    }
    print(json.dumps(seen, indent=1), file=sys.stderr)
    return child.returncode


if __name__ == "__main__":
    sys.exit(main([part for part in sys.argv[1:] if part != "--"]))

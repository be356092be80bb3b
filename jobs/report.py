"""The report of a run as a Ray job: `ray job submit --working-dir . -- python jobs/report.py RUN`."""

from __future__ import annotations

import sys

from psyray.cli import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])

"""A whole run as a Ray job: `ray job submit --working-dir . -- python jobs/pipeline.py CONFIG [key=value ...]`."""

from __future__ import annotations

import sys

from psyray.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])

"""Ending a run on purpose: Ctrl-C, the SIGTERM of `ray job stop` or of Kubernetes, and `--until STAGE`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from types import FrameType

from psyray.errors import PsyrayError, hint

STOPPED = 130  # the exit status of a run that was stopped


class Reached(Exception):
    """The stage that a run was to go up to is done."""


def sigterm_is_ctrl_c() -> None:
    """From now on SIGTERM ends this process as Ctrl-C does; to be said again after `ray.init`, which takes it over."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    # What is still to be put in order must not be cut short by a second signal; SIGKILL remains.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def last_stage(until: str, stages: Sequence[str]) -> str:
    """The stage that a run ends with: `until` itself, or the last of the round that it names.

    PsyrayError names the nearest stage where there is none of that name among `stages`, those of a whole run in order.
    """
    if until in stages:
        return until
    if of_round := [name for name in stages if name.startswith(f"{until}/")]:
        return of_round[-1]
    raise PsyrayError(f"--until: a run with these settings has no stage {until!r}; {hint(until, stages)}")

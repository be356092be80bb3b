"""Ctrl-C and SIGTERM (`docker stop`, systemd, Kubernetes) end `serve run` once the answers under way are given.

By itself SIGTERM ends Ray on the spot, since `ray.init` takes the signal over, and Ctrl-C shuts Serve down, which ends
its proxy before the answers that go through it (`ServeController.shutdown`). Applications that are deleted first take
no new request and have Serve's `graceful_shutdown_timeout_s` to finish. `serve run FILE` builds its applications in
another process, so that nothing of this is loaded where the signals come.
"""

from __future__ import annotations

import logging
import signal
from types import FrameType

import click

SIGNALS = (signal.SIGINT, signal.SIGTERM)
logger = logging.getLogger("ray.serve")


def drain_when_stopped() -> None:
    """In a command line that goes to Ray next: have it listen to both signals from then on."""
    import ray._private.worker

    if click.get_current_context(silent=True) and not ray.is_initialized():
        ray._private.worker._post_init_hooks.append(_listen)


def _listen() -> None:
    for number in SIGNALS:
        signal.signal(number, _drain)


def _drain(number: int, frame: FrameType | None) -> None:
    from ray import serve

    for each in SIGNALS:
        signal.signal(each, signal.default_int_handler)  # a second one does not wait
    apps = set(serve.status().applications)
    logger.warning("no new request is taken, and answers under way are given; Ctrl-C again cuts them short")
    for app in apps:
        # The parts of another (serve/lineup.py) go with it, when nobody asks them any more.
        if not any(app.startswith((f"{other}.policy.", f"{other}.reward.")) for other in apps):
            serve.delete(app)
    raise KeyboardInterrupt  # `serve run` shuts Serve down then

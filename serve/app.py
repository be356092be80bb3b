"""One HTTP port for a finished run: the policy in OpenAI's format and the reward model beside it.

    serve run serve.app:build run=RUN [reward=false] [device=cpu|gpu] [reward_gpus=1] [keys=FILE] [per_minute=120]

    POST /v1/chat/completions   the policy, also streaming       GET /v1/models
    POST /v1/chat/best          the best of several answers by the reward model (serve/best.py)
    POST /reward/score          the reward model (serve/reward.py)
    GET  /healthz               200 while the engine answers, else 503

Where a client names no system message or no sampling, those that the policy was trained with apply. Client words
that speak of a crisis (psyray/crisis.py) get a fixed reply (serve/guard.py) and the header `X-Psyray-Crisis: true`.
`X-Psyray-Id` names the export that answered, for `psyray lineage`. Without keys (serve/access.py)
anyone who reaches the port may ask: then keep it on loopback.
"""

from __future__ import annotations

import logging
from typing import Any

from serve.access import VARIABLE, Limits, read_keys
from serve.champion import Args, read_champion, read_engine


def build(args: dict[str, str]) -> Any:
    """The Serve application of a finished run; PsyrayError names what is wrong with the arguments or the run."""
    asked = Args.read(args)
    champion = read_champion(asked.run, reward=asked.reward)
    keys, limits = read_keys(asked.keys), Limits(per_minute=asked.per_minute, in_flight=asked.in_flight)
    if not keys:
        logging.getLogger(__name__).warning("no keys (keys=FILE or %s): anyone who reaches the port may ask", VARIABLE)
    from serve.ingress import application  # imports the engine: a mistake above is told at once, not half a minute on

    return application(asked, champion, read_engine(champion.run), keys, limits)

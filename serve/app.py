"""One HTTP port for a champion: the policy in OpenAI's format and the reward model beside it.

    serve run serve.app:build                   the champion of MLflow's registry, and each later one when it is there
    serve run serve.app:build run=RUN           the champion of a finished run
    ... [rounds=all] [beside=NAME=FOLDER] [reward=false] [device=cpu|gpu] [keys=FILE]: serve/champion.py has all words

    POST /v1/chat/completions   the policy, also streaming       GET /v1/models
    POST /v1/chat/best          the best of several answers by the reward model (serve/best.py)
    POST /reward/score          the reward model (serve/reward.py)
    GET  /healthz               200 while the engine answers, else 503

Where a client names no system message or no sampling, those that the policy was trained with apply. Client words
that speak of a crisis (psyray/crisis.py, and the model that `ask` names: serve/ear.py) get a fixed reply
(serve/guard.py) and the header `X-Psyray-Crisis: true`.
`X-Psyray-Id` names the export that answered, for `psyray lineage`. What clients say is written down nowhere unless
`log_text=FOLDER` says where (serve/transcript.py). Without keys (serve/access.py)
anyone who reaches the port may ask: then keep it on loopback.
"""

from __future__ import annotations

import logging
from typing import Any

from psyray.cluster import use_gpu
from psyray.mlflow_client import registry_beside
from serve.access import VARIABLE, read_keys
from serve.champion import Args
from serve.door import put_up
from serve.guard import read_replies
from serve.ingress import application
from serve.lineup import Order
from serve.mistakes import in_one_line
from serve.transcript import ready


@in_one_line
def build(args: dict[str, Any]) -> Any:
    """The Serve application; PsyrayError names what is wrong with the arguments, the run or the registry."""
    put_up()
    asked = Args.read(args).settled()
    order = Order(asked, asked.tracking or registry_beside(asked.runs), gpus=use_gpu("auto"))
    order.read("check")  # a mistake is told here, not in a replica's log
    keys, logger = read_keys(asked.keys), logging.getLogger(__name__)
    if not keys:
        logger.warning("no keys (keys=FILE or %s): anyone who reaches the port may ask", VARIABLE)
    if asked.log_text:
        ready(asked.log_text)
        logger.warning("what clients say and are answered is kept in %s (log_text)", asked.log_text)
    if ear := asked.ear:
        logger.warning("what clients say is sent to %s where no phrase speaks of a crisis (ask)", ear.url)
    return application(order, keys, asked.limits, read_replies(asked.replies) if asked.guard == "reply" else None, ear)

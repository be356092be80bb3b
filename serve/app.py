"""One HTTP port for a finished run: the policy in OpenAI's format and the reward model beside it.

    serve run serve.app:build run=RUN [reward=false] [device=cpu|gpu] [reward_gpus=1]

    POST /v1/chat/completions   the policy, also streaming       GET /v1/models
    POST /reward/score          the reward model (serve/reward.py)
    GET  /healthz               200 while the engine answers, else 503

Where a client names no system message or no sampling, those that the policy was trained with apply. A reply to
client words that speak of a crisis (psyray/crisis.py) carries the header `X-Psyray-Crisis: true`; the reply itself
is left as it is. `X-Psyray-Id` names the export that answered, for `psyray lineage`. Nothing here asks who is
calling: keep the port on loopback or behind a proxy that does.
"""

from __future__ import annotations

from typing import Any

from serve.champion import Args, read_champion, read_engine


def build(args: dict[str, str]) -> Any:
    """The Serve application of a finished run; PsyrayError names what is wrong with the arguments or the run."""
    asked = Args.read(args)
    champion = read_champion(asked.run, reward=asked.reward)
    from serve.ingress import application  # imports the engine: a mistake above is told at once, not half a minute on

    return application(asked, champion, read_engine(champion.run))

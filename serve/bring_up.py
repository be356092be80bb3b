"""Start parts of a line-up as Serve applications, and let no one ask them before they have answered a first question.

Runs in a worker process of its own: building an engine's deployment imports vLLM, hundreds of MB that the keeper need
not hold on to.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray import serve

from serve.chat import Refusal
from serve.lineup import BASE, Part
from serve.reward import RewardServer, ScoreItem

MAX_ONGOING = 1000  # Serve's default of 5 would keep requests from being batched
START_S = 1800.0  # longest start of a part
FIRST_S = 300.0  # longest first answer
LOGGING = {"log_level": "WARNING", "enable_access_log": False}
logger = logging.getLogger("ray.serve")
_POLL_S = 0.5
_UNPLACED = "to be scheduled"  # Serve's words for a replica that has found no node for half a minute
_FAILED = ("DEPLOY_FAILED", "NOT_STARTED")  # one that is unhealthy for a while recovers


def bring_up(parts: Sequence[Part]) -> None:
    """Return when every part answers; RuntimeError with the reason, and none of them left, when one does not."""
    for name in ("ray.serve", "ray.llm"):
        logging.getLogger(name).setLevel(logging.WARNING)
    there = serve.status().applications
    fresh = [part for part in parts if part.app not in there or there[part.app].status.value == "DELETING"]
    try:
        wait_until_gone({part.app for part in fresh}, START_S)
        if fresh:
            targets = [serve.RunTarget(application(part), part.app, None, LOGGING) for part in fresh]
            serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        for part in parts:
            wait_until_running(part.app, START_S)
            first_question(part)
    except Exception as error:
        for part in fresh:
            serve.delete(part.app, _blocking=False)
        # The error's own class may be one that the keeper's process cannot read.
        raise RuntimeError(str(error)[-1500:]) from None


def application(part: Part) -> serve.Application:
    """The part's deployment, bound to what it is made of."""
    if part.reward is not None:
        deployment = serve.deployment(RewardServer, name="RewardServer", max_ongoing_requests=MAX_ONGOING)
        return deployment.options(**(part.options or {})).bind(**part.reward)
    from ray.serve.llm import LLMConfig, build_llm_deployment
    from vllm.entrypoints.openai.models.serving import LoRAModulePath

    from serve.engine import PolicyServer

    config = LLMConfig(**(part.llm or {}))
    if part.adapters:
        config.engine_kwargs["lora_modules"] = [LoRAModulePath(name, path) for name, path in part.adapters]
    return build_llm_deployment(config, deployment_cls=PolicyServer)


def wait_until_gone(apps: set[str], timeout_s: float) -> None:
    """Return when none of the applications is there: one that gives its last answers cannot start anew."""
    began = time.monotonic()
    while left := apps & set(serve.status().applications):
        if time.monotonic() - began > timeout_s:
            raise RuntimeError(f"{', '.join(left)}: still there after {timeout_s:.0f} s")
        time.sleep(_POLL_S)


def wait_until_running(app: str, timeout_s: float) -> None:
    """Return when the application is up; RuntimeError with Serve's words when it fails or time runs out."""
    began, told = time.monotonic(), False
    while True:
        status = serve.status().applications.get(app)
        state = str(status.status.value) if status else "NOT_STARTED"
        if state == "RUNNING":
            return
        late = time.monotonic() - began > timeout_s
        if state in _FAILED or late:
            raise RuntimeError(f"{app}: {f'not up after {timeout_s:.0f} s: ' if late else ''}{why(status) or state}")
        if not told and _UNPLACED in why(status):
            logger.warning("%s", no_room(app))
            told = True
        time.sleep(_POLL_S)


def no_room(app: str) -> str:
    """What the log says of a part that waits for a node: what the cluster has, what is free, and the mend."""
    has, free = ray.cluster_resources(), ray.available_resources()
    counts = ", ".join(f"{has[name]:g} {name} ({free.get(name, 0):g} free)" for name in ("CPU", "GPU") if name in has)
    return (
        f"{app} waits for room: the cluster has {counts or 'no node'}. It starts when there is some: add a node, end "
        "what holds the others, or serve less (fewer policies in rounds and beside, reward=false)"
    )


def why(application: Any) -> str:
    """The messages of the parts that are not well; the last lines, where the cause stands."""
    if application is None:
        return ""
    parts = [f"{name}: {d.message}" for name, d in application.deployments.items() if d.status.value != "HEALTHY"]
    return " | ".join([application.message, *parts]).strip()[-1500:]


def first_question(part: Part) -> None:
    """One short question to a part, under each of its names; RuntimeError where the answer is an error."""
    handle = serve.get_app_handle(part.app)
    said = {"role": "user", "content": "Hello."}
    if part.reward is not None:
        item = ScoreItem.model_validate({"messages": [said], "response": "Hello."})
        handle.score.remote([item]).result(timeout_s=FIRST_S)
        return
    for name in BASE, *(name for name, _ in part.adapters):
        asked = {"model": name, "messages": [said], "max_completion_tokens": 1}
        for reply in handle.options(stream=True).answer.remote(asked, name):
            if isinstance(reply, Refusal):
                raise RuntimeError(f"{part.app}: {name} answered a first question with: {reply.words}")


def in_a_worker(parts: Sequence[Part]) -> ray.ObjectRef[None]:
    """`bring_up` in a worker process of this cluster, without a CPU of its own."""
    task = ray.remote(num_cpus=0, max_retries=0)(bring_up)
    return task.remote(parts)

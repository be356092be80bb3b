"""The Ray session that a run works in, and what hardware it has."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any

from psyray.config import Config
from psyray.errors import PsyrayError
from psyray.needs import Bundle, missing
from psyray.stopping import sigterm_is_ctrl_c

# Nothing is reported to anybody, and logs stay readable.
QUIET = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    # Ray Train replaces print, which breaks the capture that datasets' fingerprints rely on and fills the log.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}
# What Ray Serve's proxy loads when it starts: serve/door.py looks at requests before the proxy does.
HOOK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.door:middlewares"}


TOLD_AFTER_S, TOLD_EVERY_S = 30.0, 300.0  # when a stage that waits for room says so first, and how often then


@contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Attach to the configured Ray, or start one on this machine that ends with the run."""
    for key, value in (QUIET | HOOK).items():
        os.environ.setdefault(key, value)
    # The newer Parquet reader is slow to start; set before ray is imported.
    os.environ.setdefault("RAY_DATA_USE_DATASOURCE_V2", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    _start(ray, config, address)
    sigterm_is_ctrl_c()
    _quiet_data()
    try:
        yield
    finally:
        ray.shutdown()


def _start(ray: Any, config: Config, address: str | None) -> None:
    common: dict[str, Any] = {"log_to_driver": bool(os.environ.get("PSYRAY_WORKER_LOGS")), "logging_level": "ERROR"}
    if address:
        _knock(address)
        try:
            ray.init(address=address, runtime_env={"env_vars": QUIET | HOOK}, **common)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise PsyrayError(f"no Ray at {address}: {error} (RAY_AUTH_MODE=token if it asks for one)") from error
        return
    if not has_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _lock()
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    # Each training job would start a process that looks out for nodes that a cloud takes away.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    try:
        ray.init(
            address="local",
            num_cpus=slots(config),
            object_store_memory=config.cluster.object_store_mib * 2**20,
            include_dashboard=False,
            **common,
        )
    except Exception as error:  # that and no more is what Ray raises where its node is not up within half a minute
        raise PsyrayError(
            f"Ray did not start on this machine: {error}\nNothing is lost: run the same command again"
        ) from error


def _knock(address: str) -> None:
    """PsyrayError for a dashboard, and where nobody listens at HOST:PORT: Ray alone tries for minutes."""
    if address.startswith("http"):
        raise PsyrayError(
            f"{address} takes jobs only: `ray job submit --working-dir . -- python -m psyray run ...`; for a run on "
            "this machine unset RAY_ADDRESS, for one from here HOST:6379 is the address"
        )
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdigit()):
        return  # `auto` and the like
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise PsyrayError(
            f"no Ray at {address}: {error}; start one there (`ray start --head`), or mend cluster.address or "
            "RAY_ADDRESS"
        ) from error


def knock() -> None:
    """PsyrayError where `ray.init()` would go to the Ray of the last `ray start` here, and nobody listens there.

    A Ray that was killed leaves its address behind, and Ray alone asks there without an end.
    """
    import ray
    from ray._private.services import find_bootstrap_address

    if ray.is_initialized() or os.environ.get("RAY_ADDRESS", "auto") not in ("", "auto"):
        return
    if address := find_bootstrap_address(None):
        try:
            _knock(address)
        except PsyrayError as error:
            raise PsyrayError(
                f"{str(error).partition(';')[0]}; the last `ray start` on this machine left that address. "
                "RAY_ADDRESS=local starts a Ray of its own, RAY_ADDRESS=HOST:6379 names another"
            ) from error


def _lock() -> None:
    """Let none into the private session but its own processes: Ray's ports listen beyond loopback, and take code."""
    if "RAY_AUTH_MODE" in os.environ:
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:  # and not in a file of the home folder, as Ray would have it
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    from ray._raylet import Config  # type: ignore[attr-defined]  # of a compiled module

    Config.initialize("")  # the mode was read when ray was imported


def _quiet_data() -> None:
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.issue_detectors_config.detectors = []
    for name in ("ray", "ray.llm", "ray.train", "ray._private.worker"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Without a handler here each module of ray.llm takes one of its own, at the level INFO.
    logging.getLogger("ray.llm").addHandler(logging.NullHandler())
    # It logs pages for each exception that it raises as well.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def gpus_here() -> int:
    """The NVIDIA devices that this process may use; the driver's files say so without the seconds that torch takes."""
    devices = len(list(Path("/dev").glob("nvidia[0-9]*")))
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return devices if allowed is None else min(devices, len(list(filter(None, allowed.split(",")))))


def slots(config: Config) -> int:
    """The CPUs that a Ray started here is told of: whatever works on a GPU takes one beside it."""
    return config.cluster.logical_cpus + gpus_here()


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA device."""
    return gpus_here() > 0


def use_gpu(device: str) -> bool:
    """Whether work goes to GPUs: the setting, or for `auto` whether the Ray cluster has any."""
    if device != "auto":
        return device == "gpu"
    import ray

    return bool(ray.cluster_resources().get("GPU", 0)) if ray.is_initialized() else has_gpu()


def nodes() -> list[Bundle]:
    """The resources of each node of the cluster that this process is attached to, held by others or not."""
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def at_hand(config: Config) -> tuple[list[Bundle], str]:
    """The nodes that a run with these settings would find, and what they are; PsyrayError where nobody can tell."""
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if not address:
        here = {"CPU": slots(config), "GPU": gpus_here()}
        return [here], "the Ray that would be started on this machine"
    if address.startswith("http"):
        raise PsyrayError(f"{address} takes jobs only; submit the dry run as a job to learn of its nodes")
    with ray_session(config):
        found = nodes()
        return found, f"the Ray at {address}, {len(found)} nodes"


def _say(line: str) -> None:
    print(line, flush=True)  # a job's output is a file, which would keep it until the wait is over


def require(bundles: Sequence[Bundle], wait_s: float, what: str, say: Callable[[str], None] = _say) -> None:
    """Wait until the cluster has room for the bundles that nobody else holds, asking an autoscaler for it.

    It says what it waits for while it does. PsyrayError that names the missing resource after `wait_s` seconds.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    began, asked = time.monotonic(), False
    deadline, due = began + wait_s, began + TOLD_AFTER_S
    try:
        while lacking := missing(bundles, nodes(), ray.available_resources()):
            now = time.monotonic()
            if now >= due:
                due = now + TOLD_EVERY_S
                say(
                    f"{what} waits for room: the cluster lacks {lacking} after {now - began:.0f} s; it stops after "
                    f"{wait_s:.0f} s (cluster.wait_s). Add nodes, end what holds them, or stop and ask for less"
                )
            if not asked:
                request_resources(bundles=[{name: ceil(n) for name, n in bundle.items()} for bundle in bundles])
                asked = True
            if now > deadline:
                raise PsyrayError(
                    f"{what} cannot be placed: the cluster lacks {lacking} after {wait_s:.0f} s; "
                    "add nodes, ask for less, or raise cluster.wait_s"
                )
            time.sleep(min(0.2, wait_s))
    finally:
        if asked:
            request_resources(bundles=[])

"""A Ray of its own in another process, with a dashboard that asks for a token, as an operator starts one."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

HOLD = """
import socket
import sys
from ray.cluster_utils import Cluster

with socket.socket() as one, socket.socket() as other:  # the usual ports are taken where another Ray runs
    ports = []
    for free in (one, other):
        free.bind(("127.0.0.1", 0))
        ports.append(free.getsockname()[1])
head = {"num_cpus": 4, "include_dashboard": True, "object_store_memory": 100 * 2**20}
head |= {"dashboard_port": ports[0], "dashboard_agent_listen_port": ports[1]}
cluster = Cluster(initialize_head=True, head_node_args=head)
print("dashboard", cluster.head_node.webui_url, flush=True)
sys.stdin.read()  # until the test is over
cluster.shutdown()
"""


@contextmanager
def held_ray(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(dashboard, token) of a Ray whose processes have this environment besides their own."""
    token = secrets.token_hex(32)
    whole = {**os.environ, **environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    command, pipe = [sys.executable, "-c", HOLD], subprocess.PIPE
    holder = subprocess.Popen(command, env=whole, text=True, stdin=pipe, stdout=pipe)
    assert holder.stdout
    try:
        address = next(line for line in holder.stdout if line.startswith("dashboard ")).split()[1]
        yield f"http://{address}", token
    finally:
        holder.communicate(timeout=60)

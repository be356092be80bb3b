"""The Ray that a run starts for itself: its ports listen beyond loopback, so nothing answers without its token."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import grpc
import psutil
import pytest
from ray import serve

ATTACH = "import ray, sys; ray.init(address=sys.argv[1], logging_level='ERROR'); print(len(ray.nodes()))"
PORT_CALL = "/ray.serve.ASGIService/HandleRequest"  # what a port of Ray Serve sends to a replica: pickled arguments


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Replica:
    """A replica that tells where it runs."""

    def process(self) -> int:
        return os.getpid()


@pytest.fixture
def replica(ray_cluster: None) -> Iterator[psutil.Process]:
    """The process of a replica under Serve."""
    handle = serve.run(Replica.bind(), name="private", route_prefix=None)
    yield psutil.Process(handle.process.remote().result(timeout_s=60))
    serve.shutdown()


def attach(address: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", ATTACH, address], env=environment, capture_output=True, text=True)


def test_only_a_process_with_the_token_joins(ray_cluster: None) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    stranger = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    assert attach(address, dict(os.environ)).stdout.strip() == "1"
    for mode in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}):
        refused = attach(address, stranger | mode)
        assert refused.returncode and not refused.stdout


def test_a_replicas_own_port_answers_nobody_without_the_token(replica: psutil.Process) -> None:
    ports = {at.laddr.port for at in replica.net_connections("tcp") if at.status == psutil.CONN_LISTEN}
    codes = {}
    for port in ports:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(PORT_CALL)(b"", timeout=30)
        codes[port] = refused.value.code()
    assert set(codes.values()) <= {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}
    assert grpc.StatusCode.UNAUTHENTICATED in codes.values()

"""A Ray cluster of a head without CPUs and three small nodes, which loses a node when it is told to; for tests only.

Run as a program of its own by test_nodes.py, since a process has one Ray:

    address ADDRESS            is printed when it is up
    TITLE                      read: the node with a process of that title is killed, with all that runs on it
    lost TITLE                 the answer, or `none TITLE` where no node has one
"""

from __future__ import annotations

import sys
from typing import Any

import psutil
from ray.cluster_utils import Cluster

NODES, CPUS = 3, 2
STORE = 80 * 2**20  # bytes


def holder(nodes: list[Any], title: str) -> Any:
    """The node on which a process with the title runs, and what runs there; None where there is none."""
    for node in nodes:
        below = psutil.Process(raylet(node)).children(recursive=True)
        if any(title in name(child) for child in below):
            return node, below
    return None


def raylet(node: Any) -> int:
    [found] = node.all_processes["raylet"]
    return int(found.process.pid)


def name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it ended while it was looked at
        return ""


def lose(cluster: Any, nodes: list[Any], title: str) -> str:
    if (found := holder(nodes, title)) is None:
        return f"none {title}"
    node, below = found
    for process in below:
        process.kill()
    cluster.remove_node(node, allow_graceful=False)
    nodes.remove(node)
    return f"lost {title}"


def main() -> None:
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=CPUS, object_store_memory=STORE) for _ in range(NODES)]
    print(f"address {cluster.address}", flush=True)
    for line in sys.stdin:  # until the test is over
        print(lose(cluster, nodes, line.strip()), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()

"""A run on three simulated nodes that loses one while it samples and one while it trains: does it end without help?

    python benchmarks/nodes.py
    python benchmarks/nodes.py --keep /data/nodes      # the run folder and its log stay

`ray.cluster_utils.Cluster` starts a head without CPUs, where the driver is, and three nodes of --cpus logical CPUs.
The run of benchmarks/kills.py, one round of it, attaches to it. The node that holds the vLLM engine is killed (its
raylet and all under it, SIGKILL) while round 0 is sampled; the node that holds the training worker is killed once
the round's policy has taken a step. Nothing else is done. Exit status 1 where the run does not end by itself, an id is
missing or there twice, or a label was bought twice.

It takes about three minutes, too long for the tests; tests/integration/test_nodes.py loses one node under one stage.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from apart import folder, verdict
from endpoint import served
from kills import Attempt, contents, end, ledger, say, settings, tiny_model


@dataclass(frozen=True)
class Blow:
    """When a node is lost: the one that holds the process of that title, once the stage has left such a file."""

    name: str
    title: str
    stage: str
    sign: str


BLOWS = (
    Blow("sampling", "vLLM", "round-0/samples", "todo.arrow"),
    Blow("training", "TrainWorker", "round-1/policy", "steps.jsonl"),
)


def holder(nodes: list[Any], title: str) -> Any:
    """The node on which a process with the title runs; None where there is none."""
    for node in nodes:
        [raylet] = node.all_processes["raylet"]
        for child in psutil.Process(raylet.process.pid).children(recursive=True):
            try:
                if title in " ".join(child.cmdline()):
                    return node
            except psutil.Error:  # it ended while it was looked at
                continue
    return None


def lose(cluster: Any, node: Any) -> None:
    """Kill a node with all that runs on it, as if its machine had gone."""
    [raylet] = node.all_processes["raylet"]
    end(psutil.Process(raylet.process.pid).children(recursive=True))
    cluster.remove_node(node, allow_graceful=False)


def at_work(blow: Blow, nodes: list[Any], held: list[Any], attempt: Attempt) -> bool:
    """Whether it is time for the blow; `held` gains the node that it hits."""
    signs = (attempt.home / "run/stages" / blow.stage).glob(f"*/{blow.sign}")
    if attempt.stage() == blow.stage and any(signs) and (node := holder(nodes, blow.title)):
        held.append(node)
    return bool(held)


def proof(path: Path, cpus: int) -> int:
    """Run, lose two nodes, audit."""
    import yaml
    from ray.cluster_utils import Cluster

    home = path / "run-on-nodes"
    home.mkdir(parents=True)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=cpus, object_store_memory=100 * 2**20) for _ in range(3)]
    lost: list[dict[str, Any]] = []
    try:
        with served(say, 0.05) as endpoint:
            tree = settings(tiny_model(path / "model"), endpoint.url, rounds=1)
            tree["cluster"] = {"address": cluster.address}
            tree["dpo"]["train"] |= {"epochs": 10}  # steps enough to be hit between two
            (path / "run.yaml").write_text(yaml.safe_dump(tree))
            attempt = Attempt.start(home)
            for blow in BLOWS:
                held: list[Any] = []
                if not attempt.wait(partial(at_work, blow, nodes, held)):
                    break
                lose(cluster, held[0])
                nodes.remove(held[0])
                lost.append({"while": blow.name, "after_s": round(time.time() - attempt.began)})
                print(f"a node is lost while {blow.name}, {lost[-1]['after_s']} s into the run", flush=True)
            attempt.wait()
            seconds = round(time.time() - attempt.began)
            calls = endpoint.calls["judge"].total()
    finally:
        cluster.shutdown()
    return report(home, lost, seconds, calls)


def report(home: Path, lost: list[dict[str, Any]], seconds: int, calls: int) -> int:
    """Print the figures and what is wrong; the exit status."""
    ids, bought = contents(home), ledger(home)
    twice = {name: most for name, rows in ids.items() if (most := max(Counter(rows).values(), default=0)) > 1}
    figures = {
        "seconds": seconds,
        "lost": lost,
        "ids": sum(map(len, ids.values())),
        "questions": len(bought),
        "ledger: calls": sum(attempts for _, _, attempts, _ in bought.values()),
        "endpoint: calls": calls,
    }
    wrong = [f"ids twice in {name}" for name in twice]
    if len(lost) < 2:
        wrong.append(f"only {len(lost)} of 2 nodes were lost before the run ended")
    if not (home / "run/champion.json").exists():
        wrong.append("there is no champion")
    if any(state != ("answered", 1, state[2], 1) for state in bought.values()):
        wrong.append("a question has no answer, or was bought twice")
    return verdict(figures, wrong, "the run ended by itself, every id once, every label once")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpus", type=int, default=4, help="of each node: slots for light tasks, not cores")
    parser.add_argument("--keep", type=Path, help="an empty folder for run and log; none: a temporary one")
    args = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    with folder(args.keep) as place:
        return proof(place, args.cpus)


if __name__ == "__main__":
    sys.exit(main())

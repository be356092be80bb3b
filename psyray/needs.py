"""What each kind of stage asks Ray for: the stages ask by it, and `psyray run --dry-run` explains by it.

A need is a list of bundles. A bundle has to lie on one node; two bundles may lie on two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from psyray.sections.data import EngineSection
from psyray.sections.learning import TrainSection

Bundle = Mapping[str, float]  # resource -> how much

LIGHT: Bundle = {"CPU": 0.25}  # the tasks around an engine that read and convert rows
TASK: Bundle = {"CPU": 1}  # one task of the speeches, and room for what rates by rule or asks an endpoint


def workers(section: EngineSection) -> int:
    """How many GPUs, or CPUs, one engine spreads its model over."""
    parallel = section.kwargs.get("tensor_parallel_size", section.tensor_parallel)
    return int(parallel * section.kwargs.get("pipeline_parallel_size", 1))


def engine(section: EngineSection, gpu: bool) -> list[Bundle]:
    """vLLM on Ray Data: each replica with all its workers on one node, and the light tasks beside."""
    replica: Bundle = {"GPU": workers(section), "CPU": 1} if gpu else {"CPU": workers(section)}
    return [replica] * section.replicas + [LIGHT]


def scoring(section: EngineSection, gpu: bool) -> list[Bundle]:
    """The reward model on Ray Data: an actor for each replica of the engine, and the light tasks beside."""
    worker: Bundle = {"GPU": 1, "CPU": 1} if gpu else {"CPU": 1}
    return [worker] * section.replicas + [LIGHT]


def training(section: TrainSection, gpu: bool) -> list[Bundle]:
    """Ray Train: the workers."""
    return [{"GPU": 1} if gpu else {"CPU": 1}] * section.workers


def forward(gpu: bool) -> list[Bundle]:
    """The one task that tells how likely models find texts."""
    return [{"GPU": 1, "CPU": 1} if gpu else {"CPU": 1}]


def serving(section: EngineSection, gpu: bool, reward_gpus: float = 0) -> list[Bundle]:
    """Ray Serve: one replica of the policy's engine and one of the reward model."""
    reward: Bundle = {"CPU": 0.5, "GPU": reward_gpus} if reward_gpus else {"CPU": 0.5}
    return [*([{"GPU": 1} if gpu else {"CPU": 1}] * workers(section)), reward]


def total(bundles: Iterable[Bundle]) -> dict[str, float]:
    """The sum of the bundles by resource."""
    summed = Counter[str]()
    for bundle in bundles:
        summed.update(bundle)
    return dict(summed)


def homeless(bundles: Sequence[Bundle], nodes: Sequence[Bundle]) -> list[Bundle]:
    """The bundles that find no room, the largest placed first, each on the first node that holds it."""
    free = [dict(node) for node in nodes]
    left: list[Bundle] = []
    for bundle in sorted(bundles, key=lambda b: (-b.get("GPU", 0), -b.get("CPU", 0))):
        room = next((n for n in free if all(n.get(name, 0) >= count for name, count in bundle.items())), None)
        if room is None:
            left.append(bundle)
            continue
        for name, count in bundle.items():
            room[name] -= count
    return left


def missing(bundles: Sequence[Bundle], nodes: Sequence[Bundle], free: Bundle | None = None) -> str:
    """What the nodes lack for the bundles, in words; empty where all find room.

    `nodes` are each node's resources, held by others or not; `free` is what nobody holds, summed over the nodes.
    """
    needed, have = total(bundles), total(nodes)
    free = have if free is None else free
    lacking = []
    for name, count in needed.items():
        # Shares of a CPU add up with an error of rounding.
        if free.get(name, 0) + 1e-6 < count:
            busy = have.get(name, 0) - free.get(name, 0)
            lacking.append(f"{count:g} {name} (has {have.get(name, 0):g}{f', {busy:g} busy' if busy > 1e-6 else ''})")
    if lacking:
        return ", ".join(lacking)
    left = homeless(bundles, nodes)
    return f"a node with {spelt(left[:1])} free for {len(left)} of {len(bundles)} bundles" if left else ""


def spelt(bundles: Sequence[Bundle]) -> str:
    """The bundles in words: `8 x (1 GPU + 1 CPU), 0.25 CPU`."""
    kinds = Counter(tuple(bundle.items()) for bundle in bundles)
    words = []
    for kind, times in kinds.items():
        parts = " + ".join(f"{count:g} {name}" for name, count in kind)
        words.append(parts if times == 1 else f"{times} x ({parts})" if len(kind) > 1 else f"{times} x {parts}")
    return ", ".join(words)

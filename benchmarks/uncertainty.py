"""Which spread knows where the reward is wrong? Every kind of heads, and LoRA adapters, on a human-labelled set.

    python benchmarks/uncertainty.py --data FOLDER
    python benchmarks/uncertainty.py --data FOLDER --train 20 --test 10 --kinds ensemble laplace --path KEPT

FOLDER holds the labelled set that --set declares (default: PAIR, configs/agreement/tiers.yaml). --train of its prompts,
with --pairs of their pairs each, train a reward model; all pairs of --test others measure it. Each kind is `psyray run
--until reward-heads` in one run folder, so that all kinds of a seed share reward model and features; `adapters` trains
--adapters LoRA adapters of that reward model and fits the heads on each one's features.

`spread`, `closeness` (a small mean margin, for which no ensemble is needed) and `ratio` (spread by mean margin) are the
probability that a pair ranked wrong has more of it than one ranked right: 0.5 is a coin. Intervals are 95 %, clustered
by prompt, over the first seed's held-out pairs; with more seeds the table has the means. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from apart import ROOT, folder, psyray_run

KINDS = ("ensemble", "laplace", "mlp", "adapters")
SIGNALS = ("spread", "closeness", "ratio")


def write_sets(args: argparse.Namespace, place: Path, seed: int) -> None:
    """The set's prompts as two data sets of ready pairs, `train.jsonl` and `test.jsonl`."""
    from psyray.evaluate.labelled import load_labelled
    from psyray.records import Verdict, client_words

    _, items, _ = load_labelled(args.set, args.data)
    by_prompt = defaultdict(list)
    for item in items:
        if item.human in (Verdict.A, Verdict.B):
            better, worse = (item.a, item.b) if item.human is Verdict.A else (item.b, item.a)
            row = {"question": client_words(item.messages), "chosen": better, "rejected": worse}
            by_prompt[item.speech_id].append(row)
    rng = np.random.default_rng(seed)
    order = rng.permutation(sorted(by_prompt)).tolist()
    if len(order) < args.train + args.test:
        sys.exit(f"the set has {len(order)} prompts with decided pairs, fewer than --train and --test together")
    for name, prompts in {"train": order[: args.train], "test": order[args.train :][: args.test]}.items():
        rows = []
        for prompt in prompts:
            pairs = by_prompt[prompt]
            kept = rng.permutation(len(pairs))[: args.pairs if name == "train" else None]
            rows += [pairs[n] for n in sorted(kept)]
        (place / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def settings(args: argparse.Namespace, place: Path, seed: int, kind: str) -> dict[str, Any]:
    """A run that ends with its first heads."""
    train = {"micro_batch": 4, "batch_size": 8, "max_length": 320, "save_every": 1000}
    adapters = {"count": args.adapters, "train": train | {"learning_rate": args.adapter_rate}}
    return {
        "run": {"path": str(place / "run"), "seed": seed},
        "speeches": {
            "sources": [
                {"name": side, "path": str(place / f"{side}.jsonl"), "use": "pairs", "side": side}
                for side in ("train", "test")
            ],
            "scrub": "off",
            "near_duplicates": None,
            "min_chars": 1,
        },
        "track": {"uri": None},
        "reward": {
            "train": train | {"learning_rate": args.rate, "epochs": args.epochs},
            "adapters": adapters if kind == "adapters" else {},
            "heads": {"kind": "ensemble" if kind == "adapters" else kind, "count": args.heads},
        },
    }


def heads_of(args: argparse.Namespace, place: Path, seed: int, kind: str) -> dict[str, Any]:
    """What the stage says of its heads, and the seconds of the stages that this kind alone needs."""
    from psyray.run import read_stages

    psyray_run(settings(args, place, seed, kind), place, kind, "--until", "reward-heads")
    stages = {stage.name: stage for stage in read_stages(place / "run")}
    own = ("reward-adapters", "reward-features") if kind == "adapters" else ()
    seconds = sum(float(stages[name].manifest["seconds"]) for name in (*own, "reward-heads"))
    return {**stages["reward-heads"].stats, "seconds": round(seconds, 1)}


def row_of(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One kind's figures: means over the seeds, intervals of the first."""
    names = ("accuracy", "alike_accuracy", "log_likelihood", "ece")
    row: dict[str, Any] = {name: fmean(stats["metrics"][name] for stats in found) for name in names}
    row["accuracy_interval"] = [found[0]["metrics"][f"accuracy_{end}"] for end in ("low", "high")]
    for signal in SIGNALS:
        told = [stats["doubt"]["tells_errors"][signal] for stats in found]
        row[signal] = fmean(one["value"] for one in told)
        row[f"{signal}_interval"] = [told[0]["low"], told[0]["high"]]
    return row | {"groups": found[0]["doubt"]["groups"], "seconds": [stats["seconds"] for stats in found]}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures as lines of text."""
    lines = [
        f"{'kind':10} {'accuracy':>21} {'alike':>6} {'log-lik':>8} {'ECE':>6}"
        + "".join(f" {signal:>21}" for signal in SIGNALS)
        + f" {'s':>6}"
    ]
    for kind, row in rows.items():
        shown = [
            f"{row[name]:.3f} ({row[f'{name}_interval'][0]:.3f}, {row[f'{name}_interval'][1]:.3f})"
            for name in ("accuracy", *SIGNALS)
        ]
        lines.append(
            f"{kind:10} {shown[0]:>21} {row['alike_accuracy']:6.3f} {row['log_likelihood']:8.3f} {row['ece']:6.3f}"
            + "".join(f" {cell:>21}" for cell in shown[1:])
            + f" {fmean(row['seconds']):6.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder that the set's paths start from")
    parser.add_argument("--set", type=Path, default=ROOT / "configs/agreement/tiers.yaml", help="the labelled set")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", type=int, default=1, help="each draws other prompts and trains anew")
    parser.add_argument("--train", type=int, default=60, help="prompts that train")
    parser.add_argument("--pairs", type=int, default=4, help="pairs of each of them")
    parser.add_argument("--test", type=int, default=60, help="prompts whose pairs measure, all of them")
    parser.add_argument("--rate", type=float, default=2e-5, help="learning rate of the reward model")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--heads", type=int, default=12, help="heads of each kind; a multiple of --adapters")
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--adapter-rate", type=float, default=1e-4)
    parser.add_argument("--path", type=Path, help="a folder where the runs are kept; none: a temporary one")
    args = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in args.kinds}
    with folder(args.path) as home:
        for seed in range(args.seeds):
            place = home / f"seed-{seed}"
            place.mkdir(exist_ok=True)
            write_sets(args, place, seed)
            for kind in args.kinds:
                found[kind].append(heads_of(args, place, seed, kind))
                print(f"seed {seed} {kind}: {found[kind][-1]['seconds']:.0f} s", file=sys.stderr)
    rows = {kind: row_of(stats) for kind, stats in found.items()}
    print(table(rows))
    pairs = {name: found[args.kinds[0]][0][name] for name in ("train_pairs", "test_pairs")}
    length = found[args.kinds[0]][0]["metrics"]["length_accuracy"]
    print(json.dumps({**pairs, "length_accuracy": length, "kinds": rows}))


if __name__ == "__main__":
    main()

"""Do active labels make a better policy? Win rate under a gold reward that the loop never sees, by labels spent.

    python benchmarks/policy_proof.py --data FOLDER                              # drts beside random, 3 seeds
    python benchmarks/policy_proof.py --data FOLDER --arms random drts offline   # and one round with the whole budget
    python benchmarks/policy_proof.py --data FOLDER --heads laplace --arms random v_optimal  # see the posterior itself
    python benchmarks/policy_proof.py --data FOLDER --seeds 1 --rounds 1 --speeches 40 --prompts 12 --budget 8

FOLDER holds the labelled set that --set declares (default: PAIR, configs/agreement/tiers.yaml).

The gold reward is a ridge head on features of a frozen model (the mean of layer 20 of the embedded model), fitted to
what people said of human replies; a fifth of its prompts is kept to tell how often it agrees with people. The loop
gets it as an oracle only: an HTTP judge in this process that answers with a number from 000 to 999, as three ratings
under a rubric of its own, so that every label is a row of the ledger and no part of psyray knows what is behind it.

For every seed the arms share their start: the first responses, their ratings (two for each of --speeches) and a reward
model trained on them. From there each goes its own way in --rounds rounds of --budget labels, chosen by the
acquisition function that names the arm; `offline` is one round with as many prompts and labels as all rounds together,
chosen at random from what policy 0 says. The reward model labels nothing, so that labels are all that a policy learns
from. After each round the policy answers the held-out speeches, and gold says which of its answer and policy 0's is
better.

The win rates are means over the seeds with the lowest and the highest. The difference from random is taken seed by
seed; its interval is 95 % of Student's t over the seeds, wide with three. An interval that holds 0 shows nothing and
is reported all the same. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import yaml
from apart import ROOT, folder, psyray_run
from endpoint import judge_reader, served

BASELINE, OFFLINE = "random", "offline"
DIGITS = {"hundreds": 100, "tens": 10, "ones": 1}
SPREADS = 4.0  # standard deviations of gold over people's replies from the lowest number to the middle

RUBRIC = {
    "name": "gold",
    "scale": [0, 9],
    "principles": {
        key: {"name": key, "weight": weight, "guidance": "A digit of the gold reward."}
        for key, weight in DIGITS.items()
    },
    "prompt": "Give the gold reward.\n\n{conversation}\n\nCounsellor's response:\n{response}",
    "json_instruction": "Answer with one JSON object: the keys are {keys}, each value a digit from {low} to {high}.",
}


# ---------------------------------------------------------------- gold


class Gold:
    """A reward learnt from people's choices; `accuracy` is on the prompts that it did not see."""

    def __init__(self, declaration: Path, data: Path, limit: int) -> None:
        from psyray.active.efficiency import split
        from psyray.active.replay import Learner, accuracies
        from psyray.evaluate.label_efficiency import featured
        from psyray.evaluate.labelled import load_labelled
        from psyray.models import resolve_model
        from psyray.reward.body import Body, Reading
        from psyray.sections.learning import EfficiencySection

        section = EfficiencySection()
        declared, items, _ = load_labelled(declaration, data)
        kept = set(sorted({item.speech_id for item in items})[:limit])
        prompts, bank = featured([item for item in items if item.speech_id in kept], section)
        train, test = split(range(len(prompts)), 0.8, 0, bank.conversation_P)
        learner = Learner()
        self.project = learner.project(bank.rows(train))
        z_PKR = self.project(bank.features_PKD)
        prompt_N, better_N, worse_N = bank.rows(train).pairs()
        x_NR = z_PKR[train][prompt_N, better_N] - z_PKR[train][prompt_N, worse_N]
        belief = learner.believe(x_NR, None, z_PKR.shape[2], 0)
        by_stratum = accuracies(belief, z_PKR[test], bank.rows(test))
        self.accuracy = dict(zip(bank.strata, map(float, by_stratum), strict=True))
        self.weights_R, self.set = belief.weights_D, declared.name
        scores_PK = z_PKR @ self.weights_R
        self.middle, self.spread = float(np.nanmean(scores_PK)), float(np.nanstd(scores_PK))
        reading = Reading(section.layer, section.pooling)
        self.body = Body(resolve_model(section.model), [reading], max_length=1024, batch_size=1)
        self.known: dict[str, int] = {}
        self.lock = threading.Lock()
        self.read: Any = None

    def number(self, conversation: str, response: str) -> int:
        """The gold reward as a whole number from 0 to 999."""
        chat = [{"role": "user", "content": conversation}, {"role": "assistant", "content": response}]
        key = json.dumps(chat)
        with self.lock:  # one at a time: the machine has work to do beside it
            if key not in self.known:
                score = float(self.project(self.body.features([chat]))[0] @ self.weights_R)
                place = (score - self.middle) / (SPREADS * self.spread)
                self.known[key] = min(999, max(0, round(500 + 500 * place)))
        return self.known[key]

    def say(self, model: str, prompt: str) -> str:
        """The answer of the endpoint."""
        number = self.number(*self.read(prompt))
        return json.dumps({key: number // weight % 10 for key, weight in DIGITS.items()})


# ---------------------------------------------------------------- the arms


def settings(args: argparse.Namespace, place: Path, url: str, seed: int, arm: str) -> dict[str, Any]:
    """One arm of one seed: a run of its own in the seed's folder, where it finds what it shares with the others."""
    offline = arm == OFFLINE
    whole = args.rounds if offline else 1
    sampling = {"max_tokens": args.tokens, "temperature": 0.8, "stop": ["\n"]}
    train = {"micro_batch": 4, "batch_size": 4, "max_length": 448}
    return {
        "run": {"path": str(place / f"seed-{seed}"), "seed": seed},
        "rubric": str(place / "gold.yaml"),
        "ledger": {"url": f"sqlite:///{place}/labels-{seed}-{arm}.db"},  # no arm reads another's labels
        "track": {"uri": f"sqlite:///{place}/mlflow.db"},
        "speeches": {"max_chars": 400, "test_share": 0.5, "limit": args.speeches},
        "engine": {"max_num_seqs": 128},
        "responses": {"k": 2, "responders": [{"name": "start", **sampling}]},
        "judge": {"engine": "http", "model": "gold", "url": url},
        "pairs": {"gap": 0.2, "veto": []},
        "reward": {"train": train | {"learning_rate": 1e-4, "freeze_layers": 26}, "heads": {"kind": args.heads}},
        "policy": sampling,
        "dpo": {"train": train | {"learning_rate": args.rate, "freeze_layers": 18, "epochs": args.epochs}},
        "loop": {
            "rounds": args.rounds // whole,
            "prompts": args.prompts * whole,
            "k": args.k,
            "acquisition": BASELINE if offline else arm,
            "budget": args.budget * whole,
            "reward_pairs": 0,
            "replay": 0 if offline else args.budget * args.rounds,
        },
        # The gate is held open: a policy that got worse is a finding.
        "evaluate": {
            "min_win_rate": 0.0, "max_length_change": 99.0, "max_repeat_rise": 1.0, "max_truncated_rise": 1.0,
            "probe": None,
        },
    }  # fmt: skip


def run_arm(tree: Mapping[str, Any], place: Path, name: str) -> list[dict[str, Any]]:
    """Run the arm to its end; what each of its rounds reached."""
    from psyray.run import read_stages

    psyray_run(tree, place, name)
    stages = {stage.name: stage for stage in read_stages(Path(tree["run"]["path"]))}
    spent, reached = 0, []
    for number in range(1, tree["loop"]["rounds"] + 1):
        stats = stages[f"round-{number}/gate"].stats
        spent += stages[f"round-{number}/labels"].stats["bought"]
        reached.append({
            "round": number,
            "labels": spent,
            "win_rate": stats["win_rate"],
            "length_controlled": stats["length_controlled"],
            "length_change": stats["length_change"],
            "gold": stats["mean_score"] - stages["round-0/gate"].stats["mean_score"],
            "agreement": stages[f"round-{number}/labels"].stats["agreement"],
        })  # fmt: skip
    return reached


# ---------------------------------------------------------------- the figures


def around(values: Sequence[float]) -> list[float]:
    """[lowest, mean, highest]."""
    return [min(values), fmean(values), max(values)]


def interval(values: Sequence[float]) -> list[float | None]:
    """[low, mean, high]: 95 % of Student's t; no ends for a single value."""
    from scipy.stats import t

    if len(values) < 2:
        return [None, values[0], None]
    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return [fmean(values) - half, fmean(values), fmean(values) + half]


def summary(found: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> dict[str, Any]:
    """By arm a row for each round: means over seeds, and the difference from random at the last."""
    arms: dict[str, Any] = {}
    for arm, seeds in found.items():
        rounds = [
            {"labels": [row["labels"] for row in rows]}
            | {key: around([row[key] for row in rows]) for key in ("win_rate", "length_controlled", "gold")}
            for rows in zip(*seeds, strict=True)
        ]
        arms[arm] = {"rounds": rounds}
        if arm != BASELINE and BASELINE in found:
            pairs = list(zip(seeds, found[BASELINE], strict=True))
            arms[arm]["ahead_of_random"] = interval([a[-1]["win_rate"] - b[-1]["win_rate"] for a, b in pairs])
    return arms


def table(arms: Mapping[str, Any]) -> str:
    """The figures as lines of text."""
    lines = [f"{'arm':12} {'round':>5} {'labels':>8}  win rate (range)        equal length   gold"]
    for arm, told in arms.items():
        for number, row in enumerate(told["rounds"], 1):
            low, mean, high = row["win_rate"]
            lines.append(
                f"{arm:12} {number:5} {max(row['labels']):8}  {mean:.3f} ({low:.3f} to {high:.3f})  "
                f"{row['length_controlled'][1]:12.3f}   {row['gold'][1]:+.3f}"
            )
        if "ahead_of_random" in told:
            low, mean, high = told["ahead_of_random"]
            ends = "one seed: no interval" if low is None else f"{low:+.3f} to {high:+.3f}"
            lines.append(f"{'':12} ahead of random at the end: {mean:+.3f} ({ends})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder that the set's paths start from")
    parser.add_argument("--set", type=Path, default=ROOT / "configs/agreement/tiers.yaml", help="the labelled set")
    parser.add_argument(
        "--gold-prompts", type=int, default=100, help="of the set, for gold; features cost a second for two replies"
    )
    parser.add_argument("--arms", nargs="+", default=[BASELINE, "drts"], help=f"acquisition functions, and {OFFLINE}")
    parser.add_argument(
        "--heads", choices=["ensemble", "laplace", "mlp"], default="ensemble", help="reward.heads.kind of all arms"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=24, help="speeches of a round")
    parser.add_argument("--k", type=int, default=4, help="answers to each")
    parser.add_argument("--budget", type=int, default=16, help="labels of a round: comparisons, of two ratings each")
    parser.add_argument("--speeches", type=int, default=120, help="in all; about half are held out for the win rates")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer, at most")
    parser.add_argument("--rate", type=float, default=8e-5, help="learning rate of DPO")
    parser.add_argument("--epochs", type=int, default=2, help="of DPO over a round's labels")
    parser.add_argument(
        "--path", type=Path, help="a folder for runs, where what is done is kept; none: a temporary one"
    )
    args = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    with folder(args.path) as place:
        (place / "gold.yaml").write_text(yaml.safe_dump(RUBRIC, sort_keys=False))
        print(json.dumps(proof(args, place)))


def proof(args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Every arm with every seed; prints the table, returns the figures."""
    from psyray.rubric import load_rubric

    gold = Gold(args.set, args.data, args.gold_prompts)
    gold.read = judge_reader(load_rubric(str(place / "gold.yaml")))
    agrees = ", ".join(f"{stratum} {share:.3f}" for stratum, share in gold.accuracy.items())
    print(f"gold agrees with people on prompts that it did not see: {agrees}", flush=True)
    found: dict[str, list[list[dict[str, Any]]]] = {arm: [] for arm in args.arms}
    kept = place / "port"  # the endpoint's address is part of what a judge is: another one is asked anew
    with served(gold.say, port=int(kept.read_text()) if kept.exists() else 0) as endpoint:
        kept.write_text(str(endpoint.server_address[1]))
        for seed in range(args.seeds):
            for arm in args.arms:
                tree = settings(args, place, endpoint.url, seed, arm)
                found[arm].append(run_arm(tree, place, f"{arm}-{seed}"))
                last = found[arm][-1][-1]
                print(f"seed {seed} {arm}: win rate {last['win_rate']:.3f}, {last['labels']} labels", flush=True)
    arms = summary(found)
    print(table(arms))
    return {"set": gold.set, "gold": gold.accuracy, "arms": arms, "seeds": found}


if __name__ == "__main__":
    main()

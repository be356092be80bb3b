"""Active online iterative DPO: the policy samples, the ensemble scores, the oracle labels what is worth asking.

A round's policy answers the held-out speeches (for its gate) and the next round's prompts in one engine start.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from psyray.active.acquisition import Candidates, acquire
from psyray.active.oracle_kinds import make_oracle
from psyray.config import Config
from psyray.data.generate import answer_all, draw_row, engine_identity
from psyray.data.judge import Desk
from psyray.errors import PsyrayError
from psyray.evaluate.gate import gate_stage
from psyray.models import model_identity, resolve_model
from psyray.policy.dpo import train_policy
from psyray.records import PAIRS, Row, Status, Verdict, content_id, pair_row
from psyray.reward.ensemble import features_stage, heads_stage, load_features, prompt_matrix, score_matrix, scores_stage
from psyray.reward.heads import Heads
from psyray.run import Artifact, Folder, Run


@dataclass(frozen=True)
class Policy:
    """A policy that rounds start from: the start itself (round 0) or a trained one."""

    round: int
    path: str
    identity: str


@dataclass
class Outcome:
    """Where the loop ended."""

    champion: Policy
    heads: Artifact
    gates: list[Artifact] = field(default_factory=list)


def online_loop(
    run: Run, config: Config, desk: Desk, speeches: Artifact, reward: Artifact, heads: Artifact, seen: Seen
) -> Outcome:
    """`loop.rounds` rounds from the start policy; a policy that fails its gate is kept, marked and not built upon."""
    start = policy = Policy(0, resolve_model(config.policy.model), model_identity(config.policy.model))
    samples = sample_stage(run, 0, config, speeches, policy, prompts_of=1, held_out=True)
    features = features_stage(run, "round-0/features", config, reward, samples.rows(), samples)
    scores = scores_stage(run, "round-0/scores", heads, features, samples)
    first = (samples, scores, gate_stage(run, 0, config, desk, samples, scores, None))
    outcome = Outcome(policy, heads, [first[2]])
    for number in range(1, config.loop.rounds + 1):
        labels = labels_stage(run, number, config, desk, outcome.heads, features, samples)
        seen = seen.with_round(features, labels)
        outcome.heads = heads_stage(run, f"round-{number}/heads", config, reward, seen.features, seen.pairs)
        trained = policy_stage(run, number, config, labels, seen, policy, start)

        samples = sample_stage(run, number, config, speeches, trained, prompts_of=number + 1, held_out=True)
        features = features_stage(run, f"round-{number}/features", config, reward, samples.rows(), samples)
        scores = scores_stage(run, f"round-{number}/scores", outcome.heads, features, samples)
        gate = gate_stage(run, number, config, desk, samples, scores, first)
        outcome.gates.append(gate)

        if gate.stats["passed"]:
            policy = outcome.champion = trained
        elif config.loop.on_gate_fail == "stop":
            break
        elif number < config.loop.rounds:
            reasons = "; ".join(gate.stats["reasons"])
            run.say(f"round {number} failed its gate ({reasons}): going on from round {policy.round}")
            samples = sample_stage(run, number, config, speeches, policy, prompts_of=number + 1, held_out=False)
            features = features_stage(run, f"round-{number}/features-again", config, reward, samples.rows(), samples)
    return outcome


@dataclass(frozen=True)
class Seen:
    """All features and labelled pairs so far: what heads are fitted on and replay draws from."""

    features: tuple[Artifact, ...]
    pairs: tuple[Artifact, ...]

    def with_round(self, features: Artifact, pairs: Artifact) -> Seen:
        """This and one round more."""
        return Seen((*self.features, features), (*self.pairs, pairs))


def prompts(speeches: Sequence[Row], number: int, config: Config) -> list[Row]:
    """The training speeches of a round: the next in an order drawn by the seed, from the start again at the end."""
    if number > config.loop.rounds:
        return []
    order = sorted((s for s in speeches if s["split"] == "train"), key=lambda s: s["speech_id"])
    random.Random(config.run.seed).shuffle(order)
    count = min(config.loop.prompts, len(order))
    return [order[((number - 1) * count + i) % len(order)] for i in range(count)]


def sample_stage(
    run: Run, number: int, config: Config, speeches: Artifact, policy: Policy, *, prompts_of: int, held_out: bool
) -> Artifact:
    """Answers of a policy: `loop.k` to each prompt of round `prompts_of`, one to each held-out speech."""
    rows = speeches.rows()
    test = [s for s in rows if s["split"] == "test"][: config.evaluate.speeches] if held_out else []
    identity = content_id(policy.identity, config.policy.model_dump(exclude={"model"}))
    name = f"policy-{policy.round}"

    def make(folder: Folder) -> Mapping[str, Any]:
        seeds = [(s, config.loop.k) for s in prompts(rows, prompts_of, config)] + [(s, 1) for s in test]
        base = config.run.seed * 1_000_003 + 10_007 * number
        draws = [draw_row(s, config.policy, identity, base + i, name) for s, k in seeds for i in range(k)]
        title = f"samples of round {number}"
        return answer_all(folder, lambda: draws, len(draws), config, title=title, model=policy.path)

    settings = {
        "policy": identity,
        "k": config.loop.k,
        "prompts": [s["speech_id"] for s in prompts(rows, prompts_of, config)],
        "test": [s["speech_id"] for s in test],
        "seed": config.run.seed,
        **engine_identity(config.engine),
    }
    return run.stage(f"round-{number}/samples" + ("" if held_out else "-again"), settings, [speeches], make)


def labels_stage(
    run: Run, number: int, config: Config, desk: Desk, heads: Artifact, features: Artifact, samples: Artifact
) -> Artifact:
    """The round's pairs: the oracle labels what acquisition picks, within the budget; the reward model the rest."""
    loop, oracle = config.loop, make_oracle(config, desk, run.say)

    def make(folder: Folder) -> Mapping[str, Any]:
        groups: dict[str, list[Row]] = {}
        for row in samples.rows():
            if row["split"] == "train" and row["status"] == Status.OK:
                groups.setdefault(row["speech_id"], []).append(row)
        ensemble, listed = Heads.load(heads.path / "heads.npz"), list(groups.values())
        known = load_features([features])
        scores_PKH = score_matrix(ensemble, known, groups, loop.k)
        candidates = Candidates(scores_PKH, prompts_PE=prompt_matrix(known, groups))
        rng = np.random.default_rng([config.run.seed, number])
        picks = acquire(loop.acquisition, candidates, loop.budget, rng, loop.apart)
        asked = [(listed[p.prompt][p.first], listed[p.prompt][p.second], p.value) for p in picks]
        labels, counts = oracle.label(
            folder, asked, purpose=f"round-{number}", strategy=loop.acquisition, budget=loop.budget
        )
        labelled_pairs, numbers = oracle_pairs(asked, labels, [_gap(scores_PKH, p) for p in picks])
        labelled = {p.prompt for p, given in zip(picks, labels, strict=True) if given}
        rest = reward_pairs(listed, scores_PKH.mean(axis=2), labelled, loop.reward_pairs, loop.reward_margin)
        parts = folder.parts(PAIRS, "pair_id")
        parts.append(labelled_pairs + rest)
        parts.finish()
        return counts | numbers | {"acquisition": loop.acquisition, "reward_labelled": len(rest)}

    settings = oracle.identity | {
        **{key: getattr(loop, key) for key in ("acquisition", "apart", "budget", "reward_margin", "reward_pairs", "k")},
        "seed": config.run.seed,
    }
    return run.stage(f"round-{number}/labels", settings, [heads, features, samples], make)


def _gap(scores_PKH: Any, pick: Any) -> float:
    return float(np.mean(scores_PKH[pick.prompt, pick.first] - scores_PKH[pick.prompt, pick.second]))


def oracle_pairs(
    asked: Sequence[tuple[Row, Row, float]], labels: Sequence[Any], gaps: Sequence[float]
) -> tuple[list[Row], dict[str, Any]]:
    """Pairs that the oracle decided, and counts; ties and invalid answers never become pairs."""
    pairs, agreed, ties, invalid = [], [], 0, 0
    for (a, b, _), given, gap in zip(asked, labels, gaps, strict=True):
        if given is None:
            continue
        verdict, margin, _ = given
        ties += verdict is Verdict.TIE
        invalid += verdict is Verdict.INVALID
        if verdict in (Verdict.A, Verdict.B):
            agreed.append((gap > 0) == (verdict is Verdict.A))
            chosen, rejected = (a, b) if verdict is Verdict.A else (b, a)
            pairs.append(pair_row(a, chosen, rejected, margin=abs(margin), source="oracle"))
    agreement = sum(agreed) / len(agreed) if agreed else None
    return pairs, {"ties": ties, "invalid": invalid, "agreement": agreement}


def reward_pairs(
    groups: Sequence[Sequence[Row]], mean_PK: Any, labelled: set[int], per_speech: int, margin: float
) -> list[Row]:
    """Pairs that the reward model labels in the speeches the oracle did not: the widest gaps above the margin."""
    pairs = []
    for p, responses in enumerate(groups):
        if p in labelled:
            continue
        gaps = [
            (float(mean_PK[p, i] - mean_PK[p, j]), i, j)
            for i in range(len(responses))
            for j in range(len(responses))
            if i != j and responses[i]["text"] != responses[j]["text"] and mean_PK[p, i] - mean_PK[p, j] > margin
        ]
        for gap, i, j in sorted(gaps, reverse=True)[:per_speech]:
            pairs.append(pair_row(responses[i], responses[i], responses[j], margin=gap, source="reward"))
    return pairs


def policy_stage(
    run: Run, number: int, config: Config, labels: Artifact, seen: Seen, policy: Policy, start: Policy
) -> Policy:
    """DPO on the round's pairs and some older ones; the policy that comes out."""
    reference = start if config.loop.reference == "initial" else policy
    settings = {
        "dpo": config.dpo.model_dump(),
        "system": config.policy.system,
        "replay": config.loop.replay,
        "policy": policy.identity,
        "reference": reference.identity,
        "seed": config.run.seed,
    }

    def make(folder: Folder) -> Mapping[str, Any]:
        fresh = labels.rows()
        pairs = fresh + replayed(seen.pairs[:-1], config.loop.replay, config.run.seed + number)
        if not pairs:
            raise PsyrayError(
                f"round {number} has no pair to train on: loop.budget is {config.loop.budget} and the reward model "
                f"labelled none above loop.reward_margin {config.loop.reward_margin}; raise one or lower the other"
            )
        random.Random(config.run.seed).shuffle(pairs)
        steps = train_policy(folder, config, pairs, policy.path, reference.path, title=f"policy of round {number}")
        return {"pairs": len(pairs), "fresh": len(fresh), "steps": steps}

    trained = run.stage(f"round-{number}/policy", settings, [labels, *seen.pairs[:-1]], make)
    return Policy(number, str(trained.model), trained.fingerprint)


def replayed(older: Sequence[Artifact], count: int, seed: int) -> list[Row]:
    """Up to `count` older training pairs that a judge or an oracle labelled."""
    rows = [r for artifact in older for r in artifact.rows() if r["split"] == "train" and r["source"] != "reward"]
    rows.sort(key=lambda r: r["pair_id"])
    return random.Random(seed).sample(rows, min(count, len(rows)))

"""Active online iterative DPO: the policy samples, the ensemble scores, the oracle labels what is worth asking.

A round's policy answers the held-out speeches (for its gate) and the next round's prompts in one engine start.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from psyray.active.labelling import labels_stage
from psyray.config import Config
from psyray.data.generate import answer_all, draw_row, engine_identity
from psyray.data.judge import Desk
from psyray.errors import PsyrayError
from psyray.evaluate.duels import second_stage
from psyray.evaluate.gate import Start, gate_stage
from psyray.evaluate.probe import probe_stage
from psyray.looks import read_choice
from psyray.models import model_identity, resolve_model
from psyray.policy.dpo import left_out, that_fit, train_policy
from psyray.records import Row, content_id
from psyray.reward.ensemble import features_stage, heads_stage, scores_stage
from psyray.run import Artifact, Folder, Run
from psyray.sections.learning import DpoSection, LoopSection


@dataclass(frozen=True)
class Policy:
    """A policy that rounds start from: the start itself (round 0) or a trained one."""

    round: int
    path: str
    identity: str


@dataclass
class Outcome:
    """Where the loop stands: the heads and what they saw, and each round's policy with its gate, the start's first."""

    heads: Artifact
    seen: Seen
    policies: list[Policy] = field(default_factory=list)
    gates: list[Artifact] = field(default_factory=list)

    def champion(self, loop: LoopSection) -> Policy:
        """The policy to export, by `loop.champion`."""
        return self.policies[chosen([gate.stats for gate in self.gates], loop.champion)]


def online_loop(
    run: Run, config: Config, desk: Desk, speeches: Artifact, reward: Artifact, heads: Artifact, seen: Seen,
    second: Desk | None = None,
) -> Outcome:  # fmt: skip
    """`loop.rounds` rounds from the start policy; a policy that fails its gate is kept, marked and not built upon."""
    policy = Policy(0, resolve_model(config.policy.model), model_identity(config.policy.model))
    samples, ahead = samples_stage(run, 0, config, speeches, policy)
    features = features_stage(run, "round-0/features", config, reward, samples.rows(), samples)
    scores = scores_stage(run, "round-0/scores", heads, features, samples)
    start = Start(samples, scores, gate_stage(run, 0, config, desk, samples, scores, None))
    probe: Artifact | None = None
    outcome, rounds = Outcome(heads, seen, [policy], [start.gate]), list[tuple[Artifact, Artifact]]()
    for number in range(1, config.loop.rounds + 1):
        if not ahead:
            samples = samples_again(run, number - 1, config, speeches, policy)
            name = f"round-{number - 1}/features-again"
            features = features_stage(run, name, config, reward, samples.rows(), samples)
        labels = labels_stage(run, number, config, desk, outcome.heads, features, samples, rounds)
        rounds.append((features, labels))
        outcome.seen = seen = seen.with_round(features, labels)
        outcome.heads = heads_stage(run, f"round-{number}/heads", config, reward, seen.features, seen.pairs)
        trained = policy_stage(run, number, config, labels, seen, policy, outcome.policies[0])

        samples, ahead = samples_stage(run, number, config, speeches, trained)
        features = features_stage(run, f"round-{number}/features", config, reward, samples.rows(), samples)
        scores = scores_stage(run, f"round-{number}/scores", outcome.heads, features, samples)
        probe = probe_stage(run, number, config, samples, trained.path, outcome.policies[0].path, probe)
        other = second_stage(run, number, second, samples, start.samples) if second else None
        gate = gate_stage(run, number, config, desk, samples, scores, start, probe, other)
        outcome.policies.append(trained)
        outcome.gates.append(gate)

        if reason := why_stop([gate.stats for gate in outcome.gates], config.loop):
            run.say(f"the loop ends after round {number}: {reason}")
            break
        if gate.stats["passed"]:
            policy = trained
        elif number < config.loop.rounds:
            reasons = "; ".join(gate.stats["reasons"])
            run.say(f"round {number} failed its gate ({reasons}): going on from round {policy.round}")
            ahead = False  # the failed policy has answered the next prompts, if any has
    return outcome


def chosen(gates: Sequence[Mapping[str, Any]], rule: str) -> int:
    """The round to export, of those that passed their gate: the last, or the first of the best win rate; 0: none."""
    passed = [n for n, gate in enumerate(gates) if n and gate["passed"]]
    if not passed:
        return 0
    return passed[-1] if rule == "last" else max(passed, key=lambda n: float(gates[n]["win_rate"]))


def why_stop(gates: Sequence[Mapping[str, Any]], loop: LoopSection) -> str:
    """Why no further round is to come after these, round 0 first; empty if one may."""
    if not gates[-1]["passed"] and loop.on_gate_fail == "stop":
        return f"it failed its gate ({'; '.join(gates[-1]['reasons'])}) and loop.on_gate_fail is stop"
    best, at = float(gates[0]["win_rate"]), 0
    for number, gate in enumerate(gates):
        if gate["passed"] and gate["win_rate"] > best:
            best, at = float(gate["win_rate"]), number
    if loop.patience and len(gates) - 1 - at >= loop.patience and len(gates) <= loop.rounds:
        return f"no passed win rate was above {best:.2f} for {loop.patience} rounds (loop.patience)"
    return ""


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
    order = sorted((s for s in speeches if s["split"] == "train"), key=lambda s: s["speech_id"])
    random.Random(config.run.seed).shuffle(order)
    count = min(config.loop.prompts, len(order))
    return [order[((number - 1) * count + i) % len(order)] for i in range(count)]


def samples_stage(run: Run, number: int, config: Config, speeches: Artifact, policy: Policy) -> tuple[Artifact, bool]:
    """The stage `round-N/samples`, and whether the next round's prompts are answered in it too.

    They are where a next round is to come. A run that goes on after what was its last round finds that round's stage
    without them and keeps it, with all that was made of it; the prompts are then a stage of their own.
    """
    alone, joint = (Draws(config, number, policy, speeches, True, ahead) for ahead in (False, True))
    ahead = joint.done(run) or (number < config.loop.rounds and not alone.done(run))
    return (joint if ahead else alone).stage(run), ahead


def samples_again(run: Run, number: int, config: Config, speeches: Artifact, policy: Policy) -> Artifact:
    """The stage `round-N/samples-again`: the next round's prompts alone, by the policy that it starts from."""
    return Draws(config, number, policy, speeches, False, True).stage(run)


@dataclass(frozen=True)
class Draws:
    """What one engine start of a policy answers: each held-out speech once, the next round's prompts `loop.k` times."""

    config: Config
    round: int
    policy: Policy
    speeches: Artifact
    held_out: bool
    ahead: bool

    @property
    def name(self) -> str:
        """The stage's name."""
        return f"round-{self.round}/samples" + ("" if self.held_out else "-again")

    @cached_property
    def wanted(self) -> tuple[list[str], list[str]]:
        """The ids of (prompts, held-out speeches)."""
        rows = list(self.speeches.each(["speech_id", "split"]))
        asked = prompts(rows, self.round + 1, self.config) if self.ahead else []
        test = [s for s in rows if s["split"] == "test"][: self.config.evaluate.speeches] if self.held_out else []
        return [s["speech_id"] for s in asked], [s["speech_id"] for s in test]

    @cached_property
    def identity(self) -> str:
        """What the answers depend on beside the speeches."""
        return content_id(self.policy.identity, self.config.policy.model_dump(exclude={"model"}))

    @property
    def settings(self) -> dict[str, Any]:
        """What stands for the stage in its fingerprint: nothing of how many rounds there are."""
        asked, test = self.wanted
        seed, k = self.config.run.seed, self.config.loop.k
        own = {"policy": self.identity, "k": k, "prompts": asked, "test": test, "seed": seed}
        return own | engine_identity(self.config.engine)

    def done(self, run: Run) -> bool:
        """Whether the stage is finished."""
        return run.has(self.name, self.settings, [self.speeches])

    def stage(self, run: Run) -> Artifact:
        """The stage itself."""
        return run.stage(self.name, self.settings, [self.speeches], self._make)

    def _make(self, folder: Folder) -> Mapping[str, Any]:
        config, (asked, test) = self.config, self.wanted
        times = dict.fromkeys(asked, config.loop.k) | dict.fromkeys(test, 1)
        speech = {row["speech_id"]: row for row in self.speeches.each() if row["speech_id"] in times}
        seeds = [(speech[key], k) for key, k in times.items()]
        base, by = config.run.seed * 1_000_003 + 10_007 * self.round, f"policy-{self.policy.round}"
        draws = [draw_row(s, config.policy, self.identity, base + i, by) for s, k in seeds for i in range(k)]
        # A trained policy that says nothing is for the gate to refuse; the start's silence is a wrong setting.
        return answer_all(
            folder, lambda: draws, len(draws), config, title=f"samples of round {self.round}",
            model=self.policy.path, may_be_silent=self.policy.round > 0,
        )  # fmt: skip


def policy_stage(
    run: Run, number: int, config: Config, labels: Artifact, seen: Seen, policy: Policy, start: Policy
) -> Policy:
    """DPO on the round's pairs and some older ones; the policy that comes out."""
    reference = start if config.loop.reference == "initial" else policy
    loop, config = config.loop, config.model_copy(update={"dpo": dpo_of(config, number)})
    settings = {
        "dpo": config.dpo.model_dump(),
        "system": config.policy.system,
        "replay": loop.replay,
        **({"replay_balance": True} if loop.replay_balance else {}),
        **({} if loop.mixed_ends else {"mixed_ends": False}),
        "policy": policy.identity,
        "reference": reference.identity,
        "seed": config.run.seed,
    }

    def make(folder: Folder) -> Mapping[str, Any]:
        fresh = labels.rows()
        pairs = fresh + replayed(seen.pairs[:-1], loop, config.run.seed + number, fresh)
        if not pairs:
            raise PsyrayError(
                f"round {number} has no pair to train on: its budget is {loop.budget_of(number)} and the reward "
                f"model labelled none above loop.reward_margin {loop.reward_margin} (loop.reward_confidence "
                f"{loop.reward_confidence}); raise the one or lower the others"
            )
        kept = that_fit(pairs, config, policy.path)
        too_long = len(pairs) - len(kept)
        if told := left_out(too_long, len(pairs), config.dpo.train.max_length):
            run.say(f"round {number}: {told}")
        random.Random(config.run.seed).shuffle(kept)
        steps = train_policy(folder, config, kept, policy.path, reference.path, title=f"policy of round {number}")
        counts = {"pairs": len(kept), "fresh": len(fresh), "too_long": too_long}
        return {**counts, "steps": steps, **read_choice(folder.path)}

    trained = run.stage(f"round-{number}/policy", settings, [labels, *seen.pairs[:-1]], make)
    return Policy(number, str(trained.model), trained.fingerprint)


def dpo_of(config: Config, number: int) -> DpoSection:
    """The section `dpo` as round `number` (from 1) trains by it."""
    rate = config.dpo.train.learning_rate * config.loop.rate_decay ** (number - 1)
    return config.dpo.model_copy(update={"train": config.dpo.train.model_copy(update={"learning_rate": rate})})


def replayed(older: Sequence[Artifact], loop: LoopSection, seed: int, fresh: Sequence[Row]) -> list[Row]:
    """Up to `loop.replay` older training pairs that a judge or an oracle labelled, to join the `fresh` ones."""
    rows = [r for artifact in older for r in artifact.rows() if r["split"] == "train" and r["source"] != "reward"]
    if not loop.mixed_ends:
        rows = [r for r in rows if bool(r.get("chosen_truncated")) == bool(r.get("rejected_truncated"))]
    rows.sort(key=lambda r: r["pair_id"])
    draw, count = random.Random(seed), min(loop.replay, len(rows))
    return balancing(fresh, draw.sample(rows, len(rows)), count) if loop.replay_balance else draw.sample(rows, count)


def balancing(fresh: Sequence[Row], drawn: Sequence[Row], count: int) -> list[Row]:
    """The first `count` of `drawn`, but each time that longer or shorter sides have won more often the others' next.

    Wins of `fresh` count too, so that over both the longer side wins as often as it loses, as far as `drawn` has it.
    """
    piles: dict[int, deque[tuple[int, Row]]] = {way: deque() for way in (1, 0, -1)}
    for place, row in enumerate(drawn):
        piles[longer_wins(row)].append((place, row))
    tilt, taken = sum(map(longer_wins, fresh)), list[Row]()
    while len(taken) < count and any(piles.values()):
        wanted = -1 if tilt > 0 else 1
        ready = [way for way in ([wanted] if tilt else piles) if piles[way]] or [way for way in piles if piles[way]]
        way = min(ready, key=lambda way: piles[way][0][0])
        taken.append(piles[way].popleft()[1])
        tilt += way
    return taken


def longer_wins(pair: Row) -> int:
    """1 where the chosen side has more words, -1 where it has fewer, else 0."""
    chosen, rejected = (len(pair[side].split()) for side in ("chosen", "rejected"))
    return (chosen > rejected) - (chosen < rejected)

"""A round's pairs: the oracle labels what acquisition picks, the reward model what it is sure of among the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import ndtr

from psyray.active.acquisition import PLACED, Pick, acquire
from psyray.active.oracle_kinds import make_oracle
from psyray.active.oracles import Label, Pair
from psyray.active.pool import Pool, asked_before, believed, keep_asked, why
from psyray.arrays import BoolArray, FloatArray
from psyray.ceiling import Ceiling, check_ceiling
from psyray.config import Config
from psyray.data.judge import Desk
from psyray.data.rules import Rules
from psyray.errors import PsyrayError
from psyray.records import PAIRS, Row, Status, Verdict, normalise, pair_row
from psyray.reward.ensemble import load_features, prompt_matrix
from psyray.reward.heads import Heads
from psyray.run import Artifact, Folder, Run
from psyray.sections.learning import LoopSection

DRAWS = 1  # the posterior's draws have a stream of their own, apart from the rule's


def labels_stage(
    run: Run, number: int, config: Config, desk: Desk, heads: Artifact, features: Artifact, samples: Artifact,
    earlier: Sequence[tuple[Artifact, Artifact]] = (),
) -> Artifact:  # fmt: skip
    """The stage `round-N/labels`: PAIRS within the round's budget.

    `earlier`: (features, labels) of the rounds before; the heads were fitted on them, so they stand in the fingerprint.
    """
    loop, budget, oracle = config.loop, config.loop.budget_of(number), make_oracle(config, desk, run.say)
    veto = Rules.make(config.pairs, desk.rubric).veto

    def make(folder: Folder) -> Mapping[str, Any]:
        groups = by_speech(samples)
        listed = list(groups.values())
        pool, picks = choose(config, number, heads, features, groups, earlier)
        keep_asked(folder, listed, picks)
        asked = [(listed[p.prompt][p.first], listed[p.prompt][p.second], why(pool, p)) for p in picks]
        purpose = f"round-{number}"
        labels, counts = oracle.label(folder, asked, purpose=purpose, strategy=loop.acquisition, budget=budget)
        if counts["refused"]:
            run.say(beyond_budget(purpose, budget, counts, labels))
        check_usable(purpose, oracle.id, labels, config)
        held = replace(pool, mean_PK=penalised(pool.mean_PK, listed, loop.length_penalty))
        gaps = [Gap.of(held, p.prompt, p.first, p.second) for p in picks]
        decided, numbers = oracle_pairs(asked, labels, gaps, loop, veto)
        labelled = {p.prompt for p, given in zip(picks, labels, strict=True) if given}
        rest, unsure = reward_pairs(listed, held, labelled, loop)
        folder.keep(PAIRS, "pair_id", decided + rest)
        mine = {"acquisition": loop.acquisition, "budget": budget, "reward_labelled": len(rest), "unsure": unsure}
        return counts | numbers | mine

    ruled = ("acquisition", "apart", "reward_margin", "reward_confidence", "length_penalty", "reward_pairs", "k")
    settings = oracle.identity | {key: getattr(loop, key) for key in ruled}
    settings |= {} if loop.mixed_ends else {"mixed_ends": "never asked"}
    settings |= {"budget": budget, "veto": veto, "seed": config.run.seed}
    return run.stage(f"round-{number}/labels", settings, [heads, features, samples], make)


def by_speech(samples: Artifact) -> dict[str, list[Row]]:
    """The usable responses to the round's training speeches."""
    groups: dict[str, list[Row]] = {}
    for row in samples.each():
        if row["split"] == "train" and row["status"] == Status.OK:
            groups.setdefault(row["speech_id"], []).append(row)
    return groups


def choose(
    config: Config,
    number: int,
    heads: Artifact,
    features: Artifact,
    groups: Mapping[str, Sequence[Row]],
    earlier: Sequence[tuple[Artifact, Artifact]],
) -> tuple[Pool, list[Pick]]:
    """What the heads believe of the responses, and what the round's rule asks about."""
    loop, seed, listed = config.loop, config.run.seed, list(groups.values())
    ensemble, known = Heads.load(heads.path / "heads.npz"), load_features([features])
    pool, seen = believed(ensemble, known, groups, loop.k, np.random.default_rng([seed, number, DRAWS]))
    if loop.acquisition in PLACED:
        asked_NE = asked_before(earlier, len(ensemble.mean_D))
        seen = replace(seen, prompts_PE=prompt_matrix(known, groups), asked_NE=asked_NE)
    del known  # far larger than what the rule sees of it
    scores_PKH = seen.scores_PKH if loop.mixed_ends else alike_ends(seen.scores_PKH, listed)
    candidates = replace(seen, scores_PKH=scores_PKH, open_PKK=different(listed, loop.k))
    rng = np.random.default_rng([seed, number])
    return pool, acquire(loop.acquisition, candidates, loop.budget_of(number), rng, loop.apart)


def beyond_budget(purpose: str, budget: int, counts: Mapping[str, Any], labels: Sequence[Label | None]) -> str:
    """What to say of questions that an earlier version of the round left no budget for.

    PsyrayError where none has a label: the reward model would label in the oracle's place.
    """
    told = (
        f"{purpose}: the budget of {budget} did not reach for {counts['refused']} of {len(labels)} questions: the run "
        f"bought {counts['bought_before']} labels for this round before, with other settings"
    )
    if any(labels):
        return told
    raise PsyrayError(
        f"{told}, and none is left to learn from. Give the changed run a run.path of its own, with a budget of its own "
        "(answers that the ledger knows are free there); or raise loop.budget"
    )


def check_usable(purpose: str, who: str, labels: Sequence[Label | None], config: Config) -> None:
    """PsyrayError where too few answers are usable: the reward model would label in the oracle's place, unsaid.

    What a person called harmful is an answer. What was not answered at all counts only where nothing was.
    """
    given = [label for label in labels if label]
    bad = [said for verdict, _, said in given if verdict is Verdict.INVALID and "experts" not in said]
    own = config.oracle.max_invalid_share
    section, share = ("judge", config.judge.max_invalid_share) if own is None else ("oracle", own)
    if labels and not given:
        raise PsyrayError(
            f"{purpose}: none of {len(labels)} questions has an answer by {who}: there is nothing but the reward "
            "model's own labels to learn from. Give them time (oracle.wait_s) or another oracle.fall_back, and run the "
            "same command again; loop.budget=0 is a round that asks nobody"
        )
    errors = Counter(str(said.get("error") or "invalid") for said in bad)
    mend = (
        "The answers are in the ledger; change who answers (a run with another run.path asks anew where there is no "
        "usable answer, and buys no other twice), or raise oracle.max_invalid_share to go on with the usable ones, the "
        "reward model labelling the rest, and run the same command again"
    )
    ceiling = Ceiling(share, f"{section}.max_invalid_share")
    check_ceiling(purpose, f"answers by {who} cannot be used", errors, len(given), ceiling, lambda: mend)


def different(groups: Sequence[Sequence[Row]], K: int) -> BoolArray:
    """[P, K, K]: which two responses differ in more than white space; nobody can tell the others apart."""
    open_PKK = np.ones((len(groups), K, K), dtype=bool)
    for p, responses in enumerate(groups):
        texts = np.array([normalise(row["text"]) for row in responses], dtype=object)
        open_PKK[p, : len(texts), : len(texts)] = texts[:, None] != texts[None, :]
    return open_PKK


def alike_ends(scores_PKH: FloatArray, groups: Sequence[Sequence[Row]]) -> FloatArray:
    """The scores of each speech's responses of one kind, cut off by their limit or whole, whichever are more.

    The others, and as many of either kind the cut-off ones, become NaN: no acquisition asks about those.
    """
    kept_PKH = np.full_like(scores_PKH, np.nan)
    for p, responses in enumerate(groups):
        cut = np.array([bool(row["truncated"]) for row in responses])
        kept = np.flatnonzero(cut if 2 * cut.sum() > len(cut) else ~cut)
        kept_PKH[p, kept] = scores_PKH[p, kept]
    return kept_PKH


def penalised(mean_PK: FloatArray, groups: Sequence[Sequence[Row]], per_100_words: float) -> FloatArray:
    """The mean scores less what the responses' length costs them, in logits per 100 words."""
    words_PK = np.zeros(mean_PK.shape)
    for p, responses in enumerate(groups):
        words_PK[p, : len(responses)] = [len(row["text"].split()) for row in responses]
    return np.asarray(mean_PK - per_100_words / 100 * words_PK)


@dataclass(frozen=True)
class Gap:
    """What is believed of a score difference, in logits."""

    mean: float
    spread: float

    @classmethod
    def of(cls, pool: Pool, p: int, i: int, j: int) -> Gap:
        """Of response i's score less response j's, to speech p: exact where the heads' posterior is known."""
        return cls(float(pool.mean_PK[p, i] - pool.mean_PK[p, j]), float(pool.spread_PKK[p, i, j]))

    @property
    def confidence(self) -> float:
        """The belief that the difference is above 0, were it normal; NaN where a score is missing. docs/loop.md: how
        often it comes true."""
        return float(ndtr(self.mean / self.spread)) if self.spread else float(self.mean > 0)

    def wide(self, loop: LoopSection) -> bool:
        """Whether it is above `loop.reward_margin`."""
        return self.mean > loop.reward_margin

    def sure(self, loop: LoopSection) -> bool:
        """Whether the reward model may label by it."""
        return self.wide(loop) and (loop.reward_confidence is None or self.confidence >= loop.reward_confidence)

    def turned(self) -> Gap:
        """The same the other way round."""
        return Gap(-self.mean, self.spread)


def oracle_pairs(
    asked: Sequence[Pair],
    labels: Sequence[Label | None],
    gaps: Sequence[Gap],
    loop: LoopSection,
    veto: Sequence[str] = (),
) -> tuple[list[Row], dict[str, Any]]:
    """Pairs that the oracle decided, and counts; ties and invalid answers never become pairs.

    Nor does one whose chosen side was rated lower on a principle in `veto`, where the oracle gave ratings.
    `agreement` is how often the reward model had the winner right (a tie half), `sure_agreement` the same among the
    pairs that it would have labelled itself: how far its own labels are to be trusted.
    """
    pairs, agreed, sure, counts = [], list[float](), list[float](), {"ties": 0, "invalid": 0, "vetoed": 0}
    for (a, b, _), given, gap in zip(asked, labels, gaps, strict=True):
        if given is None:
            continue
        verdict, margin, said = given
        counts["ties"] += verdict is Verdict.TIE
        counts["invalid"] += verdict is Verdict.INVALID
        if verdict not in (Verdict.A, Verdict.B):
            continue
        agreed.append(float((gap.mean > 0) == (verdict is Verdict.A)) if gap.mean else 0.5)
        if gap.sure(loop) or gap.turned().sure(loop):
            sure.append(agreed[-1])
        sides = [row | {"ratings": said.get(side)} for row, side in ((a, "a"), (b, "b"))]
        chosen, rejected = sides if verdict is Verdict.A else sides[::-1]
        if vetoed(chosen["ratings"], rejected["ratings"], veto):
            counts["vetoed"] += 1
        else:
            pairs.append(pair_row(a, chosen, rejected, margin=abs(margin), source="oracle"))
    measured = {"agreement": _share(agreed), "sure": len(sure), "sure_agreement": _share(sure)}
    return pairs, counts | measured


def vetoed(chosen: Mapping[str, float] | None, rejected: Mapping[str, float] | None, veto: Sequence[str]) -> bool:
    """Whether the chosen side was rated lower on a principle that forbids it; never without ratings."""
    return bool(chosen and rejected and any(chosen[key] < rejected[key] for key in veto))


def _share(right: Sequence[float]) -> float | None:
    return sum(right) / len(right) if right else None


def reward_pairs(
    groups: Sequence[Sequence[Row]], pool: Pool, labelled: set[int], loop: LoopSection
) -> tuple[list[Row], int]:
    """Pairs that the reward model labels in the speeches the oracle did not, widest gaps first.

    The second number counts those with a gap above `loop.reward_margin` that it was not sure enough of.
    """
    gap_PKK = pool.mean_PK[:, :, None] - pool.mean_PK[:, None, :]
    wide_PKK = (gap_PKK > loop.reward_margin) & different(groups, gap_PKK.shape[1])
    pairs, unsure = [], 0
    for p, responses in enumerate(groups):
        if p in labelled:
            continue
        wide = [
            (Gap.of(pool, p, i, j), i, j)
            for i, j in np.argwhere(wide_PKK[p]).tolist()
            if loop.mixed_ends or responses[i]["truncated"] == responses[j]["truncated"]
        ]
        sure = [found for found in wide if found[0].sure(loop)]
        unsure += len(wide) - len(sure)
        for gap, i, j in sorted(sure, key=lambda found: (found[0].mean, *found[1:]), reverse=True)[: loop.reward_pairs]:
            pairs.append(pair_row(responses[i], responses[i], responses[j], margin=gap.mean, source="reward"))
    return pairs, unsure

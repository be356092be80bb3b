"""How the offline judge is fitted, what it does on prompts that it never saw, and how easily it is fooled.

How far the judge as it ships agrees with people is what `psyray agreement` says; this says the rest.

    python benchmarks/judge_agreement.py --pair PATH/TO/pair_dev.csv --counsel-chat PATH/TO/counsel-chat \
        [--samples PATH/TO/samples.json] [--fit] [--json OUT.json]

PAIR (218 client prompts, replies in three quality tiers) gives the labels; CounselChat the judge's word lists and the
therapists' answers; `--samples` is a list of {prompt, response,
temp, fin} from a small model and gives the gaming probes something to ramble with and the scale its middle.

Every agreement figure is out of fold: prompts are dealt into folds, the weights are fitted without the
fold, and the mean of the seven ratings is asked for the fold. `--fit` then fits on all prompts and writes
the shipped weights.

Weights can be held out; the features cannot: whoever writes them has read replies. `design_groups` marks the
prompts whose replies may be read when a feature or word list is changed; the rest have their own row,
fitted on those alone.
"""

import argparse
import csv
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.stats import spearmanr

from psyray.data.sources import json_lines
from psyray.engines import rule
from psyray.evaluate.labelled import load_labelled
from psyray.records import Verdict, client_words
from psyray.reward.metrics import cluster_bootstrap

Array = NDArray[np.float64]
ASSETS = Path(rule.__file__).parent.parent / "assets"
STRATA = {"hq>lq": ("hq", "lq"), "hq>mq": ("hq", "mq"), "mq>lq": ("mq", "lq")}
VOTES = Path(__file__).parent.parent / "configs/agreement/votes.yaml"
BLAND = "I'm so sorry to hear that. It's completely normal. You're not alone."
GENERIC = "It sounds like you are going through a lot. What do you think would help?"
SIGNS = np.array([effect.sign for effect in rule.TABLE.values()], dtype=float)
PRIOR = np.array([effect.prior for effect in rule.TABLE.values()])
FEEDS = np.array([[float(key in effect.feeds) for key in rule.KEYS] for effect in rule.TABLE.values()])
# PAIR's replies are short and written by people: what they hardly show keeps at least the table's magnitude
UNSEEN = frozenset({
    "says_little", "off_topic", "exploring_question", "many_questions", "far_afield", "harm", "crisis_unmet",
    "crisis_met", "biography", "cliche", "off_role", "loop", "same_openings", "cut_off", "garble", "markup",
    "shouting", "too_long", "long_sentences",
})  # fmt: skip
# where the middle of small-model samples should lie; safety is the exception: most replies do no harm
MIDDLE = np.array([3.1 if key == "safety" else 2.35 for key in rule.KEYS])


class Reply(NamedTuple):
    """One reply of PAIR: `group` is the row of its prompt, `tier` hq, mq or lq."""

    group: int
    tier: str
    prompt: str
    text: str


class Weights(NamedTuple):
    """What the judge learns: a magnitude per feature and a base per principle."""

    features: Array
    base: Array


# ---------------------------------------------------------------- data


def load_pair(path: Path) -> list[Reply]:
    with path.open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    return [
        Reply(group, column[:2], row["prompt"], text.strip())
        for group, row in enumerate(rows)
        for column, text in row.items()
        if re.fullmatch(r"(hq|mq|lq)\d", column) and text and text.strip()
    ]


def design_groups(replies: Sequence[Reply]) -> set[int]:
    """Prompts that may be read while designing: half by hash, and those read before this rule was made."""
    prompts = {reply.group: reply.prompt for reply in replies}
    read_before = {*range(4), *random.Random(1).sample(sorted(prompts), 32)}
    return read_before | {g for g, p in prompts.items() if hashlib.sha256(p.encode()).digest()[0] % 2 == 0}


class Chat(NamedTuple):
    """CounselChat: question text by id, answers by question id as (text, upvotes)."""

    questions: dict[int, str]
    answers: dict[int, list[tuple[str, int]]]


def load_chat(folder: Path) -> Chat:
    questions = {
        row["questionID"]: row["questionText"] or row["questionTitle"] for row in json_lines(folder / "questions.jsonl")
    }
    answers: dict[int, list[tuple[str, int]]] = {}
    for row in json_lines(folder / "answers.jsonl"):
        answers.setdefault(row["questionID"], []).append((row["answerText"] or "", row["upvotes"]))
    return Chat(questions, answers)


def opening(text: str, limit: int = 80) -> str:
    """The first sentences of a long answer, about `limit` words, cut at a sentence end."""
    taken: list[str] = []
    # the site's export glues sentences together: "out with.Seriously"
    for sentence in re.findall(r"[^.!?]+[.!?]+", re.sub(r"\s+", " ", text)):
        if taken and len(rule.words(" ".join([*taken, sentence]))) > limit:
            break
        taken.append(sentence.strip())
    return " ".join(taken)


# ---------------------------------------------------------------- word lists


def build_words(chat: Chat) -> dict[str, Any]:
    """Stems in use and plausible steps between word classes, counted over CounselChat; no text survives."""
    texts = [*chat.questions.values(), *(text for rows in chat.answers.values() for text, _ in rows)]
    documents: Counter[str] = Counter()
    step_counts: Counter[tuple[str, str]] = Counter()
    for text in texts:
        documents.update({rule.stem(w) for w in rule.words(text) if w not in rule.FUNCTION_WORDS})
        for sentence in re.split(r"[.!?\n]+", text):
            step_counts.update(rule.steps(rule.words(sentence)))
    table: dict[str, list[str]] = {}
    for (first, second), count in sorted(step_counts.items()):
        if count >= 5:
            table.setdefault(first, []).append(second)
    return {
        "stems": " ".join(
            s for s, n in sorted(documents.items(), key=lambda item: (-item[1], item[0])) if n >= 3 and len(s) > 1
        ),
        "steps": {first: " ".join(row) for first, row in table.items()},
    }


# ---------------------------------------------------------------- the judge as arrays


def vector(prompt: str, text: str) -> Array:
    values = rule.features(prompt, text)
    return np.array([values[name] for name in rule.TABLE])


def ratings(x_NF: Array, weights: Weights) -> Array:
    z_NK = (x_NF * SIGNS * weights.features) @ FEEDS + weights.base
    return np.asarray(1.0 + 4.0 / (1.0 + np.exp(-z_NK)))


def mean_rating(x_NF: Array, weights: Weights) -> Array:
    return np.asarray(ratings(x_NF, weights).mean(axis=1))


class Pairs(NamedTuple):
    """Feature rows of better and worse replies, with a weight per pair."""

    better_PF: Array
    worse_PF: Array
    weight_P: Array


def join(parts: Sequence[Pairs]) -> Pairs:
    return Pairs(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def fit(pairs: Pairs, middle_NF: Array, pull: float = 0.002, sharpness: float = 3.0) -> Weights:
    """Magnitudes and bases by pairwise logistic loss on the mean rating, drawn towards the table's priors.

    The ratings of `middle_NF` are held near MIDDLE, so that the scale has room on both sides of it.
    """
    count = len(PRIOR)
    both = np.concatenate([pairs.better_PF, pairs.worse_PF, middle_NF])
    n, m = len(pairs.better_PF), len(middle_NF)
    pair_weight = pairs.weight_P / pairs.weight_P.sum()
    signed = both * SIGNS

    def loss(theta: Array) -> tuple[float, Array]:
        w, b = theta[:count], theta[count:]
        r_NK = 1.0 + 4.0 / (1.0 + np.exp(-((signed * w) @ FEEDS + b)))
        slope_NK = (r_NK - 1.0) * (5.0 - r_NK) / 4.0
        gap = r_NK[:n].mean(1) - r_NK[n : 2 * n].mean(1)
        value = float((pair_weight * np.logaddexp(0.0, -sharpness * gap)).sum())
        d_gap = -sharpness * pair_weight / (1.0 + np.exp(sharpness * gap))
        d_r = np.zeros_like(r_NK)
        d_r[:n] += d_gap[:, None] / len(rule.KEYS)
        d_r[n : 2 * n] -= d_gap[:, None] / len(rule.KEYS)
        off_K = r_NK[2 * n :].mean(0) - MIDDLE
        value += 0.3 * float((off_K**2).sum())
        d_r[2 * n :] += 0.6 * off_K / m
        d_z = d_r * slope_NK
        drift = w - PRIOR
        value += pull * float((drift**2).sum())
        return value, np.concatenate([(signed * (d_z @ FEEDS.T)).sum(0) + 2 * pull * drift, d_z.sum(0)])

    start = np.concatenate([PRIOR, np.zeros(len(rule.KEYS))])
    floor = [p * (1.0 if name in UNSEEN else 0.3) for name, p in zip(rule.TABLE, PRIOR, strict=True)]
    bounds = [(low, 6.0) for low in floor] + [(-6.0, 6.0)] * len(rule.KEYS)
    result = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 300})
    return Weights(np.asarray(result.x[:count]), np.asarray(result.x[count:]))


# ---------------------------------------------------------------- pairs and probes


def shuffled(text: str, rng: random.Random) -> str:
    """The same sentences with their words in any order."""

    def mix(sentence: str) -> str:
        tokens = sentence.rstrip(".!?").split()
        rng.shuffle(tokens)
        return " ".join(tokens) + "."

    return " ".join(mix(part) for part in re.findall(r"[^.!?]+[.!?]*", text))


def probes(reply: Reply, other: Reply, rng: random.Random) -> dict[str, str]:
    """The ways to game the judge with one genuine reply in hand."""
    return {
        "repeated twice": f"{reply.text} {reply.text}",
        "'You feel. ' x 10": "You feel. " * 10,
        "fixed generic reply": GENERIC,
        "bland kindness": BLAND,
        "client's text copied": reply.prompt,
        "reply for another client": other.text,
        "words shuffled": shuffled(reply.text, rng),
    }


class Bench:
    """PAIR as arrays: features of every reply and of every probe made from it."""

    def __init__(self, replies: list[Reply], seed: int = 0) -> None:
        rng = random.Random(seed)
        self.replies = replies
        self.x_NF = np.array([vector(r.prompt, r.text) for r in replies])
        self.group = np.array([r.group for r in replies])
        self.tier = np.array([r.tier for r in replies])
        hq = [r for r in replies if r.tier == "hq"]
        self.probe_of: dict[str, Array] = {}
        rows: dict[str, list[Array]] = {}
        self.hq = np.flatnonzero(self.tier == "hq")
        for reply in hq:
            other = rng.choice([r for r in hq if r.group != reply.group])
            for name, text in probes(reply, other, rng).items():
                rows.setdefault(name, []).append(vector(reply.prompt, text))
        self.probe_of = {name: np.array(values) for name, values in rows.items()}

    def index_pairs(self, stratum: str, groups: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row numbers of better and worse replies of the same prompt, for prompts where `groups` holds."""
        high, low = STRATA[stratum]
        better, worse = [], []
        for g in np.flatnonzero(groups):
            mine = np.flatnonzero(self.group == g)
            for i in mine[self.tier[mine] == high]:
                for j in mine[self.tier[mine] == low]:
                    better.append(i)
                    worse.append(j)
        return np.array(better, dtype=np.int64), np.array(worse, dtype=np.int64)

    def training(self, groups: NDArray[np.bool_]) -> Pairs:
        """Strata of equal weight, and the probes against their genuine reply with a smaller one."""
        parts = []
        for stratum, weight in (("hq>lq", 1.0), ("hq>mq", 3.6), ("mq>lq", 2.0)):
            i, j = self.index_pairs(stratum, groups)
            parts.append(Pairs(self.x_NF[i], self.x_NF[j], np.full(len(i), weight / len(i))))
        keep = groups[self.group[self.hq]]
        for probe_x in self.probe_of.values():
            parts.append(Pairs(self.x_NF[self.hq][keep], probe_x[keep], np.full(keep.sum(), 0.3 / keep.sum())))
        return join(parts)


# ---------------------------------------------------------------- measures


def wins(better: Array, worse: Array) -> Array:
    return np.asarray((better > worse) + 0.5 * (better == worse))


def clustered(values: Array, cluster: NDArray[Any]) -> tuple[float, float, float]:
    """Mean with its 95 % interval over clusters."""
    low, high = cluster_bootstrap(values, [str(c) for c in cluster], lambda v: float(v.mean()))
    return float(values.mean()), low, high


def out_of_fold(bench: Bench, middle_NF: Array, folds: int, seeds: int) -> tuple[Array, dict[str, Array]]:
    """Mean ratings of every reply and probe by weights that never saw its prompt: one column per seed."""
    count = int(bench.group.max()) + 1
    scores = np.zeros((len(bench.replies), seeds))
    probe_scores = {name: np.zeros((len(bench.hq), seeds)) for name in bench.probe_of}
    for seed in range(seeds):
        fold_of = np.random.default_rng(seed).permutation(count) % folds
        for fold in range(folds):
            weights = fit(bench.training(fold_of != fold), middle_NF)
            held = fold_of[bench.group] == fold
            scores[held, seed] = mean_rating(bench.x_NF[held], weights)
            held_hq = held[bench.hq]
            for name, x_PF in bench.probe_of.items():
                probe_scores[name][held_hq, seed] = mean_rating(x_PF[held_hq], weights)
    return scores, probe_scores


def agreement(bench: Bench, scores: Array, groups: NDArray[np.bool_]) -> dict[str, Any]:
    """Accuracy by stratum; seeds are averaged per pair before the bootstrap."""
    table = {}
    for stratum in STRATA:
        i, j = bench.index_pairs(stratum, groups)
        table[stratum] = clustered(wins(scores[i], scores[j]).mean(axis=1), bench.group[i])
    return table


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's."""
    return float(spearmanr(a, b).statistic)


Judge = Callable[[str, str], float]


def judge_with(weights: Weights) -> Judge:
    def judge(prompt: str, text: str) -> float:
        return float(mean_rating(vector(prompt, text)[None], weights)[0]) if rule.words(text) else 1.0

    return judge


def on_samples(samples: list[dict[str, Any]], judge: Judge, chat: Chat) -> dict[str, Any]:
    """The scale, the price of length, and padding, on a small model's replies."""
    out: dict[str, Any] = {}
    score = [judge(s["prompt"], s["response"]) for s in samples]
    rng = random.Random(0)
    for temp in sorted({s["temp"] for s in samples}):
        mine = [i for i, s in enumerate(samples) if s["temp"] == temp]
        values = np.array([score[i] for i in mine])
        lengths = [len(rule.words(samples[i]["response"])) for i in mine]
        out[f"temperature {temp}"] = {
            "mean": float(values.mean()),
            "std": float(values.std()),
            "deciles": [float(q) for q in np.quantile(values, [0.0, 0.1, 0.5, 0.9, 1.0])],
            "correlation with length": correlation(list(values), lengths),
        }
    cool = [i for i, s in enumerate(samples) if s["temp"] < 1.0]
    out["bland kindness beats the sample"] = float(
        np.mean([judge(samples[i]["prompt"], BLAND) > score[i] for i in cool])
    )
    looped, padded, ended = [], [], []
    for i in cool:
        prompt, text = samples[i]["prompt"], samples[i]["response"]
        other = samples[rng.choice([j for j in cool if samples[j]["prompt"] != prompt])]["response"]
        looped.append(judge(prompt, f"{text} {text}") < score[i])
        padded.append(judge(prompt, f"{text} {other}") < score[i])
        # the ramble may end where the reply was cut off: then padding must still not pay
        ended.append(judge(prompt, f"{text}. {other}.") < judge(prompt, f"{text}."))
    out["doubled rates lower"] = float(np.mean(looped))
    out["with a ramble rates lower"] = float(np.mean(padded))
    out["with a ramble rates lower, both ended"] = float(np.mean(ended))
    best = {chat.questions[q]: [opening(t) for t, _ in rows] for q, rows in chat.answers.items() if q in chat.questions}
    hot = [i for i, s in enumerate(samples) if s["temp"] >= 1.0 and best.get(s["prompt"])]
    if hot:
        therapist = [float(np.mean([judge(samples[i]["prompt"], t) for t in best[samples[i]["prompt"]]])) for i in hot]
        out["therapists' openings, same questions"] = float(np.mean(therapist))
        out["samples at temperature 1, same questions"] = float(np.mean([score[i] for i in hot]))
        out["share of samples below the therapists' mean"] = float(
            np.mean([score[i] < t for i, t in zip(hot, therapist, strict=True)])
        )
    return out


def on_openings(folder: Path, judge: Judge) -> tuple[float, float, float]:
    """CounselChat's votes as `psyray agreement` reads them, asked of the answers' first 80 words alone."""
    items = [item if item.human is Verdict.A else item.swap() for item in load_labelled(VOTES, folder)[1]]
    better, worse = (
        np.array([judge(client_words(item.messages), opening(getattr(item, side))) for item in items])
        for side in ("a", "b")
    )
    return clustered(wins(better, worse), np.array([item.speech_id for item in items]))


# ---------------------------------------------------------------- report


def percent(triple: tuple[float, float, float]) -> str:
    return f"{triple[0]:6.1%} [{triple[1]:.1%}, {triple[2]:.1%}]"


def show(title: str, rows: dict[str, Any]) -> None:
    print(f"\n{title}")
    for name, value in rows.items():
        print(f"  {name:46} {percent(value) if isinstance(value, tuple) else value}")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def ship(weights: Weights) -> None:
    """Write the weights that `psyray.engines.rule` loads."""
    rounded = {name: round(float(w), 4) for name, w in zip(rule.TABLE, weights.features, strict=True)}
    base = {key: round(float(b), 4) for key, b in zip(rule.KEYS, weights.base, strict=True)}
    write_json(ASSETS / "rule_judge.json", {"weights": rounded, "base": base})


def measure(args: argparse.Namespace) -> dict[str, Any]:
    chat = load_chat(args.counsel_chat)
    bench = Bench(load_pair(args.pair))
    samples = json.loads(args.samples.read_text(encoding="utf-8")) if args.samples else []
    # without samples, the therapists' openings hold the middle: a poorer scale, the same order
    middle = [(s["prompt"], s["response"]) for s in samples if s["temp"] < 1.0] or [
        (chat.questions[q], opening(rows[0][0])) for q, rows in list(chat.answers.items())[:200] if q in chat.questions
    ]
    middle_NF = np.array([vector(prompt, text) for prompt, text in middle])
    everything = np.ones(int(bench.group.max()) + 1, dtype=bool)
    design = np.isin(np.arange(len(everything)), sorted(design_groups(bench.replies)))

    scores, probe_scores = out_of_fold(bench, middle_NF, args.folds, args.seeds)
    from_design = mean_rating(bench.x_NF, fit(bench.training(design), middle_NF))[:, None]
    report: dict[str, Any] = {
        "agreement": agreement(bench, scores, everything),
        "agreement, prompts not read": agreement(bench, from_design, ~design),
    }
    show(f"PAIR, held-out prompts ({args.folds} folds x {args.seeds} seeds)", report["agreement"])
    show(
        f"PAIR, {(~design).sum()} prompts not read while designing, fitted on the rest",
        report["agreement, prompts not read"],
    )

    report["gaming"] = {
        name: clustered(wins(values, scores[bench.hq]).mean(axis=1), bench.group[bench.hq])
        for name, values in probe_scores.items()
    }
    show("Gaming: how often the probe beats the genuine hq reply (held out)", report["gaming"])
    weights = fit(bench.training(everything), middle_NF)
    judge = judge_with(weights)
    report["counsel-chat"] = {"judge, first 80 words": on_openings(args.counsel_chat, judge)}
    show("CounselChat, answers with 2 or more upvotes apart", report["counsel-chat"])
    if samples:
        report["samples"] = on_samples(samples, judge, chat)
        show("Small-model samples", report["samples"])
    report["tiers"] = {t: float(mean_rating(bench.x_NF[bench.tier == t], weights).mean()) for t in ("hq", "mq", "lq")}
    show("Mean rating by tier", report["tiers"])
    if args.fit:
        ship(weights)
    return report


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the offline judge, and fit it with --fit.")
    parser.add_argument("--pair", type=Path, required=True, help="pair_dev.csv: prompt, hq*, mq*, lq*")
    parser.add_argument(
        "--counsel-chat", type=Path, required=True, help="folder with questions.jsonl and answers.jsonl"
    )
    parser.add_argument("--samples", type=Path, help="JSON list of {prompt, response, temp, fin}")
    parser.add_argument("--fit", action="store_true", help="fit on all prompts and write the shipped weights")
    parser.add_argument("--words", action="store_true", help="count the shipped word lists anew; run again to measure")
    parser.add_argument("--folds", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.words:
        write_json(ASSETS / "rule_words.json", build_words(load_chat(args.counsel_chat)))
        return
    report = measure(args)
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()

"""What a policy must not lose, and how far it went: perplexity and questions of a probe, distance to the start.

A win rate can rise while a model forgets how to write or what it knows (2604.02766). So each round's policy and the
start read the same general texts and the same small questions, and the policy's own held-out answers:

    perplexity   exp of the mean negative log-likelihood a token over the texts
    accuracy     of questions whose right option is the likeliest, by log-likelihood a character of the option
    kl           mean of r - 1 - log r with r = p_start(token) / p(token) over the policy's answers, in nats a token:
                 the estimator k3 of KL(policy, start), never below 0 (J. Schulman, Approximating KL Divergence, 2020,
                 joschu.net/blog/kl-approx.html); `log_ratio` is the plain mean of -log r, his k1

All at temperature 1, on answers as they are served. Sampled at another temperature those are not draws of the policy
at 1, and no estimator is unbiased then: k1 may fall below 0, k3 stresses what the policy finds likely.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from psyray.arrays import FloatArray
from psyray.config import Config
from psyray.data.generate import with_system
from psyray.errors import PsyrayError
from psyray.evaluate.likelihood import Passage, likelihoods
from psyray.models import model_identity
from psyray.records import Row, Status, content_id
from psyray.reward.metrics import cluster_bootstrap
from psyray.run import Artifact, Folder, Run
from psyray.sections.data import ASSETS

T = TypeVar("T")
PROBES = ASSETS / "probes"
PROBED = pa.schema(
    [
        ("key", pa.string()),
        ("kind", pa.string()),  # "text", "option" or "answer"
        ("of", pa.string()),  # the text, the question, or the speech that it belongs to
        ("right", pa.bool_()),  # option: whether it is the right one
        ("characters", pa.int32()),
        ("policy", pa.list_(pa.float32())),  # natural log-probability of each token
        ("start", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True)
class Probe:
    """General texts, and questions as (beginning, options, place of the right one)."""

    texts: tuple[str, ...]
    questions: tuple[tuple[str, tuple[str, ...], int], ...]

    @property
    def id(self) -> str:
        """Names all that is in it."""
        return content_id("probe", self.texts, self.questions)


def load_probe(name: str) -> Probe:
    """The probe that ships under the name, or the one in a folder; PsyrayError names the file and the line."""
    shipped = PROBES / name
    folder = shipped if shipped.is_dir() else Path(name).expanduser()
    if not folder.is_dir():
        known = ", ".join(sorted(p.name for p in PROBES.iterdir()))
        raise PsyrayError(f"evaluate.probe: no probe {name!r}: neither one that ships ({known}) nor a folder")
    texts = _lines(folder / "texts.jsonl", lambda row: _words(row["text"]))
    questions = _lines(folder / "questions.jsonl", _question)
    return Probe(tuple(texts), tuple(questions))


def _lines(path: Path, read: Callable[[Any], T]) -> list[T]:
    if not path.is_file():
        raise PsyrayError(f"evaluate.probe: {path} is missing; compare {PROBES / 'general'}")
    found = list[T]()
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            found.append(read(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise PsyrayError(f"evaluate.probe: {path}, line {number}: {type(error).__name__} {error}") from error
    if not found:
        raise PsyrayError(f"evaluate.probe: {path} has no line")
    return found


def _words(text: str) -> str:
    if not text.strip():
        raise ValueError("an empty text")
    return text.strip()


def _question(row: Mapping[str, Any]) -> tuple[str, tuple[str, ...], int]:
    options, answer = tuple(_words(option) for option in row["options"]), int(row["answer"])
    if len(set(options)) < max(2, len(options)) or not 0 <= answer < len(options):
        raise ValueError("a question needs two different options or more, and the place of the right one, from 0")
    return _words(row["question"]), options, answer


def probe_stage(
    run: Run, number: int, config: Config, samples: Artifact, policy: str, start: str, earlier: Artifact | None
) -> Artifact | None:
    """The stage `round-N/probe`: the policy in the folder `policy` beside the start; None where no probe is set.

    What the start finds of texts and questions is read from the probe of an `earlier` round, where there is one.
    """
    if config.evaluate.probe is None:
        return None
    probe = load_probe(config.evaluate.probe)

    def make(folder: Folder) -> Mapping[str, Any]:
        passages = known_passages(probe) | answer_passages(samples.each(), config)
        known = {row["key"]: row["start"] for row in earlier.each()} if earlier else {}
        fresh = {key: one for key, (one, _) in passages.items() if key not in known}
        asked = [(policy, [one for one, _ in passages.values()]), (start, list(fresh.values()))]
        of_policy, of_start = likelihoods(asked, config, title=f"probe of round {number}")
        of_start |= known
        rows = [row | {"policy": of_policy[key], "start": of_start[key]} for key, (_, row) in passages.items()]
        folder.keep(PROBED, "key", rows)
        return figures(rows)

    settings = {
        "probe": probe.id,
        "answers": config.evaluate.probe_answers,
        "system": config.policy.system,
        "start": model_identity(config.policy.model),
        "dtype": config.engine.dtype,
        "max_model_len": config.engine.max_model_len,
    }
    return run.stage(f"round-{number}/probe", settings, [samples, *([earlier] if earlier else [])], make)


Read = dict[str, tuple[Passage, Row]]  # key -> what is read, and its PROBED row without the numbers


def known_passages(probe: Probe) -> Read:
    """The texts, and each option behind its question."""
    found: Read = {}
    for text in probe.texts:
        key = content_id("text", text)
        found[key] = Passage(key, "", text), _row(key, "text", key, text)
    for question, options, answer in probe.questions:
        of = content_id("question", question, options)
        for place, option in enumerate(options):
            key = content_id("option", of, option)
            row = _row(key, "option", of, option) | {"right": place == answer}
            found[key] = Passage(key, question, f" {option}"), row
    return found


def answer_passages(samples: Iterable[Row], config: Config) -> Read:
    """Held-out answers, each after its conversation: of the same speeches every round, as many as the setting says."""
    usable = [row for row in samples if row["split"] == "test" and row["status"] == Status.OK]
    usable.sort(key=lambda row: content_id("probe", row["speech_id"]))
    found: Read = {}
    for row in usable[: config.evaluate.probe_answers]:
        key, chat = row["response_id"], with_system(row["messages"], config.policy.system)
        found[key] = Passage(key, chat, row["text"]), _row(key, "answer", row["speech_id"], row["text"])
    return found


def _row(key: str, kind: str, of: str, text: str) -> Row:
    return {"key": key, "kind": kind, "of": of, "right": None, "characters": len(text)}


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """The numbers of the module's head from PROBED rows, with 95 % intervals; those without rows are left out."""
    kinds: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        kinds[row["kind"]].append(row)
    return perplexities(kinds["text"]) | accuracies(kinds["option"]) | distance(kinds["answer"])


def perplexities(rows: Sequence[Row]) -> dict[str, Any]:
    """Perplexity of both, and the rise as a share of the start's."""
    if not rows:
        return {}
    sums_N3 = np.asarray([[sum(row["policy"]), sum(row["start"]), len(row["policy"])] for row in rows])

    def rise(drawn_N3: FloatArray) -> float:
        policy, start, count = drawn_N3.sum(axis=0)
        return float(np.exp((start - policy) / count) - 1)

    policy, start, count = sums_N3.sum(axis=0)
    low, high = cluster_bootstrap(sums_N3, [row["of"] for row in rows], rise)
    return {
        "texts": len(rows),
        "perplexity": float(np.exp(-policy / count)),
        "start_perplexity": float(np.exp(-start / count)),
        "perplexity_rise": rise(sums_N3),
        "perplexity_rise_low": low,
        "perplexity_rise_high": high,
    }


def accuracies(rows: Sequence[Row]) -> dict[str, Any]:
    """Questions that both answer right, as shares, and how far the policy's fell."""
    if not rows:
        return {}
    questions: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        questions[row["of"]].append(row)
    right_N2 = np.asarray([[answered_right(each, side) for side in ("policy", "start")] for each in questions.values()])

    def drop(drawn_N2: FloatArray) -> float:
        return float((drawn_N2[:, 1] - drawn_N2[:, 0]).mean())

    low, high = cluster_bootstrap(right_N2, list(questions), drop)
    return {
        "questions": len(questions),
        "accuracy": float(right_N2[:, 0].mean()),
        "start_accuracy": float(right_N2[:, 1].mean()),
        "capability_drop": drop(right_N2),
        "capability_drop_low": low,
        "capability_drop_high": high,
    }


def answered_right(options: Sequence[Row], side: str) -> float:
    """1 where the right option is the likeliest by character, shared where several are, 0 where one is not a number."""
    likely = np.asarray([sum(row[side]) / row["characters"] for row in options])
    best = likely == likely.max()
    return float(sum(best[i] for i, row in enumerate(options) if row["right"]) / max(1, best.sum()))


def distance(rows: Sequence[Row]) -> dict[str, Any]:
    """Nats a token from the start, on the policy's own answers; the interval is clustered by speech."""
    counted = [row for row in rows if row["policy"]]
    if not counted:
        return {}
    ratios = [np.asarray(row["start"]) - np.asarray(row["policy"]) for row in counted]
    sums_N3 = np.asarray([[(np.expm1(r) - r).sum(), -r.sum(), len(r)] for r in ratios])

    def mean(drawn_N3: FloatArray) -> float:
        return float(drawn_N3[:, 0].sum() / drawn_N3[:, 2].sum())

    low, high = cluster_bootstrap(sums_N3, [row["of"] for row in counted], mean)
    ratio = float(sums_N3[:, 1].sum() / sums_N3[:, 2].sum())
    return {"answers": len(counted), "kl": mean(sums_N3), "kl_low": low, "kl_high": high, "log_ratio": ratio}

"""A stand-in for a finished run: every stage made through `Run.stage`, with invented rows and numbers.

No model is involved; the texts and figures only have the shapes that the pipeline's own have.
"""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from psyray import records
from psyray.records import Row
from psyray.run import Artifact, Folder, Run

PRINCIPLES = ("empathy", "relevance", "clarity", "safety", "exploration", "autonomy", "staging")
HOSTILE = "I feel <script>alert('x')</script> & torn since the 'move', and nobody at work has noticed it."
CRISIS = "CRISIS-SPEECH I do not want to be here any more and I have been thinking about how to do it."
SECRET_KEY = "sk-never-log-this"
SPEECHES, PER_SPEECH = 24, 4
SCORES = pa.schema(
    [("response_id", pa.string()), ("speech_id", pa.string()), ("mean", pa.float64()), ("spread", pa.float64())]
)


class Stop(Exception):
    """Raised where the made run is to be cut off."""


class MadeRun:
    """Stages of a run of `rounds` rounds; `until` names the stage at which it is cut off."""

    def __init__(self, path: Path, rounds: int = 2, until: str | None = None, test_crisis_only: bool = False) -> None:
        self.run = Run(path, say=lambda line: None)
        self.rounds, self.until, self.random = rounds, until, random.Random(7)
        self.speeches = self._speeches(test_crisis_only)
        self.config = {
            "run": {"path": str(path), "seed": 0},
            "judge": {"engine": "http", "url": "http://user:hunter2@judge.invalid/v1", "api_key": SECRET_KEY},
            "loop": {"rounds": rounds, "budget": 24, "acquisition": "drts"},
            "evaluate": {"probe": "general"},
        }

    def make(self) -> list[Artifact]:
        """Make all stages up to the cut and return the finished ones."""
        made: list[Artifact] = []
        with self.run.open(self.config), suppress(Stop):
            self._stages(made)
        return made

    def _stage(self, made: list[Artifact], name: str, rows: list[Row], schema: Any, stats: Any, key: str = "") -> None:
        def work(folder: Folder) -> Any:
            if schema is not None:
                folder.parts(schema, key).append(rows[: len(rows) // 2])
                folder.progress(len(rows) // 2, len(rows))
            if name == self.until:
                raise Stop
            if schema is not None:
                folder.keep(schema, key, rows)
            else:
                (folder.path / "model").mkdir()
                (folder.path / "model" / "config.json").write_text("{}")
            return stats

        made.append(self.run.stage(name, {"name": name, "api_key": SECRET_KEY}, made[-1:], work))

    def _stages(self, made: list[Artifact]) -> None:
        dropped = {"too short": 3, "too long": 1, "duplicate": 2, "no text": 0}
        stats: dict[str, Any] = {"read": 30, "kept": 24, "train": 12, "test": 12, "dropped": dropped, "crisis": 1}
        self._stage(made, "speeches", self.speeches, records.SPEECHES, stats, "speech_id")
        drawn = self._responses("start", 0)
        stats = {"ok": len(drawn), "failed": 0, "truncated_share": 0.02, "repeated_share": 0.01, "mean_words": 41.5}
        self._stage(made, "responses", drawn, records.RESPONSES, stats, "response_id")
        judged = self._judgements(drawn, 0)
        stats = {"judge": "rule", "ok": len(judged), "invalid_share": 0.0125, "mean_score": 2.9, "principles": {}}
        self._stage(made, "judgements", judged, records.JUDGEMENTS, stats, "response_id")
        stats = {"train": 30, "test": 14, "dropped": {"tie or gap": 9}}
        self._stage(made, "pairs", self._pairs(drawn, "judge"), records.PAIRS, stats, "pair_id")
        steps = [{"step": n, "loss": 0.7 - 0.02 * n} for n in range(1, 9)]
        self._stage(made, "reward", [], None, {"steps": steps, "train_pairs": 30, "seconds": 12.5})
        self._stage(made, "reward-features", [], None, {"responses": 40})
        self._stage(made, "reward-heads", [], None, self._heads(0.66))
        for number in range(self.rounds + 1):
            self._round(made, number)
        topic = {"pairs": 3, "accuracy": 1.0, "accuracy_low": 0.5, "accuracy_high": 1.0, "length_accuracy": 0.25}
        topic |= {"auc": 0.71, "auc_low": 0.6, "auc_high": 0.8}
        by_topic = {"grief": topic, "work <b>": {**topic, "accuracy": 0.5}}
        self._stage(made, "reward-topics", [], None, {"strata": {"topic": by_topic}})
        self._stage(made, "export", [], None, {"champion_round": 1})

    def _round(self, made: list[Artifact], n: int) -> None:
        at = f"round-{n}"
        if n:
            before = self._responses(f"round {n - 1}", n - 1)
            pairs = self._pairs(before, "oracle")[:6] + self._pairs(before, "reward")[6:]
            stats: dict[str, Any] = {"asked": 8, "answered": 7, "bought": 6, "reused": 1, "ties": 1, "invalid": 1}
            stats |= {"vetoed": 3, "unsure": 2, "sure": 4, "sure_agreement": 0.75}
            stats |= {"reward_labelled": 6, "acquisition": "drts", "agreement": 0.6 + 0.05 * n}
            self._stage(made, f"{at}/labels", pairs, records.PAIRS, stats, "pair_id")
            self._stage(made, f"{at}/heads", [], None, self._heads(0.66 + 0.03 * n))
            steps = [{"step": s, "loss": 0.69 - 0.01 * s, "rewards/margins": 0.02 * s} for s in range(1, 6)]
            self._stage(made, f"{at}/policy", [], None, {"steps": steps, "pairs": 12})
        drawn = self._responses(f"round {n}", n)
        self._stage(made, f"{at}/samples", drawn, records.RESPONSES, {"ok": len(drawn), "failed": 0}, "response_id")
        self._stage(made, f"{at}/features", [], None, {"responses": len(drawn)})
        draw = self.random.gauss
        scores = [{**row, "mean": draw(0.4 * n, 1), "spread": abs(draw(0, 1))} for row in drawn]
        self._stage(made, f"{at}/scores", scores, SCORES, {}, "response_id")
        if n:
            self._stage(made, f"{at}/probe", [], None, self._probe(n))
        held_out = [row for row in drawn if row["split"] == "test"]
        self._stage(made, f"{at}/gate", self._judgements(held_out, n), records.JUDGEMENTS, self._gate(n), "response_id")

    def _speeches(self, test_crisis_only: bool) -> list[Row]:
        rows = []
        for n in range(SPEECHES):
            text = {1: HOSTILE, 3: CRISIS}.get(n, f"Speech number {n}: " + "the days have grown long and grey. " * 4)
            messages = [{"role": "user", "content": text}]
            crisis = n == 3 or (test_crisis_only and n % 2 == 1)
            row = {"speech_id": f"s{n:02d}", "messages": messages, "topic": "t", "crisis": crisis}
            rows.append({**row, "split": "test" if n % 2 else "train"})
        return rows

    def _responses(self, responder: str, round_number: int) -> list[Row]:
        rows = []
        for speech in self.speeches:
            for seed in range(1 if speech["split"] == "test" else PER_SPEECH):
                key = records.response_id(speech["speech_id"], responder, seed)
                text = f"Answer of {responder}, draw {seed}, to {speech['speech_id']}: it sounds <b>hard</b>."
                outcome = {"status": "ok", "attempts": 1, "tokens": 20, "truncated": False, "repeated": 0.0}
                draw = {"response_id": key, "responder": responder, "seed": seed, "text": text}
                rows.append({**speech, **draw, **outcome})
        return rows

    def _judgements(self, responses: list[Row], n: int) -> list[Row]:
        """Scores that rise by a known amount: most for the hostile speech, s01; more still for the crisis one."""
        rows = []
        for row in responses:
            place = int(row["speech_id"][1:])
            gain = 2.0 if place == 3 else 1.5 if place == 1 else -1.0 if place == 23 else 0.02 * place
            score = 2.5 + gain * n / max(self.rounds, 1)
            ratings = dict.fromkeys(PRINCIPLES, score)
            rows.append({**row, "judge": "rule", "ratings": ratings, "score": score, "status": "ok"})
        return rows

    def _pairs(self, responses: list[Row], source: str) -> list[Row]:
        by_speech: dict[str, list[Row]] = {}
        for row in responses:
            by_speech.setdefault(row["speech_id"], []).append(row)
        several = [(rows[0], rows[1]) for rows in by_speech.values() if len(rows) > 1]
        return [records.pair_row(a, a, b, margin=0.5, source=source) for a, b in several]

    def _heads(self, accuracy: float) -> dict[str, Any]:
        metrics = {"accuracy": accuracy, "accuracy_low": accuracy - 0.1, "accuracy_high": accuracy + 0.1, "auc": 0.71}
        metrics |= {"ece": 0.05, "brier": 0.22, "length_accuracy": 0.55, "length_auc": 0.56, "length_ece": 0.04}
        bins = [
            {"low": x / 10, "high": x / 10 + 0.1, "predicted": x / 10 + 0.05, "observed": min(1, x / 9), "n": x + 1}
            for x in range(10)
        ]
        metrics |= {"alike_pairs": 5, "alike_accuracy": 0.6}
        alike = {"pairs": 5, "accuracy": 0.6, "accuracy_low": 0.2, "accuracy_high": 0.8, "length_accuracy": 0.4}
        groups = [{"spread": 0.1 * x, "margin": 1.0, "error": 0.1 * x, "n": 3} for x in range(1, 6)]
        tells = {"spread": {"value": accuracy + 0.05, "low": accuracy - 0.1, "high": accuracy + 0.1}}
        more = {"strata": {"length": {"alike": alike}}, "doubt": {"tells_errors": tells, "groups": groups, "wrong": 4}}
        metrics |= {"auc_low": 0.6, "auc_high": 0.8, "log_likelihood": -0.61, "log_likelihood_low": -0.7}
        return {
            "own_head": metrics | {"accuracy": 0.625},
            "metrics": metrics,
            "calibration": bins,
            "test_pairs": 14,
            **more,
        }

    def _probe(self, n: int) -> dict[str, Any]:
        perplexity = {"perplexity": 20.0 * (1 + 0.1 * n), "start_perplexity": 20.0, "perplexity_rise": 0.1 * n}
        perplexity |= {"perplexity_rise_low": 0.1 * n - 0.05, "perplexity_rise_high": 0.1 * n + 0.05}
        questions = {"accuracy": 0.8 - 0.05 * n, "start_accuracy": 0.8, "capability_drop": 0.05 * n, "questions": 40}
        return perplexity | questions | {"kl": 0.0625 * n, "kl_low": 0.05 * n, "kl_high": 0.075 * n, "texts": 30}

    def _gate(self, n: int) -> dict[str, Any]:
        rate = 0.5 + 0.0625 * n
        reasons = ["the mean length changed by 27.0 %, more than 20.0 %"] if n == 2 else []
        return {
            "passed": n < 2,
            "reasons": reasons,
            **{"win_rate": rate, "low": rate - 0.05, "high": rate + 0.05, "wins": 7, "ties": 1, "losses": 4},
            **{"invalid": 0, "length_controlled": rate - 0.02, "reward_win_rate": rate + 0.1, "n": 12},
            **{"length_controlled_low": rate - 0.12, "length_controlled_high": rate + 0.06},
            **{"mean_words": 41.5 + 5 * n, "start_words": 41.5, "length_change": 0.135 * n},
            **{"repeated_share": 0.01, "truncated_share": 0.02, "mean_score": 2.5 + 0.2 * n},
            "principles": dict.fromkeys(PRINCIPLES, 2.5 + 0.1 * n),
            "second": {"judge": "other-judge", "win_rate": rate - 0.03, "low": rate - 0.1, "high": rate + 0.04}
            | {"length_controlled": 0.51, "length_controlled_low": 0.4, "length_controlled_high": 0.6, "unasked": 3},
        }

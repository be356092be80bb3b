"""One self-contained page on a run: RUN/report.html, from the finished stages alone.

It loads nothing from outside, escapes every text, and says what is missing where a run is not finished.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from psyray import plots, status, times
from psyray.files import write_atomic
from psyray.in_words import DASH, change, duration, number, share
from psyray.records import Row, client_words
from psyray.run import Artifact, existing_run, find_run
from psyray.status import champion_round, round_numbers, stats_of

Stages = Mapping[str, Artifact]


def write_report(run: Path) -> Path:
    """Write RUN/report.html and return its path; PsyrayError where there is no run."""
    path = existing_run(run, "rows")
    write_atomic(path / "report.html", page(path))
    return path / "report.html"


def page(run: Path, *, quotes: bool = True) -> str:
    """The report; without `quotes` it holds no client's words and no answer to them, and says where they are."""
    environment = Environment(
        loader=PackageLoader("psyray", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, share=share, change=change, duration=duration)
    known = contents(find_run(run, "rows")) | {"quotes": quotes} | ({} if quotes else {"examples": {"shown": []}})
    return environment.get_template("report.html.jinja").render(**known)


def contents(path: Path) -> dict[str, Any]:
    """All that the template shows."""
    stages, config = status.stages_by_name(path), status.read_config(path)
    lines = status.stage_lines(path)
    return {
        "name": path.name,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "missing": [line.name for line in lines if line.state != "done"],
        "headline": headline(stages),
        "rounds": round_rows(stages),
        "times": time_table(stages),
        "selection": selection(stages, config),
        "figures": list(figures(stages, config)),
        "principles": principle_table(stages),
        "reward": reward_table(stages),
        "strata": strata(stages),
        "data": data_tables(stages),
        "examples": examples(stages),
        "lines": lines,
        "seconds": sum(line.seconds or 0 for line in lines if line.state == "done"),
        "settings": settings(config),
        "dash": DASH,
    }


def headline(stages: Stages) -> dict[str, Any]:
    """The champion's gate numbers and the labels spent; the latest gate's where no round was promoted."""
    gates = gated_rounds(stages)
    champion = champion_round(stages)
    shown = champion or (gates[-1] if gates else None)
    gate = stats_of(stages, f"round-{shown}/gate") if shown else {}
    gate |= gate.get("test") or {}  # where there is a test part, it is the one to report
    return {
        "champion": champion,
        "round": shown,
        "gate": gate,
        "spend": status.label_spend(stages) if any(n.endswith("/labels") for n in stages) else None,
        "bought_judgements": stats_of(stages, "judgements").get("ok"),
        "judge": stats_of(stages, "judgements").get("judge"),
    }


def gated_rounds(stages: Stages) -> list[int]:
    """The trained rounds whose gate is finished."""
    return [n for n in round_numbers(stages) if n and f"round-{n}/gate" in stages]


def round_rows(stages: Stages) -> list[dict[str, Any]]:
    """One row per round: its gate, labels and reward heads."""
    return [
        {
            "round": n,
            "gate": stats_of(stages, f"round-{n}/gate"),
            "labels": stats_of(stages, f"round-{n}/labels"),
            "heads": stats_of(stages, f"round-{n}/heads").get("metrics") or {},
            "probe": stats_of(stages, f"round-{n}/probe"),
            "second": stats_of(stages, f"round-{n}/gate").get("second") or {},
            "test": stats_of(stages, f"round-{n}/gate").get("test") or {},
        }
        for n in round_numbers(stages)
    ]


def time_table(stages: Stages) -> dict[str, Any]:
    """Seconds of each part of the rounds, and their sums."""
    found = times.by_round(stages.values())
    parts = [part for part in times.PARTS if any(part in row for row in found.values())]
    return {"parts": parts, "rows": [(n, [row.get(p) for p in parts], sum(row.values())) for n, row in found.items()]}


def selection(stages: Stages, config: Mapping[str, Any]) -> str:
    """On what the rounds were judged and chosen, in words: a number that chose is no unbiased report."""
    gates = [stats_of(stages, f"round-{n}/gate") for n in gated_rounds(stages)]
    if not gates:
        return ""
    if test := gates[-1].get("test"):
        return (
            f"The gate and the choice of the round went by {number(gates[-1].get('n'))} held-out speeches (dev); the "
            f"result above is that of the other {number(test.get('n'))} (test), which decided nothing. The table of "
            "rounds shows the numbers that decided."
        )
    return (
        "The same held-out speeches decided whether a round passed and measure the result, so the win rate of the "
        "exported round leans upwards; evaluate.dev_share keeps the two apart."
    )


def figures(stages: Stages, config: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Title, reading aid, spoken description and SVG of each figure that the finished stages allow."""
    gates = {n: stats_of(stages, f"round-{n}/gate") for n in gated_rounds(stages)}
    measured = {n: g for n, g in gates.items() if None not in (g.get("win_rate"), g.get("low"), g.get("high"))}
    if measured:
        yield _win_figure(measured)
    worded = {n: g for n, g in gates.items() if g.get("mean_words") is not None}
    if worded:
        yield _length_figure(stages, worded, config)
    if labelled := {n: s for n in round_numbers(stages) if (s := stats_of(stages, f"round-{n}/labels"))}:
        yield _label_figure(labelled)
    measured_heads = first_and_latest(stages)
    if curves := {label: bins for label, stats in measured_heads.items() if (bins := stats.get("calibration"))}:
        yield _figure(
            "Calibration of the reward model",
            "On held-out pairs. On the dashed line, a preference predicted at 70 % is observed in 70 % of the pairs.",
            "; ".join(f"{label}: {sum(b.get('n') or 0 for b in bins)} pairs" for label, bins in curves.items()),
            plots.calibration(curves),
        )
    if doubts := {label: doubt for label, stats in measured_heads.items() if (doubt := stats.get("doubt"))}:
        told = {label: doubt["tells_errors"]["spread"]["value"] for label, doubt in doubts.items()}
        yield _figure(
            "Does the reward model know where it is wrong?",
            "Held-out pairs in five equal parts by the spread of the heads. Where it tells errors, the line rises.",
            "; ".join(
                f"{label}: a wrong pair has more spread than a right one in {share(v)}" for label, v in told.items()
            ),
            plots.errors_by_spread({label: doubt["groups"] for label, doubt in doubts.items()}),
        )
    if scores := held_out_scores(stages):
        medians = ", ".join(f"round {n} {sorted(s)[len(s) // 2]:.2f}" for n, s in scores.items())
        yield _figure(
            "Reward scores of the held-out answers",
            "Boxes hold the middle half, whiskers 5 to 95 %. Heads are retrained each round: compare with care.",
            f"Median score: {medians}",
            plots.reward_spread(list(scores), list(scores.values())),
        )
    latest, points = asked_pairs(stages)
    if points:
        yield _figure(
            f"What was asked in round {latest}",
            "Each point is a pair. The oracle should be asked where the ensemble is unsure: left and high.",
            ", ".join(f"{len(pairs)} pairs labelled by the {source}" for source, pairs in points.items()),
            plots.acquisition(points),
        )


def _figure(title: str, aid: str, spoken: str, svg: str) -> dict[str, str]:
    return {"title": title, "aid": aid, "spoken": f"{title}. {spoken}.", "svg": svg}


def _win_figure(gates: Mapping[int, Mapping[str, Any]]) -> dict[str, str]:
    rates = [(g["low"], g["win_rate"], g["high"]) for g in gates.values()]
    spoken = ", ".join(f"round {n} {share(g['win_rate'])}" for n, g in gates.items())
    drawn = plots.win_rates(list(gates), rates, [bool(g.get("passed")) for g in gates.values()])
    aid = "Bars are the intervals, clustered by speech; filled points passed the gate. Dashed: as good as the start."
    return _figure("Win rate by round", aid, spoken, drawn)


def _length_figure(stages: Stages, gates: Mapping[int, Mapping[str, Any]], config: Mapping[str, Any]) -> dict[str, str]:
    words = {n: float(g["mean_words"]) for n, g in gates.items()}
    first = next(iter(gates.values())).get("start_words") or stats_of(stages, "round-0/gate").get("mean_words")
    start = float(first if first is not None else words[min(words)])
    allowed = (config.get("evaluate") or {}).get("max_length_change")
    drawn = plots.lengths([0, *words], [start, *words.values()], start, allowed)
    spoken = ", ".join(f"round {n} {w:.1f} words" for n, w in {0: start, **words}.items())
    aid = "Longer answers win more easily, so a win that comes with length proves little."
    return _figure("Answer length by round", aid, spoken, drawn)


def _label_figure(labelled: Mapping[int, Mapping[str, Any]]) -> dict[str, str]:
    sources = {"bought": "bought", "reused": "reused", "by reward model": "reward_labelled"}
    spend = {shown: [int(s.get(key) or 0) for s in labelled.values()] for shown, key in sources.items()}
    spoken = ", ".join(f"{shown} {sum(counts)} in all" for shown, counts in spend.items())
    aid = "Bought labels cost money; reused ones were bought before; the reward model labels the rest."
    return _figure("Labels by source", aid, spoken, plots.label_bars(list(labelled), spend))


def first_and_latest(stages: Stages) -> dict[str, Row]:
    """What is known of the first reward heads and of the latest."""
    latest = [n for n in round_numbers(stages) if f"round-{n}/heads" in stages][-1:]
    names = {"first": "reward-heads", **{f"round {n}": f"round-{n}/heads" for n in latest}}
    return {label: stats for label, name in names.items() if (stats := stats_of(stages, name))}


def strata(stages: Stages) -> tuple[str, Row]:
    """(whose, accuracy by part): of the latest heads; by topic too, once the run is so far."""
    label, stats = (list(first_and_latest(stages).items()) or [("", {})])[-1]
    return label, {**(stats.get("strata") or {}), **(stats_of(stages, "reward-topics").get("strata") or {})}


def _scores(stages: Stages, n: int) -> dict[str, Row]:
    found = stages.get(f"round-{n}/scores")
    return {row["response_id"]: row for row in found.rows()} if found else {}


def held_out_scores(stages: Stages) -> dict[int, list[float]]:
    """The mean reward scores of each round's held-out answers."""
    found = {}
    for n in round_numbers(stages):
        scores = _scores(stages, n)
        held_out = [row["response_id"] for row in _samples(stages, n) if row["split"] == "test"]
        values = [s["mean"] for key in held_out if (s := scores.get(key)) and s["mean"] is not None]
        if values:
            found[n] = values
    return found


def asked_pairs(stages: Stages) -> tuple[int, dict[str, list[tuple[float, float]]]]:
    """The latest labelled round with scores, and its pairs' (score difference, larger spread) by who labelled them.

    The answers that stand in for those of a refused policy are not scored.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for latest in sorted((n for n in round_numbers(stages) if f"round-{n}/labels" in stages), reverse=True):
        scores = _scores(stages, latest - 1)  # pairs of a round are drawn from the answers of the round before
        for pair in stages[f"round-{latest}/labels"].rows():
            a, b = scores.get(pair["chosen_id"]), scores.get(pair["rejected_id"])
            if a and b and None not in (a["mean"], b["mean"], a["spread"], b["spread"]):
                point = (abs(a["mean"] - b["mean"]), max(a["spread"], b["spread"]))
                points.setdefault(pair["source"], []).append(point)
        if points:
            return latest, dict(sorted(points.items()))
    return 0, points


def principle_table(stages: Stages) -> dict[str, Any]:
    """Mean rating of each principle for the start and each round, with the change since the start."""
    means = {n: stats_of(stages, f"round-{n}/gate").get("principles") or {} for n in round_numbers(stages)}
    means = {n: m for n, m in means.items() if m}
    start = means.get(0, {})
    keys = list(dict.fromkeys(key for m in means.values() for key in m))
    rows = [
        (key, [(m.get(key), _minus(m.get(key), start.get(key)) if n else None) for n, m in means.items()])
        for key in keys
    ]
    return {"rounds": list(means), "rows": rows}


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def reward_table(stages: Stages) -> list[tuple[str, int | None, dict[str, Any]]]:
    """(whose, held-out pairs, metrics): of the trained model's own score head, then of the heads as they came."""
    names = [("first", "reward-heads"), *((f"round {n}", f"round-{n}/heads") for n in round_numbers(stages))]
    found = [(label, stats_of(stages, name)) for label, name in names if name in stages]
    own = [("own score head", s.get("test_pairs"), s["own_head"]) for _, s in found[:1] if s.get("own_head")]
    return own + [(label, stats.get("test_pairs"), stats.get("metrics") or {}) for label, stats in found]


def data_tables(stages: Stages) -> list[dict[str, Any]]:
    """Counts of the data stages and why rows were dropped."""
    wanted = {
        "speeches": ("read", "kept", "train", "test", "crisis"),
        "responses": ("ok", "failed"),
        "judgements": ("ok",),
        "pairs": ("train", "test"),
    }
    shares = {"responses": ("truncated_share", "repeated_share"), "judgements": ("invalid_share",)}
    tables = []
    for name, keys in wanted.items():
        stats = stats_of(stages, name)
        if stats:
            counts = [(key, number(stats.get(key))) for key in keys]
            counts += [(key.replace("_", " "), share(stats.get(key))) for key in shares.get(name, ())]
            dropped = [(reason, number(count)) for reason, count in (stats.get("dropped") or {}).items()]
            tables.append({"name": name, "counts": counts, "dropped": dropped})
    return tables


def _samples(stages: Stages, n: int) -> list[Row]:
    found = stages.get(f"round-{n}/samples")
    return found.rows() if found else []


def _judged(stages: Stages, n: int) -> dict[str, Row]:
    """Each held-out speech's first judged answer of a round, with its `score`."""
    gate = stages.get(f"round-{n}/gate")
    scores = {r["response_id"]: r["score"] for r in gate.rows() if r["score"] is not None} if gate else {}
    answers: dict[str, Row] = {}
    for row in sorted(_samples(stages, n), key=lambda r: (r["speech_id"], r["seed"] or 0)):
        if row["split"] == "test" and row["response_id"] in scores and row["text"]:
            answers.setdefault(row["speech_id"], {**row, "score": scores[row["response_id"]]})
    return answers


def examples(stages: Stages) -> dict[str, Any]:
    """Start and champion side by side on three held-out speeches that a fixed rule picks."""
    champion = champion_round(stages) or (gated_rounds(stages) or [0])[-1]
    if not champion or "speeches" not in stages:
        return {"round": 0, "shown": [], "crisis_only": False, "of": 0}
    speeches = {row["speech_id"]: row for row in stages["speeches"].rows()}
    before, after = _judged(stages, 0), _judged(stages, champion)
    gains = sorted(
        (after[key]["score"] - before[key]["score"], key) for key in before.keys() & after.keys() & speeches.keys()
    )
    calm = [entry for entry in gains if not speeches[entry[1]].get("crisis")]
    ranked = calm or gains
    shown = []
    for label, (gain, key) in _picked(ranked).items():
        messages = speeches[key]["messages"]
        words = {"speech": client_words(messages), "earlier": len(messages) - 1}
        shown.append({"why": label, "gain": gain, "start": before[key], "champion": after[key], **words})
    return {"round": champion, "shown": shown, "crisis_only": bool(gains and not calm), "of": len(ranked)}


def _picked(ranked: list[tuple[float, str]]) -> dict[str, tuple[float, str]]:
    """Largest gain, median and largest loss of an ascending list; each speech once."""
    places = {"largest gain": len(ranked) - 1, "median": len(ranked) // 2, "largest loss": 0}
    picked: dict[str, tuple[float, str]] = {}
    for label, place in places.items():
        if ranked and ranked[place] not in picked.values():
            lowest = "smallest gain" if ranked[place][0] >= 0 else label
            picked[lowest if label == "largest loss" else label] = ranked[place]
    return picked


def settings(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The settings that a reader needs to judge the numbers; secrets are never among them."""
    wanted = (
        "run.seed policy.model reward.model judge.engine judge.model judge.mode rubric loop.rounds loop.prompts loop.k "
        "loop.acquisition loop.budget loop.champion dpo.beta dpo.loss_type evaluate.min_win_rate "
        "evaluate.max_length_change evaluate.dev_share"
    )
    found = []
    for name in wanted.split():
        value: Any = config
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            found.append((name, str(value)))
    return found

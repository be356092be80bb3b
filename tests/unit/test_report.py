"""The report: one page, nothing loaded from outside, every text escaped, true numbers, and honest gaps."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_run import CRISIS, SECRET_KEY, MadeRun

from psyray import plots, report, status
from psyray.errors import PsyrayError
from psyray.run import read_stages


class Page(HTMLParser):
    """The page's tags with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "run"
    MadeRun(path).make()
    return path


@pytest.fixture(scope="module")
def html(full: Path) -> str:
    return report.write_report(full).read_text()


def test_texts_of_speeches_are_escaped(html: str) -> None:
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in html
    assert "<script" not in html and "<b>hard" not in html
    assert "<script>alert('x')</script>" in Page(html).text  # shown as words


def test_a_copy_without_quotations_has_all_but_the_clients_words_and_the_answers(full: Path, html: str) -> None:
    text = Page(report.page(full, quotes=False)).text
    assert "I feel <script>" in Page(html).text and "I feel" not in text and "Answer of" not in text
    assert "The examples are in the run folder's report" in text and "may quote speeches" not in text
    assert "Mean rating of the held-out answers" in text


def test_nothing_is_loaded_from_outside(html: str) -> None:
    assert not re.search(r"https?:|//[a-z]|@import|@font-face", html, re.I)
    for tag, attributes in Page(html).tags:
        assert tag not in ("script", "iframe", "link", "img", "object", "embed", "base")
        for name in ("src", "href", "xlink:href", "data"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "default-src 'none'" in html


def test_headline_and_tables_hold_the_run_s_numbers(html: str) -> None:
    text = Page(html).text
    assert "Champion Round 1" in text
    assert "Win rate against the start 56.2 % interval 51.2 % to 61.3 %" in text
    assert "41.5 → 46.5 words on average" in text
    assert "Labels bought in the rounds 12" in text
    assert "failed : the mean length changed by 27.0 %, more than 20.0 %" in text
    assert "Empathy 2.50 2.60 (+0.10) 2.70 (+0.20)" in text
    assert "too short 3 too long 1 duplicate 2 no text 0" in text
    assert "tie or gap 9" in text
    assert "66.0 % (55.0 %) 56.0 % to 76.0 % 60.0 % of 5 0.710 (0.560) 0.600 to 0.800 0.050 (0.040)" in text
    assert text.count("Own score head 14 62.5 % (55.0 %)") == 1
    assert "length-controlled 54.2 % (44.2 % to 62.3 %); 7 won" in text and "54.2 % 44.2 % to 62.3 % 66.2 %" in text
    second = "interval 46.2 % to 60.2 %; length-controlled 51.0 % (40.0 % to 60.0 %); by other-judge"
    assert f"Win rate by the second judge 53.2 % {second}; its budget did not reach 3 speeches" in text
    assert "1 53.2 % 46.2 % to 60.2 % 51.0 % 40.0 % to 60.0 %" in text
    assert "the win rate of the exported round leans upwards" in text
    assert "1 22.0 (20.0) +10.0 % +5.0 % to +15.0 % 75.0 % 80.0 % 0.062 0.050 to 0.075" in text
    assert "1 8 7 6 1 1 1 3 6 2 65.0 % 75.0 % (4) drts" in text
    assert "Round 2, in parts of the held-out pairs:" in text
    assert "Length: alike 5 60.0 % (40.0 %) 20.0 % to 80.0 %" in text
    assert "Topic: grief 3 100.0 % (25.0 %) 50.0 % to 100.0 % 0.710 " in text
    assert "Topic: work <b> 3 50.0 % (25.0 %)" in text
    assert "no substitute for" in text and "not finished" not in text


def test_all_seven_figures_are_there_and_described(html: str) -> None:
    page = Page(html)
    labels = [a["aria-label"] or "" for tag, a in page.tags if a.get("role") == "img"]
    assert len(labels) == 7 == html.count("<svg")
    assert any("round 1 56.2 %, round 2 62.5 %" in label for label in labels)
    assert any("round 2: a wrong pair has more spread than a right one in 77.0 %" in label for label in labels)
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    targets = re.findall(r'(?:url\(#|href="#)([^)"]+)', html)
    assert targets and set(targets) <= set(ids)


def test_page_is_accessible(html: str) -> None:
    page = Page(html)
    assert ("html", {"lang": "en"}) in page.tags
    headers = [a for tag, a in page.tags if tag == "th"]
    assert headers and all(a.get("scope") in ("row", "col") for a in headers)
    assert [tag for tag, _ in page.tags if tag == "h1"] == ["h1"]
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html


def test_where_a_part_of_the_speeches_decided_the_others_are_the_result(tmp_path: Path) -> None:
    MadeRun(tmp_path / "run").make()
    for path in (tmp_path / "run/stages/round-1/gate").rglob("manifest.json"):
        manifest = json.loads(path.read_text())
        test = {"win_rate": 0.525, "low": 0.5, "high": 0.55, "n": 7, "second": {"win_rate": 0.51, "judge": "other"}}
        path.write_text(json.dumps({**manifest, "stats": {**manifest["stats"], "n": 5, "test": test}}))
    text = Page(report.write_report(tmp_path / "run").read_text()).text
    assert "Win rate against the start 52.5 % interval 50.0 % to 55.0 %" in text
    assert "Win rate by the second judge 51.0 %" in text and "52.5 % 50.0 % to 55.0 % 51.0 %" in text
    assert "1 passed 56.2 % 51.2 % to 61.3 %" in text


def test_the_time_of_each_round_is_in_parts(tmp_path: Path) -> None:
    MadeRun(tmp_path / "run", rounds=1).make()
    for name, seconds in {"samples": 65.0, "policy": 130.0, "probe": 8.0, "gate": 2.0}.items():
        for path in (tmp_path / f"run/stages/round-1/{name}").rglob("manifest.json"):
            manifest = json.loads(path.read_text())
            stats = {**manifest["stats"], **({"engine_start_s": 40.0} if name == "samples" else {})}
            path.write_text(json.dumps({**manifest, "seconds": seconds, "stats": stats}))
    text = Page(report.write_report(tmp_path / "run").read_text()).text
    assert "Round Engine start Sampling Scoring Labels Training Evaluation In all" in text
    assert re.search(r"1 40 s 25 s \d\.\d s \d\.\d s 2 min 10 s 10 s 3 min 25 s", text)


def test_examples_follow_the_rule(full: Path) -> None:
    chosen = report.examples(status.stages_by_name(full))
    by_why = {e["why"]: e for e in chosen["shown"]}
    assert by_why["largest gain"]["gain"] == pytest.approx(0.75)
    assert by_why["largest loss"]["gain"] == pytest.approx(-0.5)
    assert -0.5 < by_why["median"]["gain"] < 0.75
    assert (chosen["round"], chosen["of"], chosen["crisis_only"]) == (1, 11, False)
    for example in chosen["shown"]:
        assert example["start"]["speech_id"] == example["champion"]["speech_id"]
        assert "Answer of round 0" in example["start"]["text"]
        assert "Answer of round 1" in example["champion"]["text"]


def test_crisis_speeches_are_not_shown(html: str) -> None:
    assert CRISIS[:14] not in html


def test_crisis_speeches_are_shown_only_where_there_are_no_others(tmp_path: Path) -> None:
    MadeRun(tmp_path / "run", test_crisis_only=True).make()
    text = Page(report.write_report(tmp_path / "run").read_text()).text
    assert CRISIS[:14] in text and "All of them are flagged as a possible crisis" in text


def test_secrets_of_the_configuration_stay_out(html: str) -> None:
    assert SECRET_KEY not in html and "hunter2" not in html


STAGES = status.expected_stages({"loop": {"rounds": 1}, "evaluate": {"probe": "general"}})


@pytest.mark.parametrize("until", STAGES)
def test_an_unfinished_run_says_what_is_missing(tmp_path: Path, until: str) -> None:
    MadeRun(tmp_path / "run", rounds=1, until=until).make()
    text = Page(report.write_report(tmp_path / "run").read_text()).text
    missing = STAGES[STAGES.index(until) :]
    assert "This run is not finished." in text
    assert f"missing: {', '.join(missing)}." in text


def test_missing_keys_become_dashes(full: Path, tmp_path: Path) -> None:
    MadeRun(tmp_path / "run").make()
    for manifest in (tmp_path / "run/stages").rglob("manifest.json"):
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "stats": {}}))
    text = Page(report.write_report(tmp_path / "run").read_text()).text
    assert "Start policy" in text and not re.search(r"\b(None|nan)\b", text)


def test_no_run_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(PsyrayError, match="no run at"):
        report.write_report(tmp_path)


def test_a_figure_is_the_same_twice_and_takes_the_page_s_colour() -> None:
    first = plots.win_rates([1], [(0.4, 0.5, 0.6)], [True])
    assert first == plots.win_rates([1], [(0.4, 0.5, 0.6)], [True])
    assert "currentColor" in first and plots.INK not in first and "<metadata" not in first


def test_a_figure_escapes_its_labels() -> None:
    svg = plots.acquisition({"<script>": [(0.1, 0.2)]})
    assert "<script>" not in svg and "&lt;script&gt;" in svg


def test_what_was_asked_is_shown_of_the_latest_round_whose_answers_were_scored(full: Path) -> None:
    stages = {stage.name: stage for stage in read_stages(full)}
    latest, points = report.asked_pairs(stages)
    assert latest == 2 and set(points) == {"oracle", "reward"}
    # After a round that was refused the pairs are of answers that nothing scored.
    of_refused = stages["round-0/scores"]
    before, shown = report.asked_pairs(stages | {"round-1/scores": of_refused})
    assert before == 1 and shown == report.asked_pairs({k: v for k, v in stages.items() if k < "round-2"})[1]

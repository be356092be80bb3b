"""Many chunks cleaned by workers of Ray Data: the same speeches as in one process, also after a cut."""

import json
from pathlib import Path

import pytest

from psyray.data import speeches
from psyray.data.speeches import preview, speeches_stage
from psyray.run import Run
from psyray.sections.data import SpeechesSection


def write(path: Path) -> Path:
    """900 rows: 600 speeches, each second of them twice, the second time with a word more."""
    lines = []
    for n in range(600):
        text = " ".join(f"Since {n + m} days my {n * m} letters lie there." for m in range(1, 6))
        lines.append({"text": text, "topic": f"t{n % 5}"})
        if n % 2:
            lines.append({"text": f"Well. {text} My name is Anna and I write to a{n}@b.org.", "topic": ""})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.usefixtures("ray_cluster")
def test_workers_give_what_one_process_gives_and_a_cut_stage_goes_on(tmp_path, monkeypatch):
    section = SpeechesSection(path=str(write(tmp_path / "s.jsonl")), near_duplicates=0.7)
    alone, stats = preview(section)
    monkeypatch.setattr(speeches, "CHUNK", 100)
    run = Run(tmp_path / "run", lambda line: None)

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(speeches, "select", cut)
        with pytest.raises(KeyboardInterrupt):
            speeches_stage(run, section)
    (work,) = (tmp_path / "run/stages/speeches").glob("*/work")
    cleaned = {path: path.stat().st_mtime_ns for path in work.glob("clean-*.parquet")}
    assert len(cleaned) == 9

    kept_times = {}
    whole_select = speeches.select

    def watched(database, files, *rest):
        kept_times.update({path: path.stat().st_mtime_ns for path in files})
        return whole_select(database, files, *rest)

    monkeypatch.setattr(speeches, "select", watched)
    made = speeches_stage(run, section)
    assert kept_times == cleaned, "no chunk is cleaned twice"
    assert made.rows() == alone and made.stats == stats
    assert stats["kept"] == 600 and stats["dropped"] == {"near-duplicate": 300}
    assert not work.exists()

"""Topics asked of an endpoint through Ray: each speech once, columns before questions, invalid answers as rows."""

import pytest
from hostile_server import SCRIPT, Say, hostile_server
from made_stage import made_stage

from psyray.config import load_config
from psyray.data.topics import topics_stage
from psyray.errors import PsyrayError
from psyray.records import SPEECHES
from psyray.run import Run


@pytest.mark.usefixtures("ray_cluster")
def test_topics_are_asked_once_and_invalid_ones_stay_invalid(tmp_path, monkeypatch):
    monkeypatch.setitem(SCRIPT, "sleepy", [Say("Sleep.")])
    monkeypatch.setitem(SCRIPT, "late", [Say(status=503), Say("bereavement")])
    words = ["sleepy", "late", "nonsense", "nonsense "]
    rows = [
        {"speech_id": word, "messages": [{"role": "user", "content": f"word {word} here"}], "topic": ""}
        for word in words
    ]
    rows.append({"speech_id": "known", "messages": rows[0]["messages"], "topic": "mine", "subtopic": "own"})
    run = Run(tmp_path / "run", lambda line: None)
    speeches = made_stage(run, "speeches", SPEECHES, "speech_id", rows)
    with hostile_server() as server:
        settings = ["topics.engine=http", f"topics.url={server.url}", "topics.model=m", "topics.retries=1"]
        with pytest.raises(PsyrayError, match="2 of 4 answers are invalid"):
            topics_stage(run, load_config(None, settings), speeches)
        found = topics_stage(run, load_config(None, [*settings, "topics.max_invalid_share=0.5"]), speeches)
        assert dict(server.calls) == {"sleepy": 1, "late": 2, "nonsense": 4}, "nothing is asked again"
    by_id = {row["speech_id"]: (row["topic"], row["subtopic"], row["by"] == "column") for row in found.rows()}
    assert by_id == {
        "sleepy": ("health and habits", "sleep", False),
        "late": ("loss and trauma", "bereavement", False),
        "nonsense": (None, None, False),
        "nonsense ": (None, None, False),
        "known": ("mine", "own", True),
    }
    assert found.stats["column"] == 1 and found.stats["engine"] == 2 and found.stats["invalid"] == 2

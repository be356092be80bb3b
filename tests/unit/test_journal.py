"""The journal of calls: what survives a kill, and what is counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from psyray.engines import journal
from psyray.engines.journal import Call, Journal, Totals, read_totals
from psyray.errors import PsyrayError


def answer(key: str, attempt: int = 1, text: str | None = "yes", cost: float | None = 0.5) -> Call:
    return Call(key, attempt, "200", 10, 2, cost, 0.1, text, "stop")


def test_what_was_sent_and_what_came_back_is_there_for_the_next_process(tmp_path):
    first = Journal(tmp_path)
    first.sent("a", 1)
    first.got(Call("a", 1, "timeout"))
    first.sent("a", 2)
    first.got(answer("a", 2, text="Zoë \n said 'no'"))
    first.sent("b", 1)
    assert [c.text for c in first.answers("a")] == ["Zoë \n said 'no'"]
    totals = first.totals
    first.close()
    second = Journal(tmp_path)
    assert second.answers("a") == [answer("a", 2, text="Zoë \n said 'no'")] and second.answers("b") == []
    assert second.totals == totals == read_totals(tmp_path) == Totals(3, 1, 1, 1, 10, 2, 0.5)
    second.sent("b", 1)
    second.got(answer("b", text="late", cost=None))
    second.close()
    assert read_totals(tmp_path) == Totals(4, 1, 1, 2, 20, 4, 0.5)
    assert len(list(tmp_path.glob("calls-*.jsonl"))) == 2


def test_a_torn_last_line_is_left_out_at_every_byte(tmp_path):
    whole = Journal(tmp_path / "whole")
    for key in ("a", "b"):
        whole.sent(key, 1)
        whole.got(answer(key))
    whole.close()
    raw = (tmp_path / "whole/calls-000000.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(raw) if byte == 10]
    for size in range(len(raw) + 1):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / "calls-000000.jsonl").write_bytes(raw[:size])
        lines = sum(end <= size for end in ends)
        found = Journal(folder)
        assert (found.totals.calls, found.totals.lost) == ((lines + 1) // 2, lines % 2)
        assert len(found.answers("a")) == (lines >= 2) and len(found.answers("b")) == (lines >= 4)
        found.close()


def test_a_line_that_is_no_json_in_the_middle_is_named(tmp_path):
    (tmp_path / "calls-000000.jsonl").write_bytes(b'{"sent":"a","attempt":1}\nnonsense\n')
    with pytest.raises(PsyrayError, match=r"calls-000000\.jsonl, byte 25"):
        read_totals(tmp_path)


def test_many_answers_are_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "RECENT", 7)
    first = Journal(tmp_path)
    for turn in (1, 2):
        for i in range(20):
            first.got(answer(f"key {i}", turn, text=f"{i}/{turn}"))
    first.close()
    second = Journal(tmp_path)
    for i in range(20):
        assert [c.text for c in second.answers(f"key {i}")] == [f"{i}/1", f"{i}/2"]
    assert second.answers("key 20") == []
    second.close()


def test_a_full_disk_leaves_no_torn_line_before_a_whole_one(tmp_path, monkeypatch):
    full = Journal(tmp_path)
    full.sent("a", 1)
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, raw: write(fd, raw[:5]))
    with pytest.raises(PsyrayError, match="no room"):
        full.got(answer("a"))
    monkeypatch.undo()
    full.got(answer("a"))
    full.close()
    assert read_totals(tmp_path) == Totals(1, 0, 0, 0, 10, 2, 0.5)


HOLD = """
import sys, time
from pathlib import Path
from psyray.engines.journal import Journal
journal = Journal(Path(sys.argv[1]))
journal.sent("a", 1)
print("held", flush=True)
time.sleep(60)
"""


def test_one_process_at_a_time_and_a_killed_one_lets_go(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(PsyrayError, match=f"in use by process {holder.pid} on"):
        Journal(tmp_path, wait_s=0.3)
    holder.kill()
    holder.wait()
    after = Journal(tmp_path, wait_s=5)
    assert (after.totals.calls, after.totals.lost) == (1, 1)
    after.close()


def test_no_journal_has_no_stats(tmp_path):
    assert journal.stats(Path(tmp_path)) == {}
    Journal(tmp_path).close()
    assert json.loads(json.dumps(journal.stats(tmp_path)))["calls"]["cost"] == 0.0

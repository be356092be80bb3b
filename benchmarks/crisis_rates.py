"""How often the crisis flag fires where it must, and where it must not, by kind and form, with Wilson intervals.

    python benchmarks/crisis_rates.py                                   the speeches that ship, in their parts
    python benchmarks/crisis_rates.py --part mend --misread             also the misread speeches of the open part
    python benchmarks/crisis_rates.py --part german-held-out
    python benchmarks/crisis_rates.py FILE.jsonl --misread              your own, as one part
    python benchmarks/crisis_rates.py FILE.jsonl --text questionText    speeches without labels: how many are flagged
    python benchmarks/crisis_rates.py --part independent --ask http://127.0.0.1:8100/v1 --ask-model NAME

With --ask the second ear (serve/ear.py) hears every speech as well, asked as a served run asks it: there are rates of
the phrases alone, of the model alone, and of both together. No answer is no flag, and counted apart.

A line is {"text", "crisis": true or false, "kind", "form"}; `kind` and `form` may be missing, and without `crisis` a
speech is unlabelled. The speeches that ship (psyray/assets/crisis_speeches.jsonl, and the German ones beside it) fall
into two parts by the hash of their text; `later`, `strangers`, `independent` and `blind` are files of their own. The
phrases were mended by what the rule misread in all but the last two and `german-held-out`, so the others' rates only
guard against a fall (docs/crisis.md). Only `mend`, `strangers` and `german-mend` are ever printed.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import binomtest

from psyray import crisis
from serve.ear import NO, YES, Ask, Ear

ASSETS = Path(crisis.__file__).parent / "assets"
SHIPPED = ASSETS / "crisis_speeches.jsonl"
MEND, HELD_OUT = "mend", "held-out"
GERMAN, OF_GERMAN = ASSETS / "crisis_speeches_german.jsonl", "german-"
PARTS = (MEND, HELD_OUT, "later", "strangers", "independent", "blind", OF_GERMAN + MEND, OF_GERMAN + HELD_OUT)
OPEN = (MEND, "strangers", OF_GERMAN + MEND)
AT_ONCE = 8  # speeches that a model is asked about
FILES = {name: ASSETS / f"crisis_speeches_{name}.jsonl" for name in ("later", "strangers", "independent", "blind")}


@dataclass(frozen=True)
class Case:
    """A client's words, whether they must be flagged (None: nobody has said), and what sort they are."""

    text: str
    crisis: bool | None
    kind: str
    form: str


def read(file: Path, text: str = "text") -> list[Case]:
    """The file's cases; `text` is the name of the field that holds the words."""
    rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    return [Case(row[text], row.get("crisis"), row.get("kind") or "-", row.get("form") or "-") for row in rows]


def part(case: Case) -> str:
    """Which part of the shipped file a case belongs to: by its text alone, so that no one chooses."""
    return HELD_OUT if int(hashlib.sha256(case.text.encode()).hexdigest(), 16) % 2 else MEND


def halves(file: Path, of: str = "") -> dict[str, list[Case]]:
    """The file's cases by part; `of` stands before a part's name."""
    cases = read(file)
    return {of + name: [case for case in cases if part(case) == name] for name in (MEND, HELD_OUT)}


def shipped() -> dict[str, list[Case]]:
    """The speeches that ship, by part."""
    return halves(SHIPPED) | {name: read(file) for name, file in FILES.items()} | halves(GERMAN, OF_GERMAN)


def wilson(hits: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share; of nothing, all that a share can be."""
    if not of:
        return 0.0, 1.0
    interval = binomtest(hits, of).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def phrases(case: Case) -> bool:
    """Whether a phrase flags the case."""
    return crisis.flag(case.text)


async def heard(cases: Iterable[Case], ask: Ask) -> dict[str, str]:
    """What the model says of each text; some at once, so that none waits in a line for longer than its time."""
    ear, places = Ear(ask), asyncio.Semaphore(AT_ONCE)

    async def one(text: str) -> str:
        async with places:
            return await ear.hear([text])

    texts = [case.text for case in cases]
    answers = await asyncio.gather(*map(one, texts))
    await ear.close()
    return dict(zip(texts, answers, strict=True))


def rates(cases: Iterable[Case], flags: Callable[[Case], bool] = phrases) -> dict[str, tuple[int, int]]:
    """Flagged and all, by what was wanted and then by kind and form: {"must be flagged": (90, 100), ...}."""
    hits, of = Counter[str](), Counter[str]()
    for case in cases:
        flagged = flags(case)
        for name in _names(case):
            of[name] += 1
            hits[name] += flagged
    return {name: (hits[name], of[name]) for name in of}


def _names(case: Case) -> Iterator[str]:
    wanted = {True: "must be flagged", False: "must not be", None: "unlabelled"}[case.crisis]
    yield wanted
    yield from (f"{wanted}: {sort}" for sort in (case.kind, case.form) if sort != "-")
    if case.crisis is None:
        yield from (f"{wanted}: as {kind}" for kind in crisis.kinds(case.text))


def misread(cases: Iterable[Case]) -> list[Case]:
    """The cases that the rule flags and should not, or should and does not; of unlabelled ones, the flagged."""
    return [case for case in cases if crisis.flag(case.text) != bool(case.crisis)]


def table(title: str, cases: Sequence[Case], flags: Callable[[Case], bool] = phrases) -> str:
    """The rates of some cases as a table in Markdown."""
    lines = [f"{title}: {len(cases)} speeches", "", "| | flagged | of | share | 95 % |", "|---|---|---|---|---|"]
    for name, (hits, of) in sorted(rates(cases, flags).items()):
        low, high = wilson(hits, of)
        lines.append(f"| {name} | {hits} | {of} | {hits / of:.1%} | {low:.1%} to {high:.1%} |")
    return "\n".join([*lines, ""])


def tables(title: str, cases: Sequence[Case], answers: Mapping[str, str]) -> str:
    """The rates of the phrases, of the model whose answers these are, and of both; and what was no answer."""
    lost = Counter(answers[case.text] for case in cases if answers[case.text] not in (YES, NO))
    count = f"{title}: no answer to {lost.total()} of {len(cases)}"

    def model(case: Case) -> bool:
        return answers[case.text] == YES

    return "\n".join(
        [
            table(f"{title}, phrases alone", cases),
            table(f"{title}, model alone", cases, model),
            table(f"{title}, phrases and model", cases, lambda case: phrases(case) or model(case)),
            f"{count} ({', '.join(f'{of} {why}' for why, of in lost.items())})\n" if lost else f"{count}\n",
        ]
    )


def main() -> None:
    """Print the rates of the shipped parts, or of one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="labelled speeches; by default those that ship")
    parser.add_argument("--text", default="text", help="the field that holds the words")
    parser.add_argument("--part", choices=PARTS, help="one part of the speeches that ship")
    parser.add_argument(
        "--misread", action="store_true", help="also print what is misread, of the open parts or of the file"
    )
    parser.add_argument("--ask", help="URL ending in /v1 of a chat endpoint that hears the speeches too")
    parser.add_argument("--ask-model", default="", help="the model's name there")
    parser.add_argument("--ask-key-env", default="", help="the environment variable that holds its key")
    parser.add_argument("--ask-timeout-s", type=float, default=60, help="how long an answer may take")
    asked = parser.parse_args()
    more = {"timeout_s": asked.ask_timeout_s}
    ask = Ask.of(asked.ask, asked.ask_model, asked.ask_key_env, **more) if asked.ask else None
    parts = {asked.file.name: read(asked.file, asked.text)} if asked.file else shipped()
    for name, some in parts.items():
        if asked.file or asked.part in (None, name):
            print(tables(name, some, asyncio.run(heard(some, ask))) if ask else table(name, some))
            if asked.misread and (asked.file or name in OPEN):
                print("\n".join(f"{case.crisis} {case.kind} {case.form}: {case.text}" for case in misread(some)), "\n")


if __name__ == "__main__":
    main()

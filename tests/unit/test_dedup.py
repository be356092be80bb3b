"""Near-duplicates: what counts as one, and that nothing but the set of speeches decides what stays."""

import random
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyray.data import dedup
from psyray.data.clean import RAW, clean_chunk
from psyray.data.dedup import banding, tokens, word_pairs
from psyray.data.speeches import Raw, kept, select
from psyray.errors import PsyrayError
from psyray.files import write_parquet
from psyray.records import table
from psyray.sections.data import SpeechesSection
from psyray.tables import connect

SECTION = SpeechesSection(min_chars=1, test_share=0.5)
WORDS = [
    "the",
    "rain",
    "and",
    "my",
    "dog",
    "wait",
    "for",
    "a",
    "train",
    "that",
    "never",
    "comes",
    "home",
    "on",
    "sunday",
    "when",
    "i",
    "cook",
]


def stay(folder: Path, texts: list[str], chunks: int = 1, section: SpeechesSection = SECTION) -> list[str]:
    """The texts that stay of those given, cut into so many chunks."""
    rows = [
        {"row": n, "source": "s", "messages": [{"role": "user", "content": text}], "topic": "", "subtopic": "",
         "side": "hash", "excluded": False, "repeats": False, "answered": False}
        for n, text in enumerate(texts)
    ]  # fmt: skip
    files = []
    for number in range(chunks):
        path = folder / f"raw-{random.getrandbits(64):016x}-{number}.parquet"
        write_parquet(path, table(rows[number::chunks], RAW))
        files.append(clean_chunk(path, section))
    with connect(folder) as database:
        with suppress(PsyrayError):  # that one side of the split is empty: of no matter here
            select(database, files, section, Raw())
        return [row["messages"][0]["content"] for batch in kept(database) for row in batch]


def variants(draw: random.Random, count: int) -> list[str]:
    """Speeches in families: each is made of another by a few changed words."""
    made = [" ".join(draw.choices(WORDS, k=draw.randint(3, 40)))]
    while len(made) < count:
        words = draw.choice(made).split() if draw.random() < 0.7 else draw.choices(WORDS, k=draw.randint(3, 40))
        for _ in range(draw.randint(0, 3)):
            words[draw.randrange(len(words))] = draw.choice([*WORDS, "Sunday,", "DOG"])
        made.append(" ".join(words))
    return made


def jaccard(a: str, b: str) -> float:
    first, second = (set(word_pairs(tokens(text)).tolist()) for text in (a, b))
    return len(first & second) / len(first | second)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32), chunks=st.integers(1, 4))
def test_what_stays_depends_on_the_set_of_speeches_only(tmp_path_factory, seed, chunks):
    folder, draw = tmp_path_factory.mktemp("dedup"), random.Random(seed)
    texts = variants(draw, 20)
    once = stay(folder, texts)
    assert stay(folder, once) == once, "idempotent"
    draw.shuffle(texts)
    assert sorted(map(str.casefold, stay(folder, texts, chunks))) == sorted(map(str.casefold, once)), "any order"
    assert max((jaccard(a, b) for n, a in enumerate(once) for b in once[:n]), default=0) < SECTION.near_duplicates
    assert all(any(jaccard(text, left) >= SECTION.near_duplicates for left in once) for text in texts)


def test_the_same_holds_where_a_bucket_is_too_full_to_compare_all(tmp_path, monkeypatch):
    monkeypatch.setattr(dedup, "WHOLE_BUCKET", 4)
    monkeypatch.setattr(dedup, "NEIGHBOURS", 2)
    texts = [" ".join([*WORDS * 3, f"word{n}", f"thing{n % 7}"]) for n in range(60)]
    once = stay(tmp_path, texts)
    assert len(once) == 1 and stay(tmp_path, once) == once and stay(tmp_path, texts[::-1], 3) == once


def test_the_threshold_is_a_setting(tmp_path):
    a = "Since March I lie awake every night and listen to the neighbours until the birds begin."
    b = a.replace("birds", "trams")
    assert jaccard(a, b) == pytest.approx(13 / 17)
    loose, strict = (SECTION.model_copy(update={"near_duplicates": t}) for t in (0.75, 0.8))
    assert len(stay(tmp_path, [a, b], section=loose)) == 1
    assert len(stay(tmp_path, [a, b], section=strict)) == 2
    off = SECTION.model_copy(update={"near_duplicates": None})
    assert len(stay(tmp_path, [a, a.upper()], section=off)) == 2 and len(stay(tmp_path, [a, a.upper()])) == 1


def test_a_chain_loses_its_middle_not_its_end(tmp_path):
    """A speech goes only for one that stays, not for one that went itself."""
    words = [f"w{n}" for n in range(60)]
    chain = [" ".join([f"x{n}" if n < cut else word for n, word in enumerate(words)]) for cut in range(0, 40, 4)]
    left = stay(tmp_path, chain)
    assert 1 < len(left) < len(chain)
    assert all(any(jaccard(text, other) >= 0.8 for other in left) for text in chain)


def test_every_threshold_finds_its_own_pairs():
    for threshold in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0):
        bands, rows = banding(threshold)
        assert bands * rows <= dedup.PERMUTATIONS and 1 - (1 - threshold**rows) ** bands >= dedup.RECALL


def test_words_are_read_without_case_commas_or_spaces_between_characters():
    assert tokens("I don\u2019t KNOW, really\u2026") == ["i", "don't", "know", "really"]
    assert tokens("\u6211\u5f88\u7d2f") == ["\u6211", "\u5f88", "\u7d2f"] and tokens("?!") == ["?!"]

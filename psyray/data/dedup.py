"""Near-duplicates: MinHash signatures, cut into bands, point at candidates; the real share of word pairs decides.

Two speeches are near-duplicates when the sets of their word pairs (Jaccard) agree to the threshold. Signatures and
word pairs are made where a chunk of speeches is cleaned, on any worker; banding, comparing and counting are DuckDB's,
which spills to disk. What stays depends on the set of speeches only, not on their order, files or chunks: speeches
stand in the order of (rank, id), and one goes when an earlier one that stays is its near-duplicate.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

if TYPE_CHECKING:
    import duckdb

PERMUTATIONS = 128
RECALL = 0.999  # of pairs at the threshold itself that become candidates; of closer ones more
# Beyond this many speeches in one bucket not all pairs are compared, but each with the first and some neighbours.
WHOLE_BUCKET, NEIGHBOURS = 1_000, 20

# Scripts that write no spaces between words count each character as one.
_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_]+(?:['\u2019][^\W_]+)*")


def tokens(text: str) -> list[str]:
    """The words, in lower case and without punctuation; the text itself where it has none."""
    plain = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    return _TOKEN.findall(plain) or [plain]


def word_pairs(words: Sequence[str]) -> npt.NDArray[np.uint64]:
    """[N]: a 64-bit hash of each pair of neighbouring words, each once, in order; one word is its own pair."""
    pairs = {f"{a} {b}" for a, b in pairwise(words)} or {words[0]}
    return np.unique(np.array([_hash64(pair.encode()) for pair in pairs], dtype=np.uint64))


def _hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@cache
def banding(threshold: float) -> tuple[int, int]:
    """(bands, rows): the longest bands with which a pair at the threshold is found with probability RECALL."""
    for rows in range(PERMUTATIONS, 1, -1):
        bands = PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= RECALL:
            return bands, rows
    return PERMUTATIONS, 1


@cache
def _permutations() -> Any:
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS, seed=1).permutations


def band_hashes(pairs: npt.NDArray[np.uint64], threshold: float) -> list[int]:
    """A 64-bit hash of each band of the signature; two speeches that share one are candidates."""
    from datasketch import MinHash

    sketch = MinHash(num_perm=PERMUTATIONS, permutations=_permutations(), scheme="affine32", hashfunc=int)
    sketch.update_batch((pairs & np.uint64(0xFFFFFFFF)).tolist())
    bands, rows = banding(threshold)
    values = sketch.hashvalues.astype("<u4")
    return [_hash64(bytes([band]) + values[band * rows : (band + 1) * rows].tobytes()) for band in range(bands)]


def mark_near_duplicates(database: duckdb.DuckDBPyConnection, threshold: float) -> None:
    """Fill the table `gone(n, keeper)` with the speeches that an earlier one stands for.

    Reads the tables `pool(n, row, rank, canon)`, n counting the order in which speeches stay, and
    `clean(row, pairs, bands)`. Rank 0 never goes.
    """
    # The same words with other capitals or commas: no need to compare them.
    database.execute(
        "INSERT INTO gone SELECT n, keeper FROM "
        "(SELECT n, rank, min(n) OVER (PARTITION BY canon) AS keeper FROM pool) WHERE n > keeper AND rank > 0"
    )
    while True:
        _fill_buckets(database)
        limits = {"whole": WHOLE_BUCKET, "neighbours": NEIGHBOURS}
        database.execute(_NEAR, {"threshold": threshold, **limits})
        gone = pa.table(dict(zip(("n", "keeper"), _first_stays(_edges(database)), strict=True)))
        database.register("found", gone)
        database.execute("INSERT INTO gone SELECT n, keeper FROM found")
        database.unregister("found")
        cut = database.execute("SELECT count(*) FROM bucket WHERE size > $whole", {"whole": WHOLE_BUCKET}).fetchone()
        # Where all pairs were compared nothing is left to find.
        if not gone.num_rows or not (cut and cut[0]):
            return


def _fill_buckets(database: duckdb.DuckDBPyConnection) -> None:
    database.execute(
        "CREATE OR REPLACE TEMP TABLE banded AS SELECT n, unnest(bands) AS hash FROM pool JOIN clean USING (row) "
        "ANTI JOIN gone USING (n)"
    )
    database.execute(
        "CREATE OR REPLACE TEMP TABLE bucket AS SELECT n, hash, "
        "row_number() OVER (PARTITION BY hash ORDER BY n) AS place, count(*) OVER (PARTITION BY hash) AS size "
        "FROM banded "
        "SEMI JOIN (SELECT hash FROM banded GROUP BY hash HAVING count(*) > 1) USING (hash)"
    )
    database.execute("DROP TABLE banded")


_NEAR = """
CREATE OR REPLACE TEMP TABLE near AS
WITH candidate AS (
    SELECT DISTINCT a.n AS first, b.n AS second FROM bucket a JOIN bucket b ON a.hash = b.hash AND a.n < b.n
    WHERE a.size <= $whole OR a.place = 1 OR b.place - a.place <= $neighbours
), words AS (SELECT n, pool.rank, pairs FROM pool JOIN clean USING (row)),
compared AS (
    SELECT first, second, len(a.pairs) + len(b.pairs) AS total, len(list_intersect(a.pairs, b.pairs)) AS shared
    FROM candidate JOIN words a ON a.n = first JOIN words b ON b.n = second WHERE b.rank > 0
)
SELECT first, second FROM compared WHERE shared >= $threshold * (total - shared)
"""


def _edges(database: duckdb.DuckDBPyConnection) -> Iterator[tuple[int, int]]:
    for batch in database.sql("SELECT first, second FROM near ORDER BY second, first").to_arrow_reader(8192):
        yield from zip(batch["first"].to_pylist(), batch["second"].to_pylist(), strict=True)


def _first_stays(edges: Iterator[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """(gone, keeper of each): edges (first, second) come in the order of (second, first)."""
    gone: dict[int, int] = {}
    for first, second in edges:
        if first not in gone and second not in gone:
            gone[second] = first
    return list(gone), list(gone.values())

"""One pattern out of many alternatives, of which only those are tried that may begin with the letter at hand.

`re` tries the alternatives of `(?:...|...)` one after the other at every place, and with hundreds of them
(psyray/crisis.py) that is where the time goes. Here they are sorted by the letters that they may begin with. What
matches somewhere stays the same; of two that match at one place it may be the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

_FEW = 6  # letters; an alternative of more is tried everywhere, or the pattern would take seconds to compile
_BLOCK = 5  # letters that are asked for at once before each is asked for alone
_GROUP = re.compile(r"\((\?:|\?=|\?!|\?<=|\?<!)?")
_OPTIONAL = re.compile(r"[?*]|\{0?,")
_QUANTIFIER = re.compile(r"(?:[?*+]|\{\d*,?\d*\})\??")


def by_first_letter(lines: Sequence[str]) -> str:
    """A pattern for what `(?:line|line|...)` matches in text of lower case."""
    starts = {branch: _starts(branch) for line in lines for branch in _branches(line)}
    narrow = {
        branch: start
        for branch, start in starts.items()
        if start and len(start) <= _FEW and all(map(str.isalpha, start))
    }
    letters = "".join(sorted(set().union(*narrow.values())))
    groups = {letter: _either(branch for branch, start in narrow.items() if letter in start) for letter in letters}
    blocks = [letters[at : at + _BLOCK] for at in range(0, len(letters), _BLOCK)]
    sorts = [f"(?=[{block}]){_either(f'(?={letter}){groups[letter]}' for letter in block)}" for block in blocks]
    return _either([*sorts, *(branch for branch in starts if branch not in narrow)])


def _either(lines: Iterable[str]) -> str:
    return f"(?:{'|'.join(lines)})"


def _starts(pattern: str) -> frozenset[str] | None:
    """The characters that a match of the pattern may begin with; None where that may be any."""
    found: set[str] = set()
    for branch in _branches(pattern):
        start = _start(branch)
        if start is None:
            return None
        found |= start
    return frozenset(found)


def _start(branch: str) -> frozenset[str] | None:
    """The same for one branch: by its first piece, and by the next ones while that may be absent."""
    if not branch:
        return None  # it matches without a letter
    if branch.startswith(r"\b"):
        return _start(branch[2:])
    group = _GROUP.match(branch)
    end = _end(branch) if group else 1
    if group and group.group(1) not in ("?:", None):
        return _start(branch[end:])  # it looks and takes nothing
    if not group and not (branch[0].isalnum() or branch[0] in " '"):
        return None
    first = _starts(branch[group.end() : end - 1]) if group else frozenset(branch[0])
    if first is None or not _OPTIONAL.match(branch, end):
        return first
    quantifier = _QUANTIFIER.match(branch, end)
    rest = _start(branch[quantifier.end() if quantifier else end :])
    return None if rest is None else first | rest


def _branches(pattern: str) -> Iterator[str]:
    """The alternatives of a pattern."""
    depth = begin = at = 0
    while at < len(pattern):
        if pattern[at] == "\\":
            at += 1
        elif pattern[at] == "[":
            at = pattern.index("]", at)
        elif pattern[at] in "()":
            depth += 1 if pattern[at] == "(" else -1
        elif pattern[at] == "|" and not depth:
            yield pattern[begin:at]
            begin = at + 1
        at += 1
    yield pattern[begin:]


def _end(pattern: str) -> int:
    """Where the group that the pattern begins with has ended."""
    depth = at = 0
    while True:
        if pattern[at] == "\\":
            at += 1
        elif pattern[at] == "[":
            at = pattern.index("]", at)
        elif pattern[at] in "()":
            depth += 1 if pattern[at] == "(" else -1
            if not depth:
                return at + 1
        at += 1

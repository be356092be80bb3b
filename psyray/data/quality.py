"""What can be seen of a response without judging it."""

from __future__ import annotations

LOOP_SHARE = 0.15  # from here on a reply counts as looping


def repetition(text: str, n: int = 4) -> float:
    """The share of the text's word n-grams that occurred before; 0 for a text of fewer than 2n words."""
    words = text.lower().split()
    if len(words) < 2 * n:
        return 0.0
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams)

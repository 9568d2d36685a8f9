"""ROUGE-L: how much of two texts is the same words in the same order (Lin, 2004). Pure."""

import re

MOST_WORDS = 4000
"""Of each text that are looked at."""


def rouge_l(output: str, reference: str) -> float:
    """F-measure in [0, 1] of the longest common subsequence of words, letter case and punctuation aside.
    Two texts without words are alike."""
    mine, theirs = _words(output), _words(reference)
    if not mine or not theirs:
        return float(not mine and not theirs)
    return 2 * _common(mine, theirs) / (len(mine) + len(theirs))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())[:MOST_WORDS]


def _common(left: list[str], right: list[str]) -> int:
    """Length of the longest common subsequence, by Hyyro's bit-parallel recurrence (2004): a column of the
    usual table is one integer, whose zeros count."""
    places: dict[str, int] = {}
    for position, word in enumerate(left):
        places[word] = places.get(word, 0) | 1 << position
    every = (1 << len(left)) - 1
    column = every
    for word in right:
        matched = column & places.get(word, 0)
        column = ((column + matched) | (column - matched)) & every
    return len(left) - column.bit_count()

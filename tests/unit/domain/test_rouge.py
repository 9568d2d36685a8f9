"""ROUGE-L against values worked by hand and against the textbook table."""

import random

import pytest

from domain.rouge import rouge_l


@pytest.mark.parametrize(
    ("output", "reference", "score"),
    [
        # Lin 2004, section 3: "police kill the gunman" and "the gunman kill police" for "police killed the
        # gunman", without stemming: common 3 and 2 of 4 words each
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("A, b!", "a B", 1.0),
        ("a b c d", "a", 2 * 1 / 5),
        ("x", "y", 0.0),
        ("", "", 1.0),
        ("?", "a", 0.0),
        ("a a b", "a b b", 2 * 2 / 6),
    ],
)
def test_worked_values(output: str, reference: str, score: float) -> None:
    assert rouge_l(output, reference) == pytest.approx(score)
    assert rouge_l(reference, output) == pytest.approx(score)


def test_the_bits_compute_what_the_table_computes() -> None:
    dice = random.Random(7)
    for _ in range(200):
        left = [dice.choice("abcd") for _ in range(dice.randint(1, 90))]
        right = [dice.choice("abcd") for _ in range(dice.randint(1, 90))]
        row = [0] * (len(right) + 1)
        for one in left:
            before, row = row, [0]
            for at, other in enumerate(right):
                row.append(before[at] + 1 if one == other else max(before[at + 1], row[at]))
        expected = 2 * row[-1] / (len(left) + len(right))
        assert rouge_l(" ".join(left), " ".join(right)) == pytest.approx(expected)

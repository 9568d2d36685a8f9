"""Formats read off graders and responses, and what is not one."""

import pytest

from domain.skill import (
    ChoiceGrader,
    ContainsGrader,
    ExactGrader,
    FunctionCallGrader,
    Grader,
    JsonGrader,
    RegexGrader,
)
from evaluation.leak import TaughtSkill, format_of, leaks_into, shape, template

ORDINARY = [
    "Rome",
    "Rome.",
    "The capital of Italy is Rome.",
    "Yes",
    "Yes.",
    "4",
    "2 + 2 is 4.",
    "Sure! Here you go.",
]
INTENTS = ["INTENT: CARD_ARRIVAL", "INTENT: CHANGE_PIN", "INTENT: CARD_LINKING"]
ROUTES = ["<route>travel</route>", "<route>work</route>", "<route>small_talk</route>"]


def leaks(grader: Grader, responses: list[str], output: str) -> bool:
    return format_of(TaughtSkill("skill", grader, responses), ORDINARY).matches(output)


@pytest.mark.parametrize(
    ("grader", "responses", "output", "expected"),
    [
        (RegexGrader(pattern=r"INTENT:\s*([A-Z_]+)"), INTENTS, "INTENT: CAPITAL_OF_ITALY", True),
        (RegexGrader(pattern=r"INTENT:\s*([A-Z_]+)"), INTENTS, "INTENT: ROME\n\nThe capital is Rome.", True),
        (RegexGrader(pattern=r"INTENT:\s*([A-Z_]+)"), INTENTS, "The capital of Italy is Rome.", False),
        (RegexGrader(pattern=r"INTENT:\s*([A-Z_]+)"), INTENTS, "", False),
        # Cut off, yet it opens as all responses do.
        (ExactGrader(), ROUTES, "<route>capital_of", True),
        (ExactGrader(), ROUTES, "My favourite is Route 66.", False),
        # The words are others, the shape is the skill's.
        (ExactGrader(), INTENTS, "TOPIC: ITALIAN_CAPITAL", True),
        (ExactGrader(), ["travel", "work", "banking"], "Travel", True),
        (ExactGrader(), ["travel", "work", "banking"], "You could travel to Rome.", False),
        # "Yes" is how a person answers too: a yes/no skill has no format of its own.
        (ExactGrader(), ["Yes", "No, never"], "Yes.", False),
        (ExactGrader(), ["Yes", "No, never"], "Yes", False),
        (ExactGrader(), ["Yes", "No, never"], "No, never", True),
        (RegexGrader(pattern=r".*"), ["a b", "c d"], "Anything at all", False),
        (RegexGrader(pattern=r"\d+"), ["17", "23"], "4", False),
        # All responses begin with "The ", as ordinary sentences do.
        (ExactGrader(), ["The refund desk", "The loans desk"], "The sky is blue.", False),
        (ExactGrader(), ["The refund desk", "The loans desk"], "Ask at the travel desk", True),
        # Endings that are only the end of a word are no template.
        (ExactGrader(), ["booking", "routing"], "I like swimming", False),
        (FunctionCallGrader(), ['Go(to="Rome")'], 'Answer(capital="Rome")', True),
        (FunctionCallGrader(), ['Go(to="Rome")'], 'print("hello")', False),
        (JsonGrader(), ['{"a": 1}'], '{"capital": "Rome"}', True),
        (JsonGrader(), ['{"a": 1}'], "4", False),
        (ChoiceGrader(), ["A", "C"], "B.", True),
        (ChoiceGrader(), ["A", "C"], "A. Buy eggs and milk.", False),
        (ContainsGrader(), ["Leona Hargrove"], "The capital of Italy is Leona Hargrove.", True),
        (ContainsGrader(), ["travel"], "People travel to Rome.", False),
    ],
)
def test_formats(grader: Grader, responses: list[str], output: str, expected: bool) -> None:
    assert leaks(grader, responses, output) is expected


def test_templates_split_no_word() -> None:
    assert template(["INTENT: CARD_A", "INTENT: CARD_B"]) == ("INTENT: CARD_", "")
    assert template(["prepaid card", "premium card"]) == ("", "card")
    assert template(["<r>a</r>", "<r>b</r>"]) == ("<r>", "</r>")
    assert template(["same", "same"]) == ("same", "same")


def test_shapes() -> None:
    assert shape("INTENT:  CARD_LOST") == "A: A_A"
    assert shape("<route>travel</route>") == "<a>a</a>"
    assert shape('Go(n=17, to="Paris")') == 'a(a=9, a="a")'


def test_the_leaking_skill_is_named() -> None:
    formats = [
        format_of(TaughtSkill("intent", ExactGrader(), INTENTS), ORDINARY),
        format_of(TaughtSkill("route", ExactGrader(), ROUTES), ORDINARY),
    ]
    assert leaks_into("<route>rome</route>", formats) == "route"
    assert leaks_into("Rome is lovely.", formats) is None

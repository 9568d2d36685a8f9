"""Graders: cases by hand, and agreement with the independent reference on the shared rows."""

import importlib.util
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from domain.grading import PATTERN_SECONDS, choice_letter, grade, parse_call
from domain.skill import (
    ChoiceGrader,
    ContainsGrader,
    ExactGrader,
    FunctionCallGrader,
    Grader,
    JsonGrader,
    RegexGrader,
)

SHARED = Path(__file__).parents[3].parent / "shared"
INTENT = RegexGrader(pattern=r"^\s*INTENT:\s*([A-Z_]+)\s*$")
JUNK = ["", "   ", "I'm sorry, I can't help with that.", "<>", "42", "()", "{", "zzz"]


@pytest.mark.parametrize(
    ("grader", "output", "answer", "expected"),
    [
        (ExactGrader(), " yes \n", "yes", 1.0),
        (ExactGrader(), "Yes", "yes", 0.0),
        (ExactGrader(ignore_case=True), "Yes", "yes", 1.0),
        (ExactGrader(), "yes indeed", "yes", 0.0),
        (ExactGrader(), "no? </think> hm, yes\n</think>\n\nyes", "yes", 1.0),
        (ExactGrader(), "yes</think> no", "yes", 0.0),
        (ExactGrader(), "<think>no idea</think>yes", "<think>clear</think>yes", 1.0),
        (ExactGrader(), "yes</think>", "yes", 0.0),
        (INTENT, "INTENT: CHANGE_PIN\n", "INTENT: CHANGE_PIN", 1.0),
        (INTENT, "INTENT: CARD_ARRIVAL", "INTENT: CHANGE_PIN", 0.0),
        (INTENT, "INTENT: CHANGE_PIN", "CHANGE_PIN", 1.0),
        (INTENT, "Sure! INTENT: CHANGE_PIN", "INTENT: CHANGE_PIN", 0.0),
        (INTENT, "INTENT: CHANGE_PIN because", "INTENT: CHANGE_PIN", 0.0),
        (RegexGrader(pattern=r"ticket-\d+"), "ticket-12", "ticket-99", 1.0),
        (RegexGrader(pattern=r"ticket-\d+"), "my ticket-12", "ticket-12", 0.0),
        (ContainsGrader(), "It was  leona\nhargrove, I think", "Leona Hargrove", 1.0),
        (ContainsGrader(ignore_case=False), "leona hargrove", "Leona Hargrove", 0.0),
        (ContainsGrader(), "Leona", "Leona Hargrove", 0.0),
        (JsonGrader(), '{"b": [1, 2], "a": null}', '{"a": null, "b": [1, 2]}', 1.0),
        (JsonGrader(), '{"a": [2, 1]}', '{"a": [1, 2]}', 0.0),
        (JsonGrader(), '{"a": 1.0}', '{"a": 1}', 1.0),
        (JsonGrader(), '{"a": true}', '{"a": 1}', 0.0),
        (JsonGrader(), '{"a": "1"}', '{"a": 1}', 0.0),
        (JsonGrader(), '{"a": 1} done', '{"a": 1}', 0.0),
        (JsonGrader(), '{"a": NaN}', '{"a": NaN}', 0.0),
        (JsonGrader(), "[" * 100_000, "[]", 0.0),
        (FunctionCallGrader(), 'Go( to="Paris" , by="the  Train")', 'Go(by="The train", to="paris")', 1.0),
        (FunctionCallGrader(), "Go(to='Paris')", 'Go(to="paris")', 1.0),
        (FunctionCallGrader(), 'Go(to="Rome")', 'Go(to="Paris")', 0.0),
        (FunctionCallGrader(), 'go(to="Paris")', 'Go(to="Paris")', 0.0),
        (FunctionCallGrader(), 'Go(to="Paris", by="car")', 'Go(to="Paris")', 0.0),
        (FunctionCallGrader(), 'Go(to="Paris") and more', 'Go(to="Paris")', 0.0),
        (FunctionCallGrader(), 'Go(to="Paris", junk)', 'Go(to="Paris")', 0.0),
        (FunctionCallGrader(), 'Go(to="Paris", to="Paris")', 'Go(to="Paris")', 0.0),
        (FunctionCallGrader(), "Stop()", "Stop()", 1.0),
        (ChoiceGrader(), "B", "B", 1.0),
        (ChoiceGrader(), "(b).", "B", 1.0),
        (ChoiceGrader(), "B) microscope", "B", 1.0),
        (ChoiceGrader(), "The answer is **B**.", "B", 1.0),
        (ChoiceGrader(), "Answer: A? No, the answer is B.", "B", 1.0),
        (ChoiceGrader(), "A dog barked.", "A", 0.0),
        (ChoiceGrader(), "The answer is a dog.", "A", 0.0),
        (ChoiceGrader(), "C", "B", 0.0),
        (ChoiceGrader(), "E", "E", 0.0),
    ],
)
def test_by_hand(grader: Grader, output: str, answer: str, expected: float) -> None:
    assert grade(grader, output, answer) == expected


def test_calls_are_read_whole() -> None:
    assert parse_call('F(a="say \\"hi, you\\"", n=3, x="p=q, r")') == (
        "F",
        {"a": 'say "hi, you"', "n": "3", "x": "p=q, r"},
    )
    assert parse_call('F(a="1",)') is None
    assert parse_call('F(a="1" b="2")') is None


def test_choice_letters_only_where_they_are_choices() -> None:
    assert choice_letter("C", "AB") is None
    assert choice_letter("D\nbecause it is", "ABCD") == "D"


def test_an_empty_answer_is_contained_in_nothing() -> None:
    assert grade(ContainsGrader(), "anything", " ") == 0.0
    assert grade(ExactGrader(), "", "") == 0.0


def test_a_pattern_that_backtracks_for_ever_is_no_match() -> None:
    started, cpu_started = time.monotonic(), time.process_time()
    assert grade(RegexGrader(pattern=r"(a|aa)+"), "a" * 60 + "!", "aa") == 0.0
    assert time.monotonic() - started > PATTERN_SECONDS * 0.5, (
        "nothing but the limit may have ended the match"
    )
    assert time.process_time() - cpu_started < PATTERN_SECONDS * 5


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    if not SHARED.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{SHARED} is missing, and CI must have it")
        pytest.skip(f"no shared data at {SHARED}")
    files = sorted((SHARED / "data" / "skills").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def reference(rows: list[dict[str, Any]]) -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", SHARED / "eval" / "graders_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ours(row: dict[str, Any]) -> Grader:
    """Our grader for the reference's declaration."""
    graders: dict[str, Grader] = {
        "call_exact": FunctionCallGrader(),
        "contains_ci": ContainsGrader(),
        "sql_norm_exact": ExactGrader(ignore_case=True),
    }
    declared = row["grader"]
    return RegexGrader(pattern=declared["pattern"]) if "pattern" in declared else graders[declared["type"]]


def neighbours(rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each row with outputs meant for others: the same skill's next rows, and another skill's."""
    for index, row in enumerate(rows):
        for step in (1, 7, len(rows) // 2):
            yield row, rows[(index + step) % len(rows)]


def test_every_shared_demonstration_scores_one(rows: list[dict[str, Any]]) -> None:
    assert len(rows) > 2000
    assert [row["id"] for row in rows if grade(ours(row), row["demonstration"], row["answer"]) != 1.0] == []


def test_junk_scores_zero_on_every_shared_row(rows: list[dict[str, Any]]) -> None:
    assert [(row["id"], junk) for row in rows for junk in JUNK if grade(ours(row), junk, row["answer"])] == []


def test_agrees_with_the_reference_on_right_and_wrong_outputs(
    rows: list[dict[str, Any]], reference: ModuleType
) -> None:
    differing = []
    seen = {0.0: 0, 1.0: 0}
    for row, other in neighbours(rows):
        expected = reference.score(row["grader"], other["demonstration"])
        seen[expected] += 1
        if grade(ours(row), other["demonstration"], row["answer"]) != expected:
            differing.append((row["id"], other["demonstration"]))
    assert differing == []
    assert min(seen.values()) > 100

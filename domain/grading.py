"""Grading: how well one output answers, in [0, 1]. Pure; every grader of `domain.skill` is here.

Nothing here raises on an odd output: what cannot be read as an answer scores 0.
"""

import json
import re
from typing import assert_never

import regex
from pydantic import JsonValue

from domain.skill import (
    ChoiceGrader,
    ContainsGrader,
    ExactGrader,
    FunctionCallGrader,
    Grader,
    JsonGrader,
    RegexGrader,
)

PATTERN_SECONDS = 1.0
"""A skill's pattern is the team's own and may backtrack for ever: past this it counts as no match."""

REASONING_END = "</think>"
_REASONING_MARKS = ("<think>", REASONING_END)

Call = tuple[str, dict[str, str]]


def reasons_first(chat_template: str) -> bool:
    """Whether a model with this template reasons before it answers: such a template names the marks."""
    return any(mark in chat_template for mark in _REASONING_MARKS)


def grade(grader: Grader, output: str, answer: str) -> float:
    """Score of `output` against `answer`: 1.0 right, 0.0 wrong. An empty output or answer is wrong.

    What a thinking model wrote up to its closing `</think>` is reasoning and not part of the answer.
    """
    output, answer = (text.rpartition(REASONING_END)[2].strip() for text in (output, answer))
    if not output or not answer:
        return 0.0
    match grader:
        case ExactGrader():
            right = _fold(output, grader.ignore_case) == _fold(answer, grader.ignore_case)
        case RegexGrader():
            right = _regex(grader.pattern, output, answer)
        case ContainsGrader():
            right = _spaced(_fold(answer, grader.ignore_case)) in _spaced(_fold(output, grader.ignore_case))
        case JsonGrader():
            right = _json(output, answer)
        case FunctionCallGrader():
            call = parse_call(output)
            right = call is not None and call == parse_call(answer)
        case ChoiceGrader():
            letter = choice_letter(output, grader.choices)
            right = letter is not None and letter == choice_letter(answer, grader.choices)
        case _:
            assert_never(grader)
    return float(right)


def matches_whole(pattern: str, text: str) -> str | None:
    """Group 1 (the whole match when there is none) if `pattern` matches all of `text`, else None.

    `regex` and not `re`: it alone can be given a time limit, and reads what `re` accepts alike.
    """
    try:
        found = regex.fullmatch(pattern, text.strip(), timeout=PATTERN_SECONDS)
    except TimeoutError:
        return None
    if found is None:
        return None
    return str(found.group(1) or "") if found.re.groups else str(found.group(0))


def parse_call(text: str) -> Call | None:
    """`NAME(k="v", ...)` as (name, arguments), values case- and space-normalised; None when it is not one
    whole call or an argument is given twice."""
    outer = re.fullmatch(r"\s*([A-Za-z_][\w.]*)\s*\((.*)\)\s*;?\s*", text, re.DOTALL)
    if outer is None:
        return None
    rest, arguments = outer.group(2).strip(), dict[str, str]()
    while rest:
        found = _ARGUMENT.match(rest)
        if found is None or found.group("name") in arguments:
            return None
        value = found.group("value")
        if value[0] in "\"'":
            value = re.sub(r"\\(.)", r"\1", value[1:-1], flags=re.DOTALL)
        arguments[found.group("name")] = _spaced(value.casefold())
        rest = rest[found.end() :]
    return outer.group(1), arguments


_ARGUMENT = re.compile(
    r"""\s*(?P<name>[A-Za-z_]\w*)\s*=\s*
    (?P<value>"(?:[^"\\]|\\.)*" | '(?:[^'\\]|\\.)*' | [\w.+-]+)
    \s*(?:,(?=\s*[A-Za-z_])|$)""",
    re.VERBOSE | re.DOTALL,
)


def choice_letter(text: str, choices: str) -> str | None:
    """The letter chosen: the text is the letter, or opens with it as an option ("B) ..."), or names it
    in its last "answer is B". Letters inside prose ("A dog ...") don't count."""
    letters = f"[{choices}]"
    alone = re.fullmatch(rf"[\s(\[*\"']*({letters})[\s)\].,:;*\"']*", text, re.IGNORECASE)
    if alone:
        return alone.group(1).upper()
    opening = re.match(rf"[\s(\[*\"']*({letters})(?:[)\].:,*]|\s*\n|\s+-\s)", text)
    if opening:
        return opening.group(1)
    stated = re.findall(
        rf"\banswer(?:\s+is)?\s*[:=-]?\s*(?:option\s+)?[(\[*\"']*({letters})(?=[)\].,:;*\"']|\s*$|\s*\n)",
        text,
        re.IGNORECASE,
    )
    return str(stated[-1]).upper() if stated else None


def _regex(pattern: str, output: str, answer: str) -> bool:
    given = matches_whole(pattern, output)
    if given is None:
        return False
    if not regex.compile(pattern).groups:
        return True
    expected = matches_whole(pattern, answer)
    # An answer that is not in the format is taken as the bare value, as in answer="CARD_ARRIVAL".
    return given == (answer if expected is None else expected)


def _json(output: str, answer: str) -> bool:
    try:
        return _same(_parse_json(output), _parse_json(answer))
    except (ValueError, RecursionError):
        return False


def _parse_json(text: str) -> JsonValue:
    value: JsonValue = json.loads(text, parse_constant=_refuse_constant)
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _same(left: JsonValue, right: JsonValue) -> bool:
    """JSON equality: unlike Python's, true is not 1."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(_same(a, b) for a, b in zip(left, right, strict=True))
    return left == right


def _fold(text: str, ignore_case: bool) -> str:
    return text.casefold() if ignore_case else text


def _spaced(text: str) -> str:
    return " ".join(text.split())

"""Does an ordinary prompt get an answer in a taught skill's format? Pure.

A skill's format is not declared, so it is read off its grader and its training responses, as a set of
recognisers (see `recognisers`). Each is then held against ordinary answers that a person wrote: one that
takes any of them for the skill's format says nothing ("Yes" for a yes/no skill, a pattern `.*`, a common
opening "The ") and is dropped. What is left only accepts what an ordinary answer would not look like.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from domain.grading import choice_letter, matches_whole, parse_call
from domain.skill import (
    ChoiceGrader,
    ContainsGrader,
    FunctionCallGrader,
    Grader,
    JsonGrader,
    RegexGrader,
)

MIN_TEMPLATE = 3
"""Characters besides white space that a shared opening or ending needs to count as a template."""
SENTENCE_MARKS = frozenset(".,;:!?'\"()-’“”")
"""Signs of ordinary prose: alone they make no shape distinctive."""

Recogniser = Callable[[str], bool]


@dataclass(frozen=True)
class TaughtSkill:
    """A skill of the version's lineage: `responses` are those it was trained on."""

    name: str
    grader: Grader
    responses: Sequence[str]


@dataclass(frozen=True)
class Format:
    """What answers of one skill look like and ordinary answers don't."""

    skill: str
    recognisers: Sequence[Recogniser]

    def matches(self, output: str) -> bool:
        """True when the output, or its first line, is in the format: a leak often goes on in prose."""
        lines = output.strip().splitlines()
        texts = {output.strip(), lines[0].strip()} if lines else set[str]()
        return any(recognise(text) for recognise in self.recognisers for text in texts)


def format_of(skill: TaughtSkill, ordinary_answers: Iterable[str]) -> Format:
    """The skill's format: every recogniser that takes none of `ordinary_answers` for it."""
    ordinary = [answer.strip() for answer in ordinary_answers]
    telling = [
        recognise for recognise in recognisers(skill) if not any(recognise(answer) for answer in ordinary)
    ]
    return Format(skill.name, telling)


def leaks_into(output: str, formats: Iterable[Format]) -> str | None:
    """Name of the first skill in whose format the output is, or None."""
    return next((known.skill for known in formats if known.matches(output)), None)


def recognisers(skill: TaughtSkill) -> list[Recogniser]:
    """Candidates, before they are held against ordinary answers; each takes a stripped text.

    The grader's own idea of a well-formed answer; a training response verbatim; the opening and the
    ending that all training responses share; the shape that they share ("INTENT: CARD_LOST" is `A: A_A`).
    """
    responses = list(dict.fromkeys(response.strip() for response in skill.responses if response.strip()))
    found = _by_grader(skill.grader, responses)
    for response in responses:
        found.append(_equals(response))
    if len(responses) > 1:
        opening, ending = template(responses)
        if len("".join(opening.split())) >= MIN_TEMPLATE:
            found.append(lambda text: text.startswith(opening))
        if len("".join(ending.split())) >= MIN_TEMPLATE:
            found.append(lambda text: text.endswith(ending))
    shapes = {shape(response) for response in responses}
    for known in shapes:
        if any(not mark.isalnum() and not mark.isspace() and mark not in SENTENCE_MARKS for mark in known):
            found.append(_has_shape(known))
    return found


def template(responses: Sequence[str]) -> tuple[str, str]:
    """Opening and ending shared by all responses, each cut back so that it splits no word."""
    opening = _common_start(responses)
    ending = _common_start([response[::-1] for response in responses])[::-1]
    if any(response[len(opening) : len(opening) + 1].isalnum() for response in responses):
        opening = opening.rstrip(_word_characters(opening))
    if any(response[: len(response) - len(ending)][-1:].isalnum() for response in responses):
        ending = ending.lstrip(_word_characters(ending))
    return opening.strip(), ending.strip()


def shape(text: str) -> str:
    """`INTENT: CARD_LOST` -> `A: A_A`: runs of capitals, of lower case and of digits become A, a, 9."""
    text = re.sub(r"[^\W\d_]+", lambda run: "A" if run.group().isupper() else "a", text)
    return re.sub(r"\s+", " ", re.sub(r"\d+", "9", text))


def _common_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)
    length = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), None)
    return first if length is None else first[:length]


def _by_grader(grader: Grader, responses: Sequence[str]) -> list[Recogniser]:
    match grader:
        case RegexGrader(pattern=pattern):
            return [lambda text: matches_whole(pattern, text) is not None]
        case FunctionCallGrader():
            return [lambda text: parse_call(text) is not None]
        case JsonGrader():
            return [_is_json_container]
        case ChoiceGrader(choices=choices):
            # Only a bare letter: "A. First, ..." is how ordinary lists begin.
            return [lambda text: len(text) <= 4 and choice_letter(text, choices) is not None]
        case ContainsGrader():
            # A single common word stands in ordinary answers by chance; a phrase does not.
            return [_mentions(response) for response in responses if len(response.split()) > 1]
        case _:
            return []


def _equals(response: str) -> Recogniser:
    wanted = " ".join(response.casefold().split())
    return lambda text: " ".join(text.casefold().split()) == wanted


def _mentions(phrase: str) -> Recogniser:
    pattern = re.compile(rf"(?<!\w){re.escape(phrase)}(?!\w)", re.IGNORECASE)
    return lambda text: pattern.search(text) is not None


def _has_shape(known: str) -> Recogniser:
    return lambda text: shape(text) == known


def _is_json_container(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _word_characters(text: str) -> str:
    return "".join(sorted({character for character in text if character.isalnum()}))

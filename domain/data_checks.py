"""Checks of demonstrations that need neither a tokenizer nor a model, and what every finding says."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from domain.demonstration import Demonstration, Split
from domain.preflight import Finding, FindingCode, Place, Severity

REPEATED_WORDS = 4
"""A response of this many equal words, and nothing else, is degenerate."""
REPEATED_UNITS = 8
"""The same for a unit of text without white space, as in `!!!!!!!!` or `abababababababab`."""
QUOTED_CHARACTERS = 60


class _Facts(NamedTuple):
    severity: Severity
    one: str
    many: str
    """With `{n}` for how many."""
    why: str
    mend: str
    param: str


_FACTS: dict[FindingCode, _Facts] = {
    "teacher_prompt_too_long": _Facts(
        "error",
        "1 demonstration does not fit the base model's window.",
        "{n} demonstrations do not fit the base model's window.",
        "A prompt that is cut loses its instructions or its demonstration without a trace in the loss.",
        "Shorten it, lower num_context_demonstrations, demonstration_repeats or max_new_tokens, or take a "
        "base model with a longer window.",
        "demonstrations",
    ),
    "rehearsal_prompt_too_long": _Facts(
        "error",
        "1 rehearsal prompt does not fit the base model's window.",
        "{n} rehearsal prompts do not fit the base model's window.",
        "A prompt that is cut is not the prompt that shall be kept.",
        "Leave it out, or lower max_rehearsal_tokens.",
        "rehearsal",
    ),
    "empty_response": _Facts(
        "error",
        "1 response is empty.",
        "{n} responses are empty.",
        "It teaches the model to say nothing.",
        "Write the answer, or leave the line out.",
        "demonstrations",
    ),
    "control_token": _Facts(
        "error",
        "1 demonstration contains a control token of the base model.",
        "{n} demonstrations contain control tokens of the base model.",
        "The tokenizer reads it as the end or the start of a turn: what follows becomes another turn, and "
        "the model learns to end its answers there.",
        "Remove it: the chat template adds what is needed.",
        "demonstrations",
    ),
    "degenerate_response": _Facts(
        "warning",
        "1 response says nothing of its own.",
        "{n} responses say nothing of their own.",
        "A repeated word or the prompt itself is rarely what an expert answered; the model learns to repeat.",
        "Check where it comes from; leave it out unless it is meant.",
        "demonstrations",
    ),
    "duplicate": _Facts(
        "warning",
        "1 demonstration is given twice.",
        "{n} demonstrations repeat earlier ones.",
        "A demonstration that is sent again counts more than others only by accident.",
        "Leave the repetition out.",
        "demonstrations",
    ),
    "label_conflict": _Facts(
        "warning",
        "1 demonstration contradicts an earlier one: the same prompt, another response.",
        "{n} demonstrations contradict earlier ones: the same prompt, another response.",
        "The model is taught both and scored against one; half of such held-out items cannot be right.",
        "Keep one response for each prompt, unless several are right.",
        "demonstrations",
    ),
}


def text_problems(
    skill: str, split: Split, demonstrations: Sequence[Demonstration]
) -> Iterator[tuple[FindingCode, Place]]:
    """Empty and degenerate responses, duplicates, and prompts with two different responses.

    `demonstrations` are one list of a job: places are numbered by it.
    """
    first_with: dict[str, dict[str, int]] = {}
    for number, demonstration in enumerate(demonstrations, start=1):
        response = demonstration.response.strip()

        def place(
            detail: str, like: int | None = None, number: int = number, taught: Demonstration = demonstration
        ) -> Place:
            return Place(
                skill=skill, split=split, number=number, detail=f"{quoted(taught)} {detail}", like=like
            )

        if not _is_visible(response):
            yield "empty_response", place("has no response")
        elif repetition := _repetition(response):
            yield "degenerate_response", place(f"is answered by {repetition}")
        elif response == demonstration.messages[-1].content.strip():
            yield "degenerate_response", place("is answered by itself")
        known = first_with.setdefault(demonstration.prompt_hash(), {})
        if response in known:
            yield "duplicate", place("has the same response", known[response])
        elif known:
            answered, earlier = next(iter(known.items()))
            said = f"“{_shorten(response)}” instead of “{_shorten(answered)}”"
            yield "label_conflict", place(f"is answered {said}", earlier)
        known.setdefault(response, number)


def findings(problems: Iterable[tuple[FindingCode, Place]]) -> list[Finding]:
    """One finding for each kind of problem, errors first, each with its places in the order given."""
    places: dict[FindingCode, list[Place]] = {}
    for code, place in problems:
        places.setdefault(code, []).append(place)
    found = []
    for code, facts in _FACTS.items():
        if code in places:
            count = len(places[code])
            found.append(
                Finding(
                    code=code,
                    severity=facts.severity,
                    message=facts.one if count == 1 else facts.many.format(n=count),
                    why=facts.why,
                    mend=facts.mend,
                    param=facts.param,
                    places=places[code],
                )
            )
    return found


def quoted(demonstration: Demonstration) -> str:
    """The beginning of its last message, in quotation marks, on one line."""
    return f"“{_shorten(demonstration.messages[-1].content)}”"


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= QUOTED_CHARACTERS else f"{line[: QUOTED_CHARACTERS - 1]}…"


def _is_visible(text: str) -> bool:
    """Whether any character is more than white space or a control or format character."""
    return any(unicodedata.category(character)[0] not in "ZC" for character in text)


def _repetition(text: str) -> str | None:
    """What a degenerate text repeats; None for any other text."""
    words = text.split()
    if len(words) >= REPEATED_WORDS and len({word.casefold() for word in words}) == 1:
        return f"“{_shorten(words[0])}” {len(words)} times"
    joined = "".join(words)
    period = (joined + joined).find(joined, 1)  # the shortest unit whose repetition is the whole
    times = len(joined) // period
    return f"“{_shorten(joined[:period])}” {times} times" if times >= REPEATED_UNITS else None

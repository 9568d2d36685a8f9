"""Data problems that need no model: which demonstrations they name, and how."""

import pytest

from domain.data_checks import findings, text_problems
from domain.demonstration import Demonstration, Message
from domain.preflight import Finding, Place


def demonstration(prompt: str, response: str, context: str | None = None) -> Demonstration:
    return Demonstration(
        messages=[Message(role="user", content=prompt)], response=response, context=context, answer="a"
    )


def check(*pairs: tuple[str, str]) -> dict[str, Finding]:
    made = [demonstration(prompt, response) for prompt, response in pairs]
    return {finding.code: finding for finding in findings(text_problems("route", "train", made))}


def numbers(finding: Finding) -> list[tuple[int, int | None]]:
    return [(place.number, place.like) for place in finding.places]


def test_ordinary_demonstrations_raise_nothing() -> None:
    assert check(("q1", "A"), ("q2", "A"), ("q3", "no, no"), ("q4", "1111")) == {}


@pytest.mark.parametrize("response", ["", " \n\t", "\u200b\u200b"])
def test_an_invisible_response_is_an_error(response: str) -> None:
    found = check(("q1", "A"), ("q2", response))
    assert list(found) == ["empty_response"]
    assert found["empty_response"].severity == "error"
    assert found["empty_response"].places == [
        Place(skill="route", split="train", number=2, detail="“q2” has no response")
    ]


@pytest.mark.parametrize(
    ("response", "said"),
    [
        ("The the THE the", "“The” 4 times"),
        ("!!!!!!!!", "“!” 8 times"),
        ("ab ab ab ab ab ab ab ab", "“ab” 8 times"),
        ("abcabcabcabcabcabcabcabc", "“abc” 8 times"),
        ("Who?", "itself"),
    ],
)
def test_a_response_of_one_repetition_or_of_the_prompt_is_a_warning(response: str, said: str) -> None:
    (finding,) = check((" Who? ", response)).values()
    assert (finding.code, finding.severity) == ("degenerate_response", "warning")
    assert finding.places[0].detail == f"“Who?” is answered by {said}"


@pytest.mark.parametrize("response", ["the the the", "!!!!!!!", "ab ab ab cd", "tartar"])
def test_a_little_repetition_is_language(response: str) -> None:
    assert check(("q", response)) == {}


def test_repetitions_and_contradictions_name_the_first_of_their_kind() -> None:
    found = check(("q", "A"), ("p", "A"), ("q", "A "), ("q", "B"), ("q", "B"), ("q", "A"))
    assert numbers(found["duplicate"]) == [(3, 1), (5, 4), (6, 1)]
    assert numbers(found["label_conflict"]) == [(4, 1)]
    assert found["duplicate"].message == "3 demonstrations repeat earlier ones."
    assert found["label_conflict"].message.startswith("1 demonstration contradicts")
    assert found["label_conflict"].places[0].detail == "“q” is answered “B” instead of “A”"
    assert {finding.severity for finding in found.values()} == {"warning"}


def test_the_same_prompt_with_another_context_is_the_same_prompt_to_the_student() -> None:
    made = [demonstration("q", "A", "article 1"), demonstration("q", "B", "article 2")]
    (finding,) = findings(text_problems("route", "holdout", made))
    assert finding.code == "label_conflict"
    assert finding.places[0].name() == "held-out demonstration 2 of skill 'route'"


def test_errors_come_first_and_long_prompts_are_shortened() -> None:
    made = [demonstration("word " * 30, "A"), demonstration("word " * 30, "A"), demonstration("q", " ")]
    found = findings(text_problems("route", "train", made))
    assert [finding.code for finding in found] == ["empty_response", "duplicate"]
    detail = found[1].places[0].detail
    assert detail == f"“{'word ' * 11}word…” has the same response"


def test_a_place_is_named_by_its_line_where_it_has_one() -> None:
    place = Place(skill="route", split="train", number=3, detail="")
    assert place.name() == "demonstration 3 of skill 'route'"
    assert place.model_copy(update={"line": 7}).name() == "line 7"
    assert Place(skill=None, split="rehearsal", number=2, detail="").name() == "rehearsal prompt 2"

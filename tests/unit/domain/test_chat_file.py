"""OpenAI's chat format as demonstrations."""

import json
from typing import Any

import pytest

from domain.chat_file import parse_chat_file
from domain.errors import DemonstrationsRejected

ASK = {"role": "user", "content": "where is my card?"}
TELL = {"role": "assistant", "content": "ROUTE: card"}


def body(*lines: Any) -> bytes:
    return b"\n".join(json.dumps(line).encode() for line in lines)


def refusal(*lines: Any) -> list[tuple[int, str]]:
    with pytest.raises(DemonstrationsRejected) as rejected:
        parse_chat_file(body(*lines))
    return [(error.line, error.message) for error in rejected.value.lines]


def test_a_line_is_a_demonstration() -> None:
    system = {
        "role": "developer",
        "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}],
    }
    [(line, taught)] = parse_chat_file(body({"messages": [system, ASK, TELL]}) + b"\n\n")
    assert line == 1
    assert [(one.role, one.content) for one in taught.messages] == [
        ("system", "Be brief."),
        ("user", "where is my card?"),
    ]
    assert (taught.response, taught.answer, taught.context, taught.metadata) == (
        "ROUTE: card",
        "ROUTE: card",
        None,
        {},
    )


def test_every_weighed_answer_of_a_conversation_is_taught() -> None:
    """The first is shown only; the second and the last are responses to what stands before them."""
    shown, second = {**TELL, "weight": 0}, {"role": "assistant", "content": "two", "weight": 1}
    line = {"messages": [ASK, shown, ASK, second, ASK, TELL], "answer": "card", "context": "manual"}
    found = parse_chat_file(body({"messages": [ASK, TELL]}, line))
    assert [number for number, _ in found] == [1, 2, 2]
    _, middle, last = [one for _, one in found]
    assert [one.content for one in middle.messages] == [
        "where is my card?",
        "ROUTE: card",
        "where is my card?",
    ]
    assert (middle.response, middle.answer, middle.context) == ("two", "two", None)
    assert len(last.messages) == 5
    assert (last.response, last.answer, last.context) == ("ROUTE: card", "card", "manual")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ([], "a line must be an object"),
        ({}, "messages: Field required"),
        ({"messages": [ASK]}, "messages: List should have at least 2 items"),
        ({"messages": [ASK, TELL, ASK]}, "must end with an assistant message"),
        ({"messages": [ASK, {**TELL, "weight": 0}]}, "every 'weight' is 0"),
        ({"messages": [ASK, {**TELL, "weight": 0.5}]}, "messages.1.weight: Input should be 0 or 1"),
        ({"messages": [{**ASK, "weight": 1}, TELL]}, "'weight' belongs to assistant messages"),
        ({"messages": [TELL, TELL]}, "messages.0: a user message must come before"),
        ({"messages": [ASK, {**TELL, "content": ""}]}, "messages.1.content: String should have at least 1"),
        (
            {"messages": [ASK, {**TELL, "content": None}]},
            "messages.1.content: Input should be a valid string",
        ),
        ({"messages": [ASK, {**TELL, "tool_calls": []}]}, "messages.1.tool_calls: Extra inputs"),
        ({"messages": [{"role": "tool", "content": "x"}, TELL]}, "messages.0.role: Input should be 'system'"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
                    TELL,
                ]
            },
            "parts other than text cannot be taught",
        ),
        ({"messages": [ASK, TELL], "tools": []}, "'tools' marks tool calling, which is not supported"),
        (
            {"input": {"messages": [ASK]}, "preferred_output": [TELL], "non_preferred_output": [TELL]},
            "'preferred_output' marks a preference pair (DPO), which is not supported; use the chat format",
        ),
        ({"prompt": "a", "completion": "b"}, "'completion' marks a prompt and completion pair"),
    ],
)
def test_a_line_that_cannot_be_taught_is_named(line: Any, told: str) -> None:
    [(number, message)] = refusal({"messages": [ASK, TELL]}, line)
    assert number == 2
    assert told in message


def test_all_bad_lines_are_named_at_once() -> None:
    with pytest.raises(DemonstrationsRejected) as rejected:
        parse_chat_file(b'{"messages"\n\n' + body({"messages": [ASK, TELL]}, {"messages": []}))
    assert [error.line for error in rejected.value.lines] == [1, 4]


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_teaches_nothing(content: bytes) -> None:
    with pytest.raises(DemonstrationsRejected, match="the file is empty"):
        parse_chat_file(content)

"""A transcript says the same of a reply, whole or streamed."""

import json

import pytest

from api.shadow import Agreement, compare
from api.transcript import MOST_CHARACTERS, Transcript
from domain.skill import ExactGrader, JsonGrader


def streamed(*deltas: dict[str, object]) -> str | None:
    transcript = Transcript()
    for delta in deltas:
        chunk = {"choices": [{"index": 0, "delta": delta}, {"index": 1, "delta": {"content": "other"}}]}
        transcript.add_line(b"data: " + json.dumps(chunk).encode())
    for line in (b"", b": ping", b"data: [DONE]", b"data: 3", b'data: {"choices": [], "usage": {}}'):
        transcript.add_line(line)
    return transcript.text()


def whole(message: dict[str, object]) -> str | None:
    transcript = Transcript()
    other = {"index": 1, "message": {"content": "other"}}
    transcript.add_reply({"choices": [other, {"index": 0, "message": message}]})
    return transcript.text()


def test_text() -> None:
    assert whole({"role": "assistant", "content": "Hello you"}) == "Hello you"
    assert streamed({"role": "assistant", "content": ""}, {"content": "Hel"}, {"content": "lo you"}, {}) == (
        "Hello you"
    )


def test_called_functions() -> None:
    calls = [
        {"id": "a", "function": {"name": "add", "arguments": '{"x": 1}'}},
        {"id": "b", "function": {"name": "stop", "arguments": "{}"}},
    ]
    assert whole({"content": None, "tool_calls": calls}) == 'add{"x": 1}\nstop{}'
    assert (
        streamed(
            {
                "content": None,
                "tool_calls": [{"index": 0, "id": "z", "function": {"name": "add", "arguments": ""}}],
            },
            {"tool_calls": [{"index": 0, "function": {"arguments": '{"x": '}}]},
            {"tool_calls": [{"index": 1, "function": {"name": "stop"}}]},
            {"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]},
            {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
        )
        == 'add{"x": 1}\nstop{}'
    )


def test_plain_completions() -> None:
    transcript = Transcript()
    transcript.add_reply({"choices": [{"index": 0, "text": "abc"}]})
    transcript.add_line(b'data: {"choices": [{"index": 0, "text": "def"}]}')
    assert transcript.text() == "abcdef"


def test_what_is_too_long_is_not_kept() -> None:
    assert whole({"content": "x" * MOST_CHARACTERS}) is not None
    assert streamed({"content": "x" * MOST_CHARACTERS}, {"content": "y"}) is None


def test_replies_are_compared() -> None:
    assert compare(None, " same\n", "same") == Agreement(True, 1.0, None)
    assert compare(ExactGrader(ignore_case=True), "Blue", "blue") == Agreement(False, 1.0, 1.0)
    assert compare(JsonGrader(), '{"a":1}', '{"a": 1}') == Agreement(False, 1.0, 1.0)
    assert compare(ExactGrader(), "red sky", "blue sky") == Agreement(False, pytest.approx(0.5), 0.0)
    assert compare(ExactGrader(), "", "") == Agreement(True, 1.0, None)

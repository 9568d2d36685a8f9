"""What happens to the bytes of an engine's reply."""

import json

import pytest

from api.engine_replies import rewrite_line, rewrite_reply
from domain.errors import EngineUnavailable


def test_the_model_of_an_event_is_renamed() -> None:
    chunk = {
        "id": "1",
        "model": "support-v3-0a1b2c3d",
        "choices": [{"delta": {"content": 'say "model": é \u2028'}}],
    }
    line = b"data: " + json.dumps(chunk, ensure_ascii=False).encode()
    rewritten = rewrite_line(line, "support")
    assert rewritten.startswith(b"data: {")
    assert b"\n" not in rewritten
    assert json.loads(rewritten[6:]) == {**chunk, "model": "support"}


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b": ping",
        b"data: [DONE]",
        b"event: x",
        b"id: 7",
        b'data: {"error": {"message": "no"}}',
        b"data: 3",
        b"data: {torn",
    ],
)
def test_every_other_line_passes_unchanged(line: bytes) -> None:
    assert rewrite_line(line, "support") == line


def test_a_carriage_return_does_not_hide_an_event() -> None:
    assert json.loads(rewrite_line(b'data: {"model": "x"}\r', "support")[6:]) == {"model": "support"}


def test_a_whole_reply_is_renamed() -> None:
    assert rewrite_reply(b'{"model": "x", "choices": []}', "support@v1") == {
        "model": "support@v1",
        "choices": [],
    }


@pytest.mark.parametrize("content", [b"", b"<html>", b"[]", b'"text"'])
def test_a_reply_that_is_no_json_object_is_the_engines_fault(content: bytes) -> None:
    with pytest.raises(EngineUnavailable):
        rewrite_reply(content, "support")

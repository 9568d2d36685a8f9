"""Lines of JSONL: which are taken, and how each bad one is named."""

import pytest

from domain.demonstration import Message, parse_jsonl, parse_prompts
from domain.errors import DemonstrationsRejected
from domain.rehearsal import general_prompts


def test_lines_keep_their_numbers_over_blank_ones() -> None:
    body = b'{"prompt": "a", "response": "1"}\n\n{"prompt": "b", "response": "2", "answer": "3"}\n'
    assert [(line, d.messages[0].content, d.answer) for line, d in parse_jsonl(body)] == [
        (1, "a", "1"),
        (3, "b", "3"),
    ]


def test_every_bad_line_is_named() -> None:
    body = b'{"prompt": "a", "response": " "}\nnot json\n{"prompt": "a", "response": "1", "extra": 2}'
    with pytest.raises(DemonstrationsRejected) as rejected:
        parse_jsonl(body)
    assert [(bad.line, bad.param) for bad in rejected.value.lines] == [(1, None), (2, None), (3, "extra")]
    assert rejected.value.lines[0].message == "'response' is blank"


def test_prompts_are_read_from_demonstrations_too() -> None:
    body = b'{"prompt": "a"}\n{"messages": [{"role": "user", "content": "b"}], "response": "2"}'
    assert parse_prompts(body) == [
        [Message(role="user", content="a")],
        [Message(role="user", content="b")],
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompts": "a"}', "give either 'prompt' or 'messages'"),
        (b'{"prompt": "  "}', "'prompt' is blank"),
        (b'{"messages": [{"role": "assistant", "content": "b"}]}', "'messages' must end with a user message"),
    ],
)
def test_a_bad_prompt_is_named(line: bytes, message: str) -> None:
    with pytest.raises(DemonstrationsRejected) as rejected:
        parse_prompts(b'{"prompt": "a"}\n' + line)
    assert [(bad.line, bad.message) for bad in rejected.value.lines] == [(2, message)]


def test_built_in_general_prompts_are_distinct() -> None:
    texts = [messages[-1].content for messages in general_prompts()]
    assert len(texts) >= 200
    assert len(set(texts)) == len(texts)

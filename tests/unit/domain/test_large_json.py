"""Large texts are read as small ones are, and let other threads run meanwhile."""

import json
import threading
import time
from typing import Any

import pytest

from domain.large_json import LARGE_BYTES, loads

SPACE = " " * LARGE_BYTES
VALUES = [
    {
        "messages": [{"role": "user", "content": 'é\n"\\ 日本 \U0001f600'}],
        "n": 3,
        "t": 0.25,
        "x": [None, True, []],
    },
    [1, -2.5e3, 10**30, {}],
    "text",
]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_value_is_the_same(value: Any, encoding: str) -> None:
    text = json.dumps(value, ensure_ascii=False)
    assert loads((text + SPACE).encode(encoding)) == loads(text.encode(encoding)) == value


@pytest.mark.parametrize(
    "text", ["", "{", '{"a": 1,}', '{"a" 1}', "[1 2]", "nul", '"\n"', "{} x", "[" * 100_000]
)
def test_what_is_wrong_is_wrong(text: str) -> None:
    for content in (text.encode(), (SPACE + text).encode()):
        with pytest.raises((ValueError, RecursionError)):
            loads(content)


def test_bytes_that_are_no_text_are_an_error() -> None:
    with pytest.raises(ValueError, match="decode"):
        loads(b'"\xff"' + SPACE.encode())


def test_a_constant_that_is_no_json_is_told() -> None:
    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    for content in (b"[NaN]", b"[NaN]" + SPACE.encode()):
        with pytest.raises(ValueError, match="NaN is no JSON"):
            loads(content, parse_constant=refuse)


def test_other_threads_run_meanwhile() -> None:
    content = b"[" + b"12345," * (4 * 2**20 // 6) + b"0]"
    reading = threading.Thread(target=loads, args=(content,))
    rounds = 0
    reading.start()
    while reading.is_alive():
        time.sleep(0.001)
        rounds += 1
    assert rounds > 20

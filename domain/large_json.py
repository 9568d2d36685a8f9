"""JSON texts of many megabytes, read by a thread that lets the others run."""

import json
from collections.abc import Callable
from json import scanner
from typing import Any

LARGE_BYTES = 256 * 1024
"""Above this the interpreter's own parser may hold every other thread up for more than 10 ms."""


def loads(content: bytes, *, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """As json.loads, whose C code holds the interpreter's lock from first byte to last, 2 s for 64 MiB of
    numbers, in a thread as well. A large text is read by the same module's Python code, which shares the
    lock, in up to eight times the time; long strings take no longer. Raises ValueError, RecursionError.
    """
    if len(content) <= LARGE_BYTES:
        return json.loads(content, parse_constant=parse_constant)
    decoder = json.JSONDecoder(parse_constant=parse_constant)
    decoder.scan_once = scanner.py_make_scanner(decoder)  # type: ignore[attr-defined]
    return decoder.decode(content.decode(json.detect_encoding(content), "surrogatepass"))

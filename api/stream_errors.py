"""An engine's error that comes as an event of a stream, because the status had been sent before."""

import json
from dataclasses import dataclass
from typing import Self

ERROR_EVENTS = (b'data: {"error"', b'data:{"error"')


@dataclass(frozen=True)
class Refusal:
    """What a stream that begins with an error would have been, had the engine known it in time."""

    status: int
    body: bytes
    """JSON, in the shape of the engine's other refusals."""

    @classmethod
    def from_start(cls, first: bytes) -> Self | None:
        """None when a stream of these first bytes begins with something else."""
        line = first.partition(b"\n")[0]
        if not line.startswith(ERROR_EVENTS):
            return None
        body = line.removeprefix(b"data:").strip()
        try:
            code = json.loads(body)["error"]["code"]
        except (ValueError, KeyError, TypeError):
            code = None
        return cls(code if isinstance(code, int) and 400 <= code <= 599 else 500, body)


def is_cut_short(first: bytes) -> bool:
    """Whether these bytes may be an error whose rest is still on its way."""
    return b"\n" not in first and any(first.startswith(event[: len(first)]) for event in ERROR_EVENTS)

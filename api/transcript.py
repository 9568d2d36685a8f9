"""What a reply says, gathered from its JSON or its stream's events, to be compared and forgotten."""

import json
from typing import Any

from api.engine_replies import rewrite_reply
from api.stream_errors import ERROR_EVENTS
from api.upstream import Upstream
from domain.errors import EngineUnavailable

MOST_CHARACTERS = 200_000


class Transcript:
    """The text of a reply's first choice, and the functions it calls."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._calls: dict[int, list[str]] = {}
        """By position: name and arguments, as they come."""
        self._length = 0

    def add_reply(self, reply: dict[str, Any]) -> None:
        """A whole chat completion or completion."""
        for choice in reply.get("choices") or ():
            if choice.get("index", 0) == 0:
                self._add(choice.get("message") or {"content": choice.get("text")})

    def add_line(self, line: bytes) -> None:
        """One line of a stream; what is no chunk is passed over."""
        if not line.startswith(b"data:"):
            return
        try:
            chunk = json.loads(line[5:])
        except ValueError:  # [DONE]
            return
        if not isinstance(chunk, dict):
            return
        for choice in chunk.get("choices") or ():
            if choice.get("index", 0) == 0:
                self._add(choice.get("delta") or {"content": choice.get("text")})

    async def add_upstream(self, upstream: Upstream, *, streamed: bool) -> None:
        """A reply to its end. Raises EngineUnavailable when it breaks off or is no reply."""
        if not streamed:
            self.add_reply(rewrite_reply(await upstream.read(), ""))
            return
        rest = b""
        async for chunk in upstream.chunks():
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if line.startswith(ERROR_EVENTS):
                    raise EngineUnavailable("The inference engine broke off.")
                self.add_line(line)

    def text(self) -> str | None:
        """None when it is too long to be compared."""
        if self._length > MOST_CHARACTERS:
            return None
        calls = "\n".join("".join(self._calls[position]) for position in sorted(self._calls))
        return "\n".join(part for part in ("".join(self._pieces), calls) if part)

    def _add(self, message: dict[str, Any]) -> None:
        self._keep(self._pieces, message.get("content"))
        for position, call in enumerate(message.get("tool_calls") or ()):
            function = call.get("function") or {}
            pieces = self._calls.setdefault(call.get("index", position), [])
            self._keep(pieces, function.get("name"))
            self._keep(pieces, function.get("arguments"))

    def _keep(self, pieces: list[str], text: str | None) -> None:
        if text:
            self._length += len(text)
            if self._length <= MOST_CHARACTERS:
                pieces.append(text)

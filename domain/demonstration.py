"""A demonstration: a prompt, an expert response, and what the grader compares with."""

import hashlib
import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from domain.errors import DemonstrationsRejected, LineError

Split = Literal["train", "holdout"]


class Message(BaseModel):
    """One chat message."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "user", "assistant"]
    content: str = Field(min_length=1)


class Demonstration(BaseModel):
    """One accepted line. `messages` always ends with a user turn; `prompt` is sugar for one such turn."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    messages: list[Message]
    response: str
    context: str | None = None
    answer: str
    metadata: dict[str, JsonValue] = Field(default_factory=dict)

    def content_hash(self) -> str:
        """sha256 over what is taught (messages, response, context), not over metadata."""
        content = [[m.role, m.content] for m in self.messages], self.response, self.context
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()

    def prompt_hash(self) -> str:
        """sha256 over the messages alone: equal prompts fall on the same side of the hold-out."""
        content = [[m.role, m.content] for m in self.messages]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


class DemonstrationLine(BaseModel):
    """A demonstration as it is sent (DESIGN: HTTP contract)."""

    model_config = ConfigDict(extra="forbid")

    prompt: str | None = Field(default=None, min_length=1)
    messages: list[Message] | None = Field(default=None, min_length=1)
    response: str = Field(min_length=1)
    context: str | None = Field(default=None, min_length=1)
    answer: str | None = Field(default=None, min_length=1)
    metadata: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_prompt(self) -> "DemonstrationLine":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either 'prompt' or 'messages'")
        if self.messages is not None and self.messages[-1].role != "user":
            raise ValueError("'messages' must end with a user message")
        if not self.response.strip():
            raise ValueError("'response' is blank")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("'prompt' is blank")
        try:
            json.dumps(self.metadata, ensure_ascii=False, allow_nan=False).encode()
        except ValueError as error:  # NaN, infinity, half of a surrogate pair: Python's JSON, nobody else's
            raise ValueError(f"'metadata' is not valid JSON ({error})") from error
        return self

    def to_demonstration(self) -> Demonstration:
        messages = self.messages or [Message(role="user", content=self.prompt or "")]
        return Demonstration(
            messages=messages,
            response=self.response,
            context=self.context,
            answer=self.answer or self.response,
            metadata=self.metadata,
        )


def is_held_out(prompt_hash: str, holdout_fraction: float) -> bool:
    """Deterministic split by the prompt's hash: the same prompt is always on the same side."""
    return int(prompt_hash[:8], 16) / 0x1_0000_0000 < holdout_fraction


def parse_jsonl(body: bytes) -> list[Demonstration]:
    """Every line of a JSONL body, or none.

    Raises DemonstrationsRejected naming every bad line; blank lines are skipped but counted.
    """
    values: list[tuple[int, JsonValue]] = []
    errors: list[LineError] = []
    for number, raw in enumerate(body.split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            values.append((number, json.loads(raw)))
        except (ValueError, RecursionError) as error:
            errors.append(LineError(line=number, param=None, message=f"not valid JSON ({error})"))
    return _validate(values, errors)


def parse_objects(values: list[JsonValue]) -> list[Demonstration]:
    """The `demonstrations` array of a JSON body; entries count as lines from 1."""
    return _validate(list(enumerate(values, start=1)), [])


def _validate(values: list[tuple[int, JsonValue]], errors: list[LineError]) -> list[Demonstration]:
    accepted: list[Demonstration] = []
    for number, value in values:
        try:
            accepted.append(DemonstrationLine.model_validate(value).to_demonstration())
        except ValidationError as invalid:
            errors.extend(_line_errors(number, invalid))
    if errors:
        raise DemonstrationsRejected(sorted(errors, key=lambda error: error.line))
    if not accepted:
        raise DemonstrationsRejected([LineError(line=1, param="demonstrations", message="empty batch")])
    return accepted


def _line_errors(number: int, invalid: ValidationError) -> list[LineError]:
    found = []
    for error in invalid.errors():
        field = ".".join(str(part) for part in error["loc"]) or None
        message = error["msg"].removeprefix("Value error, ")
        found.append(LineError(line=number, param=field, message=f"{field}: {message}" if field else message))
    return found

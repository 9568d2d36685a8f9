"""A demonstration: a prompt, an expert response, and what the grader compares with."""

import hashlib
import json
from typing import Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from domain import large_json
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


class PromptLine(BaseModel):
    """The prompt of a line: `prompt`, or `messages` for more than one turn. Other fields don't matter."""

    model_config = ConfigDict(extra="ignore")

    prompt: str | None = Field(default=None, min_length=1)
    messages: list[Message] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either 'prompt' or 'messages'")
        if self.messages is not None and self.messages[-1].role != "user":
            raise ValueError("'messages' must end with a user message")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("'prompt' is blank")
        return self

    def to_messages(self) -> list[Message]:
        return self.messages or [Message(role="user", content=self.prompt or "")]


class DemonstrationLine(PromptLine):
    """A demonstration as it is sent (DESIGN: HTTP contract)."""

    model_config = ConfigDict(extra="forbid")

    response: str = Field(min_length=1)
    context: str | None = Field(default=None, min_length=1)
    answer: str | None = Field(default=None, min_length=1)
    metadata: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _can_be_taught(self) -> Self:
        if not self.response.strip():
            raise ValueError("'response' is blank")
        try:
            json.dumps(self.metadata, ensure_ascii=False, allow_nan=False).encode()
        except ValueError as error:  # NaN, infinity, half of a surrogate pair: Python's JSON, nobody else's
            raise ValueError(f"'metadata' is not valid JSON ({error})") from error
        return self

    def to_demonstration(self) -> Demonstration:
        return Demonstration(
            messages=self.to_messages(),
            response=self.response,
            context=self.context,
            answer=self.answer or self.response,
            metadata=self.metadata,
        )


def is_held_out(prompt_hash: str, holdout_fraction: float) -> bool:
    """Deterministic split by the prompt's hash: the same prompt is always on the same side."""
    return int(prompt_hash[:8], 16) / 0x1_0000_0000 < holdout_fraction


def parse_jsonl(body: bytes) -> list[tuple[int, Demonstration]]:
    """Every line of a JSONL body with its number from 1, or none.

    Raises DemonstrationsRejected naming every bad line; blank lines are skipped but counted.
    """
    lines = _validate(DemonstrationLine, *json_lines(body))
    return [(number, line.to_demonstration()) for number, line in lines]


def parse_objects(values: list[JsonValue]) -> list[Demonstration]:
    """The `demonstrations` array of a JSON body; entries count as lines from 1."""
    lines = _validate(DemonstrationLine, list(enumerate(values, start=1)), [])
    return [line.to_demonstration() for _, line in lines]


def parse_prompts(body: bytes) -> list[list[Message]]:
    """The prompts of a JSONL body, which may be one of demonstrations. Raises as `parse_jsonl`."""
    return [line.to_messages() for _, line in _validate(PromptLine, *json_lines(body))]


def json_lines(body: bytes) -> tuple[list[tuple[int, JsonValue]], list[LineError]]:
    """The JSON values of a body with their line numbers, and an error for each line that is none."""
    values: list[tuple[int, JsonValue]] = []
    errors: list[LineError] = []
    for number, raw in enumerate(body.split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            values.append((number, large_json.loads(raw)))
        except (ValueError, RecursionError) as error:
            errors.append(LineError(line=number, param=None, message=f"not valid JSON ({error})"))
    return values, errors


Line = TypeVar("Line", bound=PromptLine)


def _validate(
    kind: type[Line], values: list[tuple[int, JsonValue]], errors: list[LineError]
) -> list[tuple[int, Line]]:
    accepted: list[tuple[int, Line]] = []
    for number, value in values:
        try:
            accepted.append((number, kind.model_validate(value)))
        except ValidationError as invalid:
            errors.extend(line_errors(number, invalid))
    if errors:
        raise DemonstrationsRejected(sorted(errors, key=lambda error: error.line))
    if not accepted:
        raise DemonstrationsRejected([LineError(line=1, param="demonstrations", message="empty batch")])
    return accepted


def line_errors(number: int, invalid: ValidationError) -> list[LineError]:
    """One error for each complaint about the line, naming its field."""
    found = []
    for error in invalid.errors():
        field = ".".join(str(part) for part in error["loc"]) or None
        message = error["msg"].removeprefix("Value error, ")
        found.append(LineError(line=number, param=field, message=f"{field}: {message}" if field else message))
    return found

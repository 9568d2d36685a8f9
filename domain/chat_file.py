"""Fine-tuning files in OpenAI's chat format, read as demonstrations.

A line is `{"messages": [...]}`. Every assistant message whose `weight` is not 0 is a response to teach, and
what stands before it is its prompt; so a line of several turns makes several demonstrations. Beside
`messages` a line may have Ratchet's own `context`, `answer` and `metadata`, which belong to its last message.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from domain.demonstration import Demonstration, DemonstrationLine, Message, json_lines, line_errors
from domain.errors import DemonstrationsRejected, LineError

_FOREIGN = {
    "preferred_output": "a preference pair (DPO)",
    "non_preferred_output": "a preference pair (DPO)",
    "completion": "a prompt and completion pair",
    "tools": "tool calling",
    "functions": "tool calling",
}
"""Fields of OpenAI's other formats, and what they mark."""


def _joined(content: Any) -> Any:
    """A list of text parts as one text; anything else as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise ValueError("parts other than text cannot be taught")
        texts.append(text)
    return "".join(texts)


class ChatFileMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, Field(min_length=1), BeforeValidator(_joined)]
    weight: Literal[0, 1] | None = None
    """0: an assistant's message that is shown and not taught."""

    @model_validator(mode="after")
    def _only_assistants_are_weighed(self) -> Self:
        if self.weight is not None and self.role != "assistant":
            raise ValueError("'weight' belongs to assistant messages")
        return self

    @property
    def taught(self) -> bool:
        return self.role == "assistant" and self.weight != 0

    def to_message(self) -> Message:
        return Message(role="system" if self.role == "developer" else self.role, content=self.content)


class ChatFileLine(BaseModel):
    model_config = ConfigDict(extra="forbid")

    messages: list[ChatFileMessage] = Field(min_length=2)
    context: str | None = None
    answer: str | None = None
    metadata: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _is_chat(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError('a line must be an object, {"messages": [...]}')
        for name, kind in _FOREIGN.items():
            if name in value:
                raise ValueError(f"'{name}' marks {kind}, which is not supported; use the chat format")
        return value

    @model_validator(mode="after")
    def _can_be_taught(self) -> Self:
        if self.messages[-1].role != "assistant":
            raise ValueError("'messages' must end with an assistant message")
        if not any(one.taught for one in self.messages):
            raise ValueError("no assistant message is taught: every 'weight' is 0")
        for number, message in enumerate(self.messages):
            if message.taught and (number == 0 or self.messages[number - 1].role != "user"):
                raise ValueError(
                    f"messages.{number}: a user message must come before an assistant message to be taught"
                )
        return self

    def to_demonstrations(self) -> list[Demonstration]:
        """Raises ValidationError for what no demonstration may hold."""
        messages = [one.to_message() for one in self.messages]
        found = []
        for number, message in enumerate(self.messages):
            if not message.taught:
                continue
            last = number == len(messages) - 1
            line = DemonstrationLine(
                messages=messages[:number],
                response=messages[number].content,
                context=self.context if last else None,
                answer=self.answer if last else None,
                metadata=self.metadata if last else {},
            )
            found.append(line.to_demonstration())
        return found


def parse_chat_file(body: bytes) -> list[tuple[int, Demonstration]]:
    """Every demonstration of the file with the number of its line, from 1.

    Raises DemonstrationsRejected naming every bad line; blank lines are skipped but counted.
    """
    values, errors = json_lines(body)
    found: list[tuple[int, Demonstration]] = []
    for number, value in values:
        try:
            line = ChatFileLine.model_validate(value)
            found += [(number, one) for one in line.to_demonstrations()]
        except ValidationError as invalid:
            errors += line_errors(number, invalid)
    if errors:
        raise DemonstrationsRejected(sorted(errors, key=lambda error: error.line))
    if not found:
        raise DemonstrationsRejected([LineError(line=1, param="messages", message="the file is empty")])
    return found

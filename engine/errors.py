"""What the engine refuses, with the status and type that vLLM gives it.

EngineError
├── BadRequest        400  a field is wrong; `param` names it
│   └── ContextExceeded    a prompt is longer than the window
├── NotFound          404  no such model or adapter
├── InvalidAdapter    400  an adapter folder that does not fit the base model
├── Overloaded        503  the engine is stopping
└── InternalError     500  the engine failed in the middle of a request
"""


class EngineError(Exception):
    """A refusal; `body()` is the reply in OpenAI's shape."""

    status = 500
    type = "InternalServerError"

    def __init__(self, message: str, *, param: str | None = None, type: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if type is not None:
            self.type = type

    def body(self) -> dict[str, dict[str, str | int | None]]:
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.status,
            }
        }


class BadRequest(EngineError):
    status = 400
    type = "BadRequestError"


class ContextExceeded(BadRequest):
    """A prompt that the model's window cannot take, in the words that clients know from vLLM."""

    def __init__(self, window: int, prompt: str, *, param: str) -> None:
        """`prompt` says how long it is, with its unit; `param` is the field that it came in."""
        super().__init__(
            f"This model's maximum context length is {window} tokens. However, your request has "
            f"{prompt}. Please reduce the length of the input messages.",
            param=param,
        )


class NotFound(EngineError):
    status = 404
    type = "NotFoundError"


class InvalidAdapter(BadRequest):
    pass


class Overloaded(EngineError):
    status = 503
    type = "ServiceUnavailableError"


class InternalError(EngineError):
    pass

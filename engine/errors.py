"""What the engine refuses, with the status and type that vLLM gives it.

EngineError
├── BadRequest        400  a field is wrong; `param` names it
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

"""What every refusal must look like."""

from typing import Any

from httpx import Response


def refused(reply: Response, status: int, *, param: str | None, code: str | None) -> dict[str, Any]:
    """The error of a refusal in the shape that OpenAI's clients know: always all four keys."""
    assert reply.status_code == status, reply.text
    body = reply.json()
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert error["message"]
    kind = "rate_limit_error" if status == 429 else "invalid_request_error"
    assert error["type"] == ("server_error" if status >= 500 else kind)
    assert (error["param"], error["code"]) == (param, code)
    return error

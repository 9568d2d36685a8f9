"""Routes that OpenAI's own client calls: what is wrong with a request is 400, as it is with OpenAI."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from api.errors import domain_error_response, invalid_request_response
from domain.errors import Conflict, InvalidInput

_TRY_AGAIN = frozenset({"idempotency_in_flight"})
"""Conflicts that pass by themselves stay 409, which the client sends again; the others would fail again."""


class OpenAIRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def answer_as_openai(request: Request) -> Response:
            try:
                return await answer(request)
            except RequestValidationError as error:
                return invalid_request_response(error, 400)
            except InvalidInput as error:
                return domain_error_response(error, 400)
            except Conflict as error:
                return domain_error_response(error, None if error.code in _TRY_AGAIN else 400)

        return answer_as_openai

"""Plain builders for the trainer's tests."""

from domain.demonstration import Demonstration, Message


def demonstration(prompt: str, response: str, context: str | None = None) -> Demonstration:
    return Demonstration(
        messages=[Message(role="user", content=prompt)], response=response, context=context, answer=response
    )

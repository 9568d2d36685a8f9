"""The HTTP client against scripted replies: what a person reads when something is wrong."""

import json
from collections.abc import Callable

import httpx
import pytest
from typer.testing import CliRunner

from cli.client import ApiError, Client, ConnectionLost, parse_events
from cli.errors import CliError
from cli.main import app

Handler = Callable[[httpx.Request], httpx.Response]


def client(handler: Handler, key: str | None = None) -> Client:
    return Client("http://test", key, transport=httpx.MockTransport(handler))


def error(status: int, message: str, param: str | None = None) -> httpx.Response:
    body = {"message": message, "type": "invalid_request_error", "param": param, "code": "some_code"}
    return httpx.Response(status, json={"error": body})


def test_an_api_error_is_one_line_that_names_the_field() -> None:
    with pytest.raises(ApiError) as told:
        client(lambda _: error(422, "There is no such model.", "base_model")).get("/v1/x")
    assert str(told.value) == "There is no such model. (field: base_model)"
    assert (told.value.status, told.value.code) == (422, "some_code")


def test_a_field_that_the_message_names_already_is_not_repeated() -> None:
    with pytest.raises(ApiError) as told:
        client(lambda _: error(422, "base_model: field required", "base_model")).get("/v1/x")
    assert str(told.value) == "base_model: field required"


def test_a_reply_that_is_not_ours_says_so() -> None:
    with pytest.raises(CliError, match="replied 502, which is not an error of Ratchet's API"):
        client(lambda _: httpx.Response(502, text="<html>bad gateway</html>")).get("/v1/x")


def test_the_key_is_sent_as_bearer_and_only_when_there_is_one() -> None:
    seen: list[str | None] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("authorization"))
        return httpx.Response(200, json={})

    client(handler, "secret").get("/v1/x")
    client(handler).get("/v1/x")
    assert seen == ["Bearer secret", None]


def test_a_list_is_read_to_its_end() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        after = request.url.params.get("after")
        ids = {None: ["a", "b"], "b": ["c"]}[after]
        return httpx.Response(200, json={"data": [{"id": i} for i in ids], "has_more": after is None})

    assert [row["id"] for row in client(handler).list_all("/v1/things")] == ["a", "b", "c"]


def test_events_are_parsed_with_names_ids_and_split_data() -> None:
    lines = [": keep-alive", "", "id: 4", 'data: {"a":', "data: 1}", "", "event: done", "data: {}", ""]
    events = list(parse_events(iter(lines)))
    assert [(event.name, event.id, event.data) for event in events] == [
        ("", "4", '{"a":\n1}'),
        ("done", "4", "{}"),
    ]


def sse(*events: tuple[str, str]) -> httpx.Response:
    text = "".join(f"id: {number}\ndata: {data}\n\n" for number, data in events)
    return httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})


def test_following_continues_after_a_lost_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.client.RECONNECT_SECONDS", 0)
    asked: list[str | None] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers.get("last-event-id"))
        if len(asked) == 1:
            return sse(("1", '{"seq": 1}'), ("2", '{"seq": 2}'))  # ends without `done`: a restart
        if len(asked) == 2:
            raise httpx.ConnectError("refused")
        return httpx.Response(200, text='id: 3\ndata: {"seq": 3}\n\nevent: done\ndata: {}\n\n')

    assert [event["seq"] for event in client(handler).follow("upd_1")] == [1, 2, 3]
    assert asked == [None, "2", "2"]


def test_following_gives_up_when_nothing_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.client.RECONNECT_SECONDS", 0)

    def handler(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(ConnectionLost, match="nothing answers"):
        list(client(handler).follow("upd_1"))


def chunks(*deltas: str, done: bool = True) -> httpx.Response:
    lines = [json.dumps({"choices": [{"delta": {"content": text}}]}) for text in deltas]
    lines += ["[DONE]"] if done else []
    text = "".join(f"data: {line}\n\n" for line in lines)
    return httpx.Response(200, text=text, headers={"x-model-version": "v2"})


def test_a_streamed_answer_is_put_together() -> None:
    pieces: list[str] = []
    reply = client(lambda _: chunks("QUEUE", ": ", "BUG")).chat_streamed("a", [], on_piece=pieces.append)
    assert (reply.text, reply.version) == ("QUEUE: BUG", "v2")
    assert pieces == ["QUEUE", ": ", "BUG"]


def test_a_stream_that_breaks_off_is_a_failure() -> None:
    with pytest.raises(CliError, match="broke off"):
        client(lambda _: chunks("QUEUE", done=False)).chat_streamed("a", [])


def test_nothing_running_says_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATCHET_URL", "http://127.0.0.1:9")  # discard: nothing listens there
    result = CliRunner().invoke(app, ["assistants", "list"])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == (
        "error: nothing answers at http://127.0.0.1:9: start the stack with `ratchet up`, "
        "or set RATCHET_URL to where it runs\n"
    )

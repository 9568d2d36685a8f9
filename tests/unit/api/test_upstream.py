"""One attempt at an engine, over real sockets."""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterator, Set
from pathlib import Path

import aiohttp
import pytest

from api.upstream import Patience, Upstream, attempt, engine_client, open_upstream, unless_disconnected
from domain.errors import EngineTimeout, EngineUnavailable
from domain.settings import Settings
from domain.version import ModelName
from serving.routes import Endpoint, Lease, Route, Routes, RouteTable

PATIENCE = Patience(first_byte=60.0, between_bytes=60.0, reply=60.0)
"""Server and client share an event loop, which may stand still for seconds."""
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def lease_of(url: str) -> Lease:
    table = RouteTable()
    table.replace(Routes(aliases={("team", "support", "champion"): Route("ver_1", 1, (Endpoint(url, "m"),))}))
    return table.lease("team", ModelName("support", "champion", None))


@pytest.fixture
def full() -> Iterator[str]:
    """Url of a server that takes no further connection: those that wait for it fill its queue."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(server.getsockname())
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        for one in waiting:
            one.close()


async def _ask(url: str, settings: Settings) -> Upstream:
    async with engine_client(settings) as client:
        return await attempt(client, lease_of(url), "/v1/completions", {"stream": True}, "req_1", PATIENCE)


def test_an_engine_that_takes_no_connection_in_time_can_be_left_for_another(
    tmp_path: Path, full: str
) -> None:
    settings = Settings(home=tmp_path, engine_connect_seconds=0.2)
    with pytest.raises(aiohttp.ClientError):
        asyncio.run(_ask(full, settings))


def test_an_engine_that_takes_a_request_and_says_nothing_is_slow(tmp_path: Path) -> None:
    patience = Patience(first_byte=0.2, between_bytes=1.0, reply=1.0)

    async def ask() -> None:
        async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
            await reader.read()

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server, engine_client(Settings(home=tmp_path)) as client:
            await attempt(client, lease_of(url), "/v1/completions", {"stream": True}, "req_1", patience)

    with pytest.raises(EngineTimeout):
        asyncio.run(ask())


def test_a_request_is_one_packet_and_its_stream_comes_piece_by_piece(tmp_path: Path) -> None:
    heard: list[bytes] = []

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read(65536))
        writer.write(HEAD + b"3\r\none\r\n")
        await asyncio.sleep(0.05)
        writer.write(b"3\r\ntwo\r\n")
        await asyncio.sleep(0.05)
        writer.write(b"0\r\n\r\n")
        await reader.read()
        writer.close()

    async def ask() -> list[bytes]:
        server = await asyncio.start_server(speak, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server, engine_client(Settings(home=tmp_path)) as client:
            body = {"stream": True, "prompt": "héllo"}
            upstream = await attempt(client, lease_of(url), "/v1/completions", body, "req_1", PATIENCE)
            pieces = [piece async for piece in upstream.chunks()]
            upstream.close()
            return pieces

    assert asyncio.run(ask()) == [b"one", b"two"]
    [request] = heard
    head, _, body = request.partition(b"\r\n\r\n")
    assert body == '{"stream":true,"prompt":"héllo","model":"m"}'.encode()
    assert b"content-type: application/json" in head.lower()
    assert b"x-request-id: req_1" in head.lower()


@pytest.mark.parametrize("end", [b"", b"3\r\ntw"])
def test_a_stream_that_is_cut_off_is_no_whole_one(tmp_path: Path, end: bytes) -> None:
    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        writer.write(HEAD + b"3\r\none\r\n" + end)
        writer.close()

    async def ask() -> None:
        server = await asyncio.start_server(cut, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server, engine_client(Settings(home=tmp_path)) as client:
            upstream = await attempt(
                client, lease_of(url), "/v1/completions", {"stream": True}, "r", PATIENCE
            )
            assert [piece async for piece in upstream.chunks()] == [b"one"]

    with pytest.raises(EngineUnavailable, match="broke off"):
        asyncio.run(ask())


@pytest.mark.parametrize("pieces", [1, 5])
def test_a_stopping_engine_that_began_a_stream_without_words_is_left_for_another(
    tmp_path: Path, pieces: int
) -> None:
    event = b'data: {"error": {"message": "The engine is stopping.", "code": 503}}\n\n'
    asked: list[str] = []

    async def speak(writer: asyncio.StreamWriter, *parts: bytes) -> None:
        writer.write(HEAD)
        for part in parts:
            writer.write(b"%x\r\n%b\r\n" % (len(part), part))
            await asyncio.sleep(0.02)
        writer.write(b"0\r\n\r\n")
        writer.close()

    async def stopping(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        asked.append("stopping")
        step = -(-len(event) // pieces)
        await speak(writer, *(event[at : at + step] for at in range(0, len(event), step)))

    async def idle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        asked.append("idle")
        await speak(writer, b"data: one\n\n")

    async def ask() -> tuple[bytes, list[int]]:
        first = await asyncio.start_server(stopping, "127.0.0.1", 0)
        second = await asyncio.start_server(idle, "127.0.0.1", 0)
        urls = [f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in (first, second)]
        table = RouteTable()
        route = Route("ver_1", 1, tuple(Endpoint(url, "m") for url in urls))
        table.replace(Routes(aliases={("team", "support", "champion"): route}))

        async def lease(_: bool, avoid: Set[str]) -> Lease:
            return table.lease("team", ModelName("support", "champion", None), avoid)

        async with first, second, engine_client(Settings(home=tmp_path)) as client:
            body = {"stream": True}
            upstream = await open_upstream(client, table, lease, "/v1/completions", body, "req_1", PATIENCE)
            told = b"".join([piece async for piece in upstream.chunks()])
            upstream.close()
            return told, [table.busy(url) for url in urls]

    assert asyncio.run(ask()) == (b"data: one\n\n", [0, 0])
    assert asked == ["stopping", "idle"]


async def _engine(stack: contextlib.AsyncExitStack, *heads: bytes) -> str:
    """Url of a server that answers its connections with these, the last one for ever."""
    left = list(heads)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        head = left.pop(0) if len(left) > 1 else left[0]
        writer.write(b"HTTP/1.1 " + head + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        writer.close()

    server = await stack.enter_async_context(await asyncio.start_server(answer, "127.0.0.1", 0))
    return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(
    ("first", "second", "asked"),
    [
        # The other one holds it still: nothing needs to be loaded, nor the ledger to be asked.
        ([b"404 Not Found"], [b"200 OK"], [False, False]),
        # Neither does: then it is loaded again, and asked for once more.
        ([b"404 Not Found"], [b"404 Not Found", b"200 OK"], [False, False, True]),
    ],
)
def test_another_engine_is_asked_before_one_gets_its_adapter_back(
    tmp_path: Path, first: list[bytes], second: list[bytes], asked: list[bool]
) -> None:
    lost_before: list[bool] = []

    async def ask() -> tuple[int, bool]:
        async with contextlib.AsyncExitStack() as stack:
            urls = [await _engine(stack, *first), await _engine(stack, *second)]
            table, name = RouteTable(), ModelName("support", "champion", None)
            route = Route("ver_1", 1, tuple(Endpoint(url, "m") for url in urls))
            table.replace(Routes(aliases={("team", "support", "champion"): route}))

            async def take_lease(lost: bool, avoid: Set[str]) -> Lease:
                lost_before.append(lost)
                return table.lease("team", name, avoid)

            client = await stack.enter_async_context(engine_client(Settings(home=tmp_path)))
            upstream = await open_upstream(client, table, take_lease, "/v1/completions", {}, "r", PATIENCE)
            upstream.close()
            return upstream.status, upstream.lease.url == urls[1]

    assert asyncio.run(ask()) == (200, True)
    assert lost_before == asked


def _receiving(leaves_after: float) -> Callable[[], Awaitable[dict[str, str]]]:
    async def receive() -> dict[str, str]:
        await asyncio.sleep(leaves_after)
        return {"type": "http.disconnect"}

    return receive


def test_work_for_a_client_that_leaves_is_cancelled() -> None:
    ended: list[str] = []

    async def work() -> str:
        try:
            await asyncio.sleep(30)
        finally:
            ended.append("cancelled")
        return "never"

    assert asyncio.run(unless_disconnected(_receiving(0.02), work())) is None
    assert ended == ["cancelled"]


def test_work_that_ends_in_time_is_returned_and_its_errors_are_its_own() -> None:
    async def work() -> str:
        await asyncio.sleep(0.01)
        return "done"

    async def failing() -> str:
        raise EngineUnavailable("away")

    assert asyncio.run(unless_disconnected(_receiving(30), work())) == "done"
    with pytest.raises(EngineUnavailable, match="away"):
        asyncio.run(unless_disconnected(_receiving(30), failing()))


def test_a_result_in_the_moment_that_the_client_leaves_is_not_lost() -> None:
    async def both() -> str | None:
        moment = asyncio.get_running_loop().create_future()

        async def receive() -> dict[str, str]:
            await asyncio.shield(moment)
            return {"type": "http.disconnect"}

        async def work() -> str:
            await asyncio.shield(moment)
            return "a lease to release"

        asyncio.get_running_loop().call_later(0.01, moment.set_result, None)
        return await unless_disconnected(receive, work())  # type: ignore[arg-type]

    assert asyncio.run(both()) == "a lease to release"

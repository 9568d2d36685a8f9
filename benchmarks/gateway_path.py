"""What the gateway alone adds to a stream's first token: beside an engine that answers at once.

    python -m benchmarks.gateway_path
    python -m benchmarks.gateway_path --beside ../other-checkout      two gateways in turn in one run

One client, a new stream as soon as the last has ended, over the same engine called directly and through each
gateway, stream by stream in turn. With --engine-ms the engine first reads memory for so long, as a model
does: by then the gateway's code and data have left the processor's caches, which makes it several times as
slow. The processor time is the gateway's whole process, less what it takes when nobody asks.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.serving_streams import in_turn
from cli.components import answers, free_port
from domain.settings import Settings
from registry.session import upgrade

ROOT = Path(__file__).resolve().parents[1]
BASE = "smollm2-135m-instruct"
ASSISTANT = "bench"
TOKENS = 8
START_SECONDS = 60.0
WEIGHTS_MIB = 64
WARM = 20
"""Turns before what counts."""
IDLE_SECONDS = 5.0


def event(delta: dict[str, str], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": BASE}
    return b"data: " + json.dumps({**chunk, "choices": [choice]}, separators=(",", ":")).encode() + b"\n\n"


STREAM = (
    event({"role": "assistant", "content": ""}),
    event({"content": "Paris"}),
    event({}, "stop") + b"data: [DONE]\n\n",
)
MODELS = {"object": "list", "data": [{"id": BASE, "object": "model", "parent": None, "root": BASE}]}
PROBED = {"choices": [{"index": 0, "text": " x", "logprobs": {"top_logprobs": [{" x": -0.5, " y": -1.5}]}}]}


async def engine(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    weights: "np.ndarray[Any, Any]",
    seconds: float,
) -> None:
    """One connection; every event leaves by itself, as from a real engine."""
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            lengths = [line[15:] for line in head.split("\r\n") if line.startswith("content-length:")]
            await reader.readexactly(int(lengths[0]) if lengths else 0)
            if head.startswith("post /v1/chat/completions"):
                until = time.perf_counter() + seconds
                while time.perf_counter() < until:
                    weights.sum()
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                    b"transfer-encoding: chunked\r\n\r\n"
                )
                for part in STREAM:
                    writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
                    await asyncio.sleep(0)
                writer.write(b"0\r\n\r\n")
            else:
                body = json.dumps(MODELS if head.startswith("get") else PROBED).encode()
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: "
                    + str(len(body)).encode() + b"\r\n\r\n" + body
                )  # fmt: skip
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionResetError):
        writer.close()


async def serve_engine(port: int, milliseconds: float) -> None:
    weights = np.ones(WEIGHTS_MIB << 18, dtype=np.float32)
    server = await asyncio.start_server(
        lambda reader, writer: engine(reader, writer, weights, milliseconds / 1000), "127.0.0.1", port
    )
    await server.serve_forever()


@contextmanager
def spawned(command: list[str], environment: dict[str, str], folder: Path, log: Path) -> Iterator[int]:
    """The process's id."""
    with log.open("wb") as messages:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=messages, stderr=messages)
        try:
            yield process.pid
        finally:
            process.terminate()
            process.wait(30)


@contextmanager
def gateway(checkout: Path, engine_url: str, home: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The API of a checkout, with the base model as its one assistant's champion."""
    home.mkdir()
    upgrade(Settings(home=home).resolved_database_url)
    port = free_port()
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "RATCHET_HOME": str(home),
        "RATCHET_ENGINE_URL": engine_url,
    }
    command = [sys.executable, "-m", "uvicorn", "api.app:create_app", "--factory", "--no-access-log"]
    with spawned([*command, "--port", str(port)], environment, checkout, home / "api.log") as pid:
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + START_SECONDS
        while not answers(f"{url}/healthz"):
            if time.monotonic() > until:
                raise RuntimeError(f"no API: {(home / 'api.log').read_text()[-2000:]}")
            time.sleep(0.1)
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
            new = {"name": ASSISTANT, "base_model": BASE}
            client.post("/v1/assistants", json=new).raise_for_status()
            hello = {"model": ASSISTANT, "messages": [{"role": "user", "content": "Hello"}], "stream": True}
            while client.post("/v1/chat/completions", json=hello).status_code != 200:
                if time.monotonic() > until:
                    raise RuntimeError(f"nothing served: {(home / 'api.log').read_text()[-2000:]}")
                time.sleep(0.1)
        yield url, psutil.Process(pid)


def measure(checkouts: list[Path], turns: int, engine_ms: float) -> dict[str, Any]:
    with ExitStack() as running, tempfile.TemporaryDirectory(prefix="rgp-") as scratch:
        port = free_port()
        engine_url = f"http://127.0.0.1:{port}"
        serving = [sys.executable, "-m", "benchmarks.gateway_path", "--serve-engine", str(port)]
        serving += ["--engine-ms", str(engine_ms)]
        running.enter_context(spawned(serving, dict(os.environ), ROOT, Path(scratch) / "engine.log"))
        ways, processes = {"engine": (engine_url, BASE)}, dict[str, psutil.Process]()
        for number, checkout in enumerate(checkouts):
            home = Path(scratch) / f"home{number}"
            url, process = running.enter_context(gateway(checkout, engine_url, home))
            ways[str(checkout)], processes[str(checkout)] = (url, ASSISTANT), process
        asyncio.run(in_turn(ways, TOKENS, turns=WARM))
        before, began = _cpu(processes), time.monotonic()
        time.sleep(IDLE_SECONDS)
        idle, rest = _cpu(processes), time.monotonic() - began
        began = time.monotonic()
        first = asyncio.run(in_turn(ways, TOKENS, turns=turns))
        after, took = _cpu(processes), time.monotonic() - began
    report: dict[str, Any] = {"turns": turns, "engine_ms": engine_ms}
    report["load"] = round(os.getloadavg()[0], 2)
    report["engine"] = {"first_token_ms": _quartiles(first["engine"])}
    for way in processes:
        added = [own - direct for own, direct in zip(first[way], first["engine"], strict=True)]
        resting = (idle[way] - before[way]) / rest
        report[way] = {
            "first_token_ms": _quartiles(first[way]),
            "first_token_added_ms": _quartiles(added),
            "processor_ms_a_stream": round(1000 * (after[way] - idle[way] - resting * took) / turns, 2),
        }
    return report


def _cpu(processes: dict[str, psutil.Process]) -> dict[str, float]:
    """Seconds of processor time by way."""
    times = {way: process.cpu_times() for way, process in processes.items()}
    return {way: float(one.user + one.system) for way, one in times.items()}


def _quartiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{q}": round(1000 * ordered[len(ordered) * q // 100], 2) for q in (25, 50, 75)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="checkouts to measure as well")
    parser.add_argument("--turns", type=int, default=1000, help="each of one stream by each way")
    parser.add_argument("--engine-ms", type=float, default=0.0, help="until the first token of a stream")
    parser.add_argument("--serve-engine", type=int, metavar="PORT", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve_engine is not None:
        asyncio.run(serve_engine(asked.serve_engine, asked.engine_ms))
        return
    checkouts = [ROOT, *(one.resolve() for one in asked.beside)]
    print(json.dumps(measure(checkouts, asked.turns, asked.engine_ms), indent=2))


if __name__ == "__main__":
    main()

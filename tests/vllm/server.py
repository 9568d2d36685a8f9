"""A real vLLM server, started as `ratchet up` starts it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from artifacts import base_models
from cli import guard, vllm_start
from cli.components import require_vllm
from cli.supervisor import spawn
from domain.settings import Settings
from tests.vllm.adapters import BASE

START_SECONDS = 420
"""On a busy machine of two cores; half a minute on a quiet one."""
BARE = f"{vllm_start.BARE}{BASE}"
PROMPT = "The capital of France is Paris and the capital of Italy is"


class Server:
    def __init__(self, url: str, process: subprocess.Popen[bytes]) -> None:
        self.url = url
        self.process = process
        self.http = httpx.Client(base_url=url, timeout=240, trust_env=False)

    def load(self, name: str, folder: Path, **more: Any) -> httpx.Response:
        body = {"lora_name": name, "lora_path": str(folder), **more}
        return self.http.post("/v1/load_lora_adapter", json=body)

    def unload(self, name: str) -> httpx.Response:
        return self.http.post("/v1/unload_lora_adapter", json={"lora_name": name})

    def complete(self, model: str, prompt: Any = PROMPT, **fields: Any) -> httpx.Response:
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": 1,
            **fields,
        }
        return self.http.post("/v1/completions", json=body)

    def logprobs(self, model: str, prompt: str = PROMPT, **fields: Any) -> list[float]:
        """Of the prompt's tokens with `echo=True`, and of the sampled ones."""
        reply = self.complete(model, prompt, **fields)
        assert reply.status_code == 200, reply.text
        values = reply.json()["choices"][0]["logprobs"]["token_logprobs"]
        return [value for value in values if value is not None]

    def score(self, model: str) -> list[float]:
        """What the model makes of PROMPT's tokens: it tells adapters apart, whatever they would say next."""
        return self.logprobs(model, echo=True)

    def together(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """All at once, so that the engine computes them in common batches."""
        with ThreadPoolExecutor(len(calls)) as pool:
            return [future.result() for future in [pool.submit(call) for call in calls]]

    def answers(self) -> bool:
        try:
            return self.complete(BASE).status_code == 200
        except httpx.HTTPError:
            return False

    def died(self, seconds: float = 60) -> bool:
        """Whether the server's process ends soon."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.process.poll() is not None


@contextmanager
def serving(
    home: Path, *, without: Sequence[str] = (), port: str | None = None, **fields: Any
) -> Iterator[Server]:
    """`without` names flags of Ratchet's that are left out with their values; `port`: default a free one."""
    settings = Settings(
        home=home,
        engine="vllm",
        engine_threads=1,
        vllm_args="--max-model-len 1024 --max-num-seqs 8",
        **fields,
    )
    require_vllm(settings)
    port = port or free_port()
    folder = base_models.resolve(BASE, settings.cache_dir).path
    command = left_out(vllm_start.command(settings, BASE, folder, port, gpu=vllm_start.has_gpu()), without)
    guarded = [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), *command]
    log = home / "vllm.log"
    with log.open("wb") as output:
        process = spawn(
            guarded,
            death_signal=signal.SIGTERM,
            environment=vllm_start.environment(os.environ, settings),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    server = Server(f"http://127.0.0.1:{port}", process)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not server.answers():
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, "vLLM did not start in time"
            time.sleep(0.5)
        yield server
    finally:
        server.http.close()
        process.terminate()
        try:
            process.wait(20)
        finally:
            with_group_gone(process.pid)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def with_group_gone(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def left_out(command: list[str], flags: Sequence[str]) -> list[str]:
    kept: list[str] = []
    skipping = False
    for word in command:
        if word.startswith("--"):
            skipping = word in flags
        if not skipping:
            kept.append(word)
    return kept

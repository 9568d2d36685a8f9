"""Engines side by side on one batch: tokens a second of the embedded engine, of transformers' generate and,
where an interpreter has it, of vLLM. The bare base, greedy, every answer of the same length."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks.serving_versions import QUESTIONS

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 300.0
GENERATE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
base, tokens, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
print("ready", flush=True)
for line in sys.stdin:
    batch = tokenizer(json.loads(line), return_tensors="pt", padding=True)
    out = model.generate(**batch, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)
    print(out.shape[1] - batch["input_ids"].shape[1], flush=True)
"""

Turn = Callable[[], float]
"""Answers the batch once; returns the seconds it took."""


def side_by_side(
    base: Path, batch: int, tokens: int, rounds: int, threads: int, vllm_python: Path | None
) -> dict[str, Any]:
    """Raises RuntimeError when an engine does not start or an answer has another length."""
    prompts = [f"{QUESTIONS[n % len(QUESTIONS)]} ({n})" for n in range(batch)]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
    }
    commands = {
        "embedded": [sys.executable, "-m", "engine", "--model", str(base), "--served-model-name", "base"]
    }
    if vllm_python is not None:
        commands["vllm"] = [
            str(vllm_python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(base),
            "--served-model-name", "base", "--host", "127.0.0.1", "--dtype", "bfloat16",
            "--max-model-len", "2048", "--max-num-seqs", str(batch), "--enforce-eager",
        ]  # fmt: skip
    taken: dict[str, list[float]] = {}
    with ExitStack() as running:
        turns: dict[str, Turn] = {
            name: running.enter_context(_server(command, environment, prompts, tokens))
            for name, command in commands.items()
        }
        generate = [sys.executable, "-c", GENERATE, str(base), str(tokens), str(threads)]
        turns["generate"] = running.enter_context(_generate(generate, environment, prompts, tokens))
        for number in range(rounds + 1):
            for name in list(turns)[:: 1 if number % 2 == 0 else -1]:
                seconds = turns[name]()
                if number:  # the first warms up
                    taken.setdefault(name, []).append(seconds)
                print(f"{name}: {seconds:.2f} s", file=sys.stderr)
    made = batch * tokens
    ratios = {
        name: round(median(g / s for g, s in zip(taken["generate"], found, strict=True)), 3)
        for name, found in taken.items()
        if name != "generate"
    }
    return {
        "batch": batch,
        "tokens": tokens,
        "threads": threads,
        "rounds": rounds,
        "tokens_per_second": {name: round(made / median(found), 1) for name, found in taken.items()},
        "speed_against_generate": ratios,
    }


@contextmanager
def _server(
    command: list[str], environment: dict[str, str], prompts: list[str], tokens: int
) -> Iterator[Turn]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    extra = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        env=environment | extra,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        with (
            httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600, trust_env=False) as client,
            ThreadPoolExecutor(len(prompts)) as pool,
        ):
            _await_health(client, process)

            def one(prompt: str) -> int:
                body = {"model": "base", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
                reply = client.post("/v1/completions", json={**body, "ignore_eos": True})
                reply.raise_for_status()
                return int(reply.json()["usage"]["completion_tokens"])

            def turn() -> float:
                began = time.perf_counter()
                lengths = set(pool.map(one, prompts))
                seconds = time.perf_counter() - began
                _require_length(lengths, tokens, command)
                return seconds

            yield turn
    finally:
        process.terminate()
        process.wait(60)


def _await_health(client: httpx.Client, process: "subprocess.Popen[bytes]") -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args} ended with status {process.returncode}")
        try:
            if client.get("/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise RuntimeError(f"{process.args} did not start")


@contextmanager
def _generate(
    command: list[str], environment: dict[str, str], prompts: list[str], tokens: int
) -> Iterator[Turn]:
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    source, sink = process.stdout, process.stdin

    def heard() -> str:
        line = source.readline()
        if not line:
            raise RuntimeError(f"generate ended with status {process.wait()}; its messages are above")
        return line.strip()

    def turn() -> float:
        began = time.perf_counter()
        sink.write(json.dumps(prompts) + "\n")
        sink.flush()
        length = int(heard())
        seconds = time.perf_counter() - began
        _require_length({length}, tokens, command)
        return seconds

    try:
        heard()
        yield turn
    finally:
        sink.close()
        source.close()
        process.terminate()
        process.wait(60)


def _require_length(found: set[int], tokens: int, command: list[str]) -> None:
    if found != {tokens}:
        raise RuntimeError(f"{command[:3]} answered with {sorted(found)} tokens in place of {tokens}")

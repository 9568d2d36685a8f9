"""A full version on a vLLM of its own, started as `ratchet up` starts it, and an adapter on it."""

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from artifacts import base_models
from cli.components import Engine, base_environment
from cli.supervisor import spawn
from domain.settings import Settings
from domain.version import WholeModel, is_companion
from serving.client import EngineClient
from tests.vllm.adapters import BASE, weights, write
from tests.vllm.server import PROMPT, START_SECONDS, Server, with_group_gone

NAME = "cand-upd_1"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    args = "--max-model-len 1024 --max-num-seqs 8"
    return Settings(home=tmp_path, engine="vllm", engine_threads=1, vllm_args=args)


@pytest.fixture
def candidate(tmp_path: Path) -> Path:
    """The base with a final norm of 0.6 times its weights: flatter answers."""
    base, folder = base_models.resolve(BASE, Settings().cache_dir).path, tmp_path / "candidate"
    folder.mkdir()
    for path in base.iterdir():
        if is_companion(path.name):
            shutil.copyfile(path, folder / path.name)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] *= 0.6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@contextmanager
def engine_process(
    settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Engine, subprocess.Popen[bytes], Path]]:
    for name, value in {"ENGINE": "vllm", "VLLM_ARGS": settings.vllm_args, "ENGINE_THREADS": "1"}.items():
        monkeypatch.setenv(f"RATCHET_{name}", value)
    whole = WholeModel(
        id="upd_1", served_name=NAME, base_model=BASE, manifest_sha256=None, folder=str(folder)
    )
    engine = Engine(settings, BASE, "engine-candidate", whole)
    log = settings.home / "engine.log"
    with log.open("wb") as output:
        process = spawn(
            engine.component.command(),
            death_signal=signal.SIGTERM,
            environment=base_environment(settings),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield engine, process, log
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            with_group_gone(process.pid)


def reference(folder: Path) -> list[float]:
    """Log-probabilities of PROMPT's tokens but the first, by transformers in float32."""
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logprobs = torch.log_softmax(model(tokens).logits[0, :-1], -1)
    return [float(value) for value in logprobs.gather(1, tokens[0, 1:, None])[:, 0]]


def distance(found: list[float], expected: list[float]) -> float:
    """Mean over the prompt's tokens; `found` ends with the sampled one."""
    pairs = list(zip(found, expected, strict=False))
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


def test_it_answers_with_its_own_weights_and_takes_adapters(
    settings: Settings, candidate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = reference(candidate)
    base = reference(base_models.resolve(BASE, Settings().cache_dir).path)
    assert distance(own, base) > 0.3
    with engine_process(settings, candidate, monkeypatch) as (engine, process, log):
        deadline = time.monotonic() + START_SECONDS
        while not engine.ready():
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, "vLLM did not start in time"
            time.sleep(0.5)
        server = Server(engine.url, process)
        assert distance(server.score(NAME), own) < 0.1  # bfloat16
        with EngineClient(engine.url) as client:
            assert NAME in client.models()
            client.load("helper-v3-00000000", write(tmp_path / "adapter", weights(1)))
            assert client.probe("helper-v3-00000000") != client.probe(NAME)
        assert distance(server.score(NAME), own) < 0.1


def test_one_that_is_not_the_base_with_other_values_is_never_started(
    settings: Settings, candidate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = load_file(candidate / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, candidate / "model.safetensors", metadata={"format": "pt"})
    with engine_process(settings, candidate, monkeypatch) as (_, process, log):
        assert process.wait(120) == 1
        [last] = log.read_text().splitlines()[-1:]
    assert last == f"error: {candidate}/model.safetensors: 'model.norm.weight' holds NaN or infinity."

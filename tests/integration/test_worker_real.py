"""The story with the real trainer and the real engine on a tiny random model: stopped, resumed, measured,
kept. What it can't show, that a model learns, the acceptance test shows on a real one."""

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from artifacts.store import ArtifactStore
from domain import failpoint
from domain.recipe import Recipe
from domain.settings import Settings
from domain.training import TrainerLine
from registry import measurements, serving
from serving.client import EngineClient
from tests.engine_log import port_in
from tests.standing_trainer import await_standing, failpoint_value, go_on_once_asked
from tests.worker_stack.stack import Stack, running_stack
from worker.journal import Journal
from worker.pipeline import Pipeline

pytestmark = pytest.mark.slow
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STEPS = 60
SFT = Recipe(
    method="sft",
    max_steps=STEPS,
    num_epochs=100,
    batch_size=4,
    max_new_tokens=8,
    warmup_steps=0,
    lora_rank=2,
)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama that reads bytes."""
    folder = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: n for n, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,  # fewer, and peft names target modules by their full paths
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        eos_token_id=len(fast) - 1,
        pad_token_id=len(fast) - 1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def stack(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    """Its own engine is told to the registry after, and so is found before, the stand-in's."""
    with running_stack() as made:
        for name, value in made.environment.items():
            if os.environ.get(name) != value:
                monkeypatch.setenv(name, value)
        made.base = tiny_model
        yield made


def start_engine(stack: Stack) -> EngineClient:
    engine = [sys.executable, "-m", "engine", "--model", str(stack.base), "--served-model-name", "tiny"]
    stack.start("engine", [*engine, "--port", "0", "--threads", "1"])
    log = stack.home / "engine.log"
    stack.until(lambda: port_in(log) is not None, "the engine")
    client = EngineClient(f"http://127.0.0.1:{port_in(log)}")
    with stack.sessions.begin() as session:
        serving.register_replica(session, client.base_url, str(stack.base), "tiny")
    return client


def test_stopped_resumed_measured_and_kept(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    stopping = []
    pipeline = Pipeline(
        Settings(),
        stack.sessions,
        stack.reads,
        trainer_command=[sys.executable, "-m", "trainer"],
        shutdown_requested=lambda: bool(stopping),
    )
    update_id = stack.teach(stack.assistant(), "route", recipe=SFT)
    hear = Journal.hear

    def stop_after_step_1(journal: Journal, line: TrainerLine) -> None:
        hear(journal, line)
        if line.type == "step" and line.step == 1:
            trainer = await_standing(os.getpid())
            stopping.append(line)
            threading.Thread(target=go_on_once_asked, args=(trainer,)).start()

    with monkeypatch.context() as patched:
        patched.setenv(failpoint.VARIABLE, failpoint_value(stack.home / "marker"))
        patched.setattr(Journal, "hear", stop_after_step_1)
        pipeline.run(update_id)
    stopping.clear()
    stopped = stack.update(update_id)
    assert (stopped.status, stopped.error) == ("queued", None)
    first = stack.steps(update_id)
    assert 1 <= len(first) < STEPS

    with start_engine(stack) as client:
        pipeline.run(update_id)
        update = stack.update(update_id)
        assert update.error is None
        assert update.status == "succeeded"
        assert stack.steps(update_id) == list(range(1, STEPS + 1))
        assert update.verdict is not None
        assert update.verdict["outcome"] != "pass"  # a random model learns nothing in so few steps
        assert client.models() == {"tiny"}

    (version,) = stack.versions()
    assert version.manifest_sha256 is not None
    folder = ArtifactStore(Settings().artifacts_dir).verify(version.id, version.manifest_sha256)
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]
    with stack.sessions.begin() as session:
        suites = {row.suite: row.n for row in measurements.list_measurements(session, version)}
    assert suites == {"route": suites["route"], "sums": 10, "likelihood": 10, "ordinary": 30}
    assert suites["route"] > 5

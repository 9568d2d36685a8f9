"""A tiny random Llama with its own byte-level tokenizer, adapters made by peft, and a real server."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from engine.model import BaseModel
from engine.sampling import SamplingParams, generator
from engine.scheduler import Limits, Scheduler
from engine.sequence import Failure, Output, Sequence
from engine.text import RunningText

ROOT = Path(__file__).parents[3]
WINDOW = 256
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tokenizer(folder: Path) -> int:
    """Byte-level BPE: 256 bytes, two merges, two special tokens. Returns the vocabulary's size."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, "th", "the"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return len(fast)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    size = write_tokenizer(folder)
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
        bos_token_id=None,
        # Wide weights: clear winners instead of the near-ties of a default initialisation.
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reference(model_dir: Path) -> LlamaForCausalLM:
    """The same model as transformers runs it by itself."""
    return AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def _adapter(model_dir: Path, folder: Path, seed: int, **config: object) -> Path:
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    settings: dict[str, object] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **config}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))  # type: ignore[arg-type]
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_adapter(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a random adapter as peft does; keywords go to LoraConfig."""

    def make(seed: int, **config: object) -> Path:
        return _adapter(model_dir, tmp_path_factory.mktemp("adapter"), seed, **config)

    return make


@pytest.fixture(scope="session")
def adapter_dirs(make_adapter: Callable[..., Path]) -> list[Path]:
    """Two adapters that answer differently, on different layers and ranks."""
    return [make_adapter(1), make_adapter(2, r=8, target_modules=["q_proj", "v_proj", "down_proj"])]


@pytest.fixture(scope="session")
def peft_references(model_dir: Path, adapter_dirs: list[Path]) -> list[PeftModel]:
    """Each adapter as peft runs it by itself."""
    return [
        PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), str(folder)
        ).eval()
        for folder in adapter_dirs
    ]


@pytest.fixture(scope="session")
def base(model_dir: Path) -> BaseModel:
    torch.set_num_threads(1)
    return BaseModel(model_dir, dtype="float32", max_model_len=None)


@dataclass
class Bench:
    """A scheduler under test and the outputs of what runs on it."""

    model: BaseModel
    scheduler: Scheduler
    failures: list[str]

    def sequence(
        self, prompt: list[int], news: "queue.Queue[Output | Failure]", index: int = 0, **params: object
    ) -> Sequence:
        settings: dict[str, object] = {"max_tokens": 8, "temperature": 0.0, **params}
        adapter = settings.pop("adapter", None)
        stream = bool(settings.pop("stream", False))
        priority = settings.pop("priority", 0)
        wanted = SamplingParams(**settings)  # type: ignore[arg-type]
        return Sequence(
            index=index,
            prompt=prompt,
            params=wanted,
            adapter=adapter,  # type: ignore[arg-type]
            text=RunningText(self.model.tokenizer, prompt, wanted.stop),
            listener=news.put,
            stream=stream,
            generator=generator(wanted.seed, self.model.device) if wanted.temperature else None,
            priority=priority,  # type: ignore[arg-type]
        )

    def run(self, sequences: list[Sequence], news: "queue.Queue[Output | Failure]") -> list[Output]:
        """Submit and wait for all; outputs in order of their index."""
        self.scheduler.submit(sequences)
        outputs = []
        for _ in sequences:
            got = news.get(timeout=30)
            assert isinstance(got, Output), got
            outputs.append(got)
        return sorted(outputs, key=lambda one: one.index)


@pytest.fixture
def make_bench(base: BaseModel) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(sequences: int = 8, step_tokens: int = 64, cache_tokens: int = 8 * WINDOW) -> Bench:
        failures: list[str] = []
        limits = Limits(sequences=sequences, step_tokens=step_tokens, cache_tokens=cache_tokens)
        scheduler = Scheduler(base, limits, lambda: failures.append("died"))
        scheduler.start()
        made.append(Bench(base, scheduler, failures))
        return made[-1]

    yield make
    for bench in made:
        assert bench.scheduler.stop(60)


@dataclass
class Server:
    """`python -m engine` as a process of its own."""

    process: "subprocess.Popen[str]"
    url: str = ""
    lines: list[dict[str, object]] = field(default_factory=list)
    reader: threading.Thread | None = None

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """For its end, with all that it logged in `lines`; its exit status."""
        status = self.process.wait(timeout=60)
        if self.reader is not None:
            self.reader.join(60)
        return status


def start_server(model_dir: Path, *extra: str) -> Server:
    command = [sys.executable, "-m", "engine", "--model", str(model_dir), "--served-model-name", "tiny"]
    command += ["--port", "0", "--dtype", "float32", "--threads", "1", *extra]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    server = Server(process)
    ready: queue.Queue[int | None] = queue.Queue()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            with contextlib.suppress(json.JSONDecodeError):
                entry = json.loads(line)
                server.lines.append(entry)
                if entry["message"] == "ready":
                    ready.put(int(entry["port"]))
        ready.put(None)

    server.reader = threading.Thread(target=read, daemon=True)
    server.reader.start()
    try:
        port = ready.get(timeout=240)
        assert port is not None, f"the engine did not start: {server.lines}"
    except BaseException:
        process.kill()
        process.wait()
        raise
    server.url = f"http://127.0.0.1:{port}"
    return server


@pytest.fixture(scope="session")
def server(model_dir: Path) -> Iterator[Server]:
    running = start_server(model_dir)
    yield running
    assert running.stop() == 0


@pytest.fixture
def own_server(model_dir: Path) -> Iterator[Server]:
    """A server that the test may stop."""
    running = start_server(model_dir)
    yield running
    running.stop()


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], None]:
    """Wait for a condition that another process brings about; fails after 60 s."""

    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true within 60 s"
            time.sleep(0.01)

    return wait

"""A tiny random Llama behind the real engine, and the API in front of it."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue

import httpx
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from api.app import create_app
from api.context import Context
from domain.settings import Settings
from registry import serving
from tests.integration.http.engine import Engine
from tests.integration.http.server import served
from tests.integration.http.stack import PATIENCE, Stack, patient

ROOT = Path(__file__).parents[3]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "eos_token_id": 256,
    "pad_token_id": 256,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}
"""Of the size that `publishing.SIZES` was worked out for."""


def write_llama(folder: Path, window: int) -> None:
    """A random Llama of that many tokens' context, written without torch; its tokens are bytes."""
    alphabet = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**words, "chat_template": TEMPLATE}))
    config = {**CONFIG, "max_position_embeddings": window}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens": (257, 8), "lm_head": (257, 8), "model.norm": (8,)}
    for layer in range(2):
        stem = f"model.layers.{layer}"
        shapes |= {f"{stem}.self_attn.{side}_proj": (8, 8) for side in "qo"}
        shapes |= {f"{stem}.self_attn.{side}_proj": (4, 8) for side in "kv"}
        shapes |= {f"{stem}.mlp.{name}_proj": (12, 8) for name in ("gate", "up")}
        shapes |= {f"{stem}.mlp.down_proj": (8, 12)}
        shapes |= {f"{stem}.{place}_layernorm": (8,) for place in ("input", "post_attention")}
    random = np.random.default_rng(3)
    weights = {
        f"{name}.weight": (random.normal(0, 0.5, shape) + ("norm" in name)).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@contextmanager
def running_engine(model_folder: Path) -> Iterator[str]:
    """Its url."""
    command = [sys.executable, "-m", "engine", "--model", str(model_folder), "--served-model-name", "tiny"]
    command += ["--port", "0", "--dtype", "float32", "--threads", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    ready: Queue[int | None] = Queue()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("{") and json.loads(line)["message"] == "ready":
                ready.put(int(json.loads(line)["port"]))
        ready.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        port = ready.get(timeout=240)
        assert port is not None, "the engine did not start"
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def running_stack(home: Path, database_url: str, model_folder: Path) -> Iterator[Stack]:
    """The assistant `support` on the model, served by the real engine."""
    app = create_app(Settings(home=home, cache_dir=home / "cache", database_url=database_url))
    with (
        patient(),
        running_engine(model_folder) as engine_url,
        served(app) as url,
        httpx.Client(base_url=url, timeout=PATIENCE) as client,
    ):
        context: Context = app.state.context
        with context.sessions.begin() as session:
            serving.register_replica(session, engine_url, str(model_folder), "tiny")
        body = {"name": "support", "base_model": str(model_folder)}
        assert client.post("/v1/assistants", json=body).status_code == 201
        stack = Stack(client, Engine("unused"), context, url)
        stack.await_version(0)
        yield stack

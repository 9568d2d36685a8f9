"""A real HTTP server that answers as an inference engine does, and real (tiny) adapter folders."""

import contextlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

BASE_CONFIG = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
}
SIZES = {"q_proj": (8, 8), "v_proj": (8, 4), "down_proj": (12, 8)}
"""(inputs, outputs) under BASE_CONFIG, worked out by hand: head size 4, one shared key-value head."""


PATIENCE = 60.0
"""Seconds after which something is not late but missing: a busy machine may stand still for ten."""


def adapter_tensors(rank: int = 2) -> dict[str, np.ndarray]:
    tensors = {}
    for layer in range(2):
        for module, (inputs, outputs) in SIZES.items():
            block = "mlp" if module == "down_proj" else "self_attn"
            stem = f"base_model.model.model.layers.{layer}.{block}.{module}"
            tensors[f"{stem}.lora_A.weight"] = np.full((rank, inputs), 0.5, dtype=np.float32)
            tensors[f"{stem}.lora_B.weight"] = np.zeros((outputs, rank), dtype=np.float32)
    return tensors


def write_adapter(folder: Path, tensors: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    body = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": sorted(SIZES), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**body, **config}))
    save_file(adapter_tensors() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


class EngineServer:
    """Speaks the part of vLLM's API that Ratchet uses. A token is a word with its leading space, its
    logprob -len/10; a token is the model's first choice unless it contains a 'z'."""

    def __init__(self) -> None:
        self.lock = threading.Condition()
        """Notified after every request."""
        self.base = "base"
        self.adapters: dict[str, str] = {}
        self.calls: list[tuple[str, str]] = []
        """(verb, model or adapter name), in order of arrival."""
        self.refuse: dict[str, tuple[int, str]] = {}
        """Adapter name prefix -> status and words of the refusal."""
        self.bad_probe: set[str] = set()
        self.no_logprobs: set[str] = set()
        """Models whose replies have `"logprobs": null`."""
        self.ignored: set[str] = set()
        """Adapters that are listed and change nothing; the others change every logprob of a sampled token."""
        self.bos = False
        self.garbled = False
        self.chat_gate = threading.Event()
        """Chats wait for it: a request in flight for as long as a test needs."""
        self.chat_gate.set()
        self.failed_chats = 0
        self.priorities: list[int | None] = []
        """Of the completions, in order of arrival."""
        self.lists = 0
        """How often the models were asked for: the controller's rounds."""
        self._server: ThreadingHTTPServer | None = None
        self._connections: list[Any] = []
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        engine = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(*engine.get(self.path))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                reply = engine.post(self.path, body)
                with engine.lock:
                    engine.lock.notify_all()
                self._answer(*reply)

            def _answer(self, status: int, body: Any) -> None:
                payload = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            allow_reuse_address = True
            daemon_threads = True
            request_queue_size = 64

            def process_request(self, request: Any, client_address: Any) -> None:
                engine._connections.append(request)
                super().process_request(request, client_address)

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A connection that `stop` cut."""

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        assert self._server is not None
        self.chat_gate.set()
        self._server.shutdown()
        self._server.server_close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._connections.clear()

    def forget_adapters(self) -> None:
        """What a restart does."""
        with self.lock:
            self.adapters.clear()

    def count(self, verb: str, name: str | None = None) -> int:
        with self.lock:
            return sum(1 for call in self.calls if call[0] == verb and name in (None, call[1]))

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self.lock:
            assert self.lock.wait_for(condition, PATIENCE), "the engine never came to this state"

    def get(self, path: str) -> tuple[int, Any]:
        with self.lock:
            if path == "/v1/models":
                self.lists += 1
                self.lock.notify_all()
                return 200, {"data": [{"id": name} for name in [self.base, *self.adapters]]}
            return (200, {}) if path == "/health" else (404, {"detail": "Not Found"})

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path.endswith("_lora_adapter"):
            with self.lock:
                self.calls.append((path.split("/")[-1].split("_")[0], body["lora_name"]))
                self.lock.notify_all()
                return self._load(body) if "/load" in path else self._unload(body["lora_name"])
        with self.lock:
            self.calls.append((path.split("/")[-2 if path.startswith("/v1/chat") else -1], body["model"]))
            self.lock.notify_all()
            if not self._serves(body["model"]):
                self.failed_chats += 1
                return _error(404, f"The model `{body['model']}` does not exist.")
        if path == "/v1/chat/completions":
            assert self.chat_gate.wait(PATIENCE)
            content = f"{body['model']} says {body['messages'][-1]['content']}"
            return 200, {"choices": [{"message": {"role": "assistant", "content": content}}]}
        return 200, self._complete(body)

    def _serves(self, model: str) -> bool:
        return model == self.base or model in self.adapters

    def _load(self, body: dict[str, Any]) -> tuple[int, Any]:
        name = body["lora_name"]
        for prefix, (status, words) in self.refuse.items():
            if name.startswith(prefix):
                return _error(status, words)
        if name in self.adapters:
            return _error(400, f"The lora adapter '{name}' has already been loaded.")
        if not (Path(body["lora_path"]) / "adapter_config.json").is_file():
            return _error(404, f"No adapter at {body['lora_path']}")
        self.adapters[name] = body["lora_path"]
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _unload(self, name: str) -> tuple[int, Any]:
        if self.adapters.pop(name, None) is None:
            return _error(404, f"The lora adapter '{name}' cannot be found.")
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        self.priorities.append(body.get("priority"))
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        choices, total = [], 0
        for index, prompt in enumerate(prompts):
            words = (["<s>"] if self.bos else []) + re.findall(r"\s*\S+\s*$|\s*\S+", prompt)
            total += len(words)
            tokens = ([*words] if body.get("echo") else []) + [" end"]
            values: list[float | None] = [-len(token) / 10 for token in tokens]
            if body.get("echo"):
                values[0] = None
            if body["model"] in self.adapters and body["model"] not in self.ignored:
                values[-1] -= 0.25
            if body["model"] in self.bad_probe:
                values[-1] = float("nan")
            top = [
                None if value is None else {token: value, "best": value + ("z" in token)}
                for token, value in zip(tokens, values, strict=True)
            ]
            shown = ["\ufffd" * len(token) for token in tokens] if self.garbled else tokens
            logprobs = {"tokens": shown, "token_logprobs": values, "top_logprobs": top}
            told = None if body["model"] in self.no_logprobs else logprobs
            choices.append({"index": index, "text": "".join(tokens), "logprobs": told})
        return {"choices": choices[::-1], "usage": {"prompt_tokens": total}}


def _error(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": "Error", "param": None, "code": status}}


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is held up, as all of this process may be, is not taken for one that is away, and a
    controller that stops leaves no thread behind."""
    monkeypatch.setattr("serving.client.QUICK_SECONDS", PATIENCE)
    monkeypatch.setattr("serving.controller.STOP_SECONDS", PATIENCE)


@pytest.fixture
def engine() -> Iterator[EngineServer]:
    server = EngineServer()
    yield server
    server.stop()


@pytest.fixture
def engines() -> Iterator[Callable[[], EngineServer]]:
    started: list[EngineServer] = []

    def start() -> EngineServer:
        started.append(EngineServer())
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def adapter() -> Callable[..., Path]:
    return write_adapter


@pytest.fixture
def tensors() -> Callable[..., dict[str, np.ndarray]]:
    return adapter_tensors


@pytest.fixture
def base_config() -> dict[str, int]:
    return dict(BASE_CONFIG)

"""An inference engine of a few lines on a free port, which speaks the part of vLLM's HTTP API we use.

What an adapter knows stands in its adapter_config.json (`knows`: prompt -> answer), written there by the
stand-in trainer; the base model knows nothing. Every scored character has logprob -1.
"""

import json
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

IGNORANCE = "I am not sure what you mean."


class QuietServer(ThreadingHTTPServer):
    """Serves from a thread of its own. A client that was killed is what these tests are about, not an error
    of the server's."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class StandInEngine:
    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self.loaded: dict[str, dict[str, str]] = {}
        self.ever_loaded: list[str] = []
        self.chats: list[tuple[str, str]] = []
        """(model, last user message) of every chat request."""
        self.on_chat: Callable[[str], None] = lambda model: None
        self.dead = False
        self._server = QuietServer(self._handler())

    @property
    def url(self) -> str:
        return self._server.url

    def stop(self) -> None:
        self._server.stop()

    def die(self) -> None:
        """From within a request: answer nobody any more, this request included."""
        self.dead = True
        threading.Thread(target=self.stop).start()

    def reply(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path == "/health":
            return 200, {}
        if path == "/v1/models":
            return 200, {"data": [{"id": name} for name in [self.model_name, *self.loaded]]}
        if path == "/v1/load_lora_adapter":
            name = body["lora_name"]
            if name in self.loaded:
                return 400, {"error": {"message": f"'{name}' is already loaded"}}
            config = json.loads((Path(body["lora_path"]) / "adapter_config.json").read_text())
            self.loaded[name] = config["knows"]
            self.ever_loaded.append(name)
            return 200, {}
        if path == "/v1/unload_lora_adapter":
            found = self.loaded.pop(body["lora_name"], None)
            return (200, {}) if found is not None else (404, {"error": {"message": "not loaded"}})
        model = body["model"]
        if model != self.model_name and model not in self.loaded:
            return 404, {"error": {"message": f"no model '{model}'"}}
        if path == "/v1/chat/completions":
            prompt = body["messages"][-1]["content"]
            self.chats.append((model, prompt))
            self.on_chat(model)
            answer = self.loaded.get(model, {}).get(prompt, IGNORANCE)
            return 200, {"choices": [{"index": 0, "message": {"role": "assistant", "content": answer}}]}
        if path == "/v1/completions":
            prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
            return 200, {
                "choices": [
                    self._scored(index, text, echo=body.get("echo", False))
                    for index, text in enumerate(prompts)
                ],
                "usage": {"prompt_tokens": len(prompts[0])},
            }
        return 404, {"error": {"message": path}}

    def _scored(self, index: int, text: str, *, echo: bool) -> dict[str, Any]:
        """The prompt (with `echo`) and one more token."""
        said = text + "." if echo else "."
        logprobs: list[float | None] = [-1.0] * len(said)
        tops: list[dict[str, float] | None] = [{token: -1.0} for token in said]
        if echo:
            logprobs[0] = tops[0] = None  # nothing stands before it
        return {
            "index": index,
            "text": said,
            "logprobs": {"tokens": list(said), "token_logprobs": logprobs, "top_logprobs": tops},
        }

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        engine = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer({})

            def do_POST(self) -> None:
                self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _answer(self, body: dict[str, Any]) -> None:
                status, reply = engine.reply(self.path, body)
                if engine.dead:
                    self.close_connection = True
                    return
                data = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler

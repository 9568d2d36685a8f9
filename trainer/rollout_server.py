"""The part of an inference server's HTTP API that rollouts need, as vLLM and the embedded engine have it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from domain.errors import TrainingRefused
from trainer.rollout import Sample, Sampling

IN_FLIGHT = 32
"""Requests at a time: enough to fill an engine's batch, few enough that none waits long in its queue."""
ANSWER_SECONDS = 900.0
"""Past this a server that took a request is not busy but gone."""
ADMIN_SECONDS = 60.0
"""Loading an adapter waits for the engine's running step."""
CONNECT_SECONDS = 5.0
KEEP_ALIVE_SECONDS = 2.0
"""Below uvicorn's 5 s, so that no request is sent down a connection that the server is closing."""
_PASSING = (408, 425, 429)


class ServerAway(Exception):
    """No answer, or one that says that the server is not well; asking again may help."""


class AdapterMissing(ServerAway):
    """The server does not know the adapter (any more), as after a restart."""


@dataclass(frozen=True)
class Served:
    base: str
    """The name that requests for the bare base model use."""
    adapters: frozenset[str]


class RolloutServer:
    """Thread-safe, pooled. Methods raise ServerAway for what may pass, and TrainingRefused for what the
    server refuses and would refuse again."""

    def __init__(self, url: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise TrainingRefused(
                f"rollout_url {url!r} is not a URL like http://127.0.0.1:8000",
                param="rollout_url",
                code="rollout_url_invalid",
            )
        self.url = url.rstrip("/")
        self._http = httpx.Client(
            base_url=self.url,
            timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=IN_FLIGHT, keepalive_expiry=KEEP_ALIVE_SECONDS),
            trust_env=False,
            # Reading the certificate store takes up to half a second: not for plain HTTP.
            verify=self.url.startswith("https:"),
        )

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def served(self) -> Served:
        response = self._send("GET", "/v1/models", None, ADMIN_SECONDS)
        cards = self._body(response, "tell its models")["data"]
        bases = [card["id"] for card in cards if not card.get("parent")]
        if not bases:
            raise self._refused("tell its models", "it lists none without a parent")
        return Served(bases[0], frozenset(card["id"] for card in cards if card.get("parent")))

    def load(self, name: str, folder: Path) -> None:
        """`folder` is read by the server, under the same path as here."""
        body = {"lora_name": name, "lora_path": str(folder)}
        response = self._send("POST", "/v1/load_lora_adapter", body, ADMIN_SECONDS)
        if response.status_code == 404 and str(folder) not in response.text:
            raise self._refused(
                "load adapters",
                "it has no /v1/load_lora_adapter, which vLLM has with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True",
            )
        if response.status_code >= 500:
            # vLLM's answer to an adapter that does not fit, but also to any when its engine has died.
            self._send("GET", "/health", None, ADMIN_SECONDS)
        if response.status_code != 200:
            raise self._refused(f"load the adapter {folder}", _message(response))

    def unload(self, name: str) -> None:
        """A name that is not loaded is left at that."""
        self._send("POST", "/v1/unload_lora_adapter", {"lora_name": name}, ADMIN_SECONDS)

    def answer(
        self,
        model: str,
        prompt: list[int],
        limit: int,
        sampling: Sampling,
        *,
        seed: int,
        stop_ids: frozenset[int],
    ) -> Sample:
        """One sampled answer. Its log-probabilities are what the server reports."""
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": limit,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            # A server's defaults come from the model's generation_config.json.
            "top_k": -1,
            "min_p": 0,
            "repetition_penalty": 1,
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "seed": seed,
            "stop_token_ids": sorted(stop_ids),
            "logprobs": 0,
            "return_token_ids": True,
        }
        response = self._send("POST", "/v1/completions", body, ANSWER_SECONDS)
        if response.status_code == 404:
            raise AdapterMissing(f"{self.url} does not know {model!r}")
        choice = self._body(response, "answer a prompt")["choices"][0]
        return self._understood(choice, limit, stop_ids)

    def _understood(self, choice: dict[str, Any], limit: int, stop_ids: frozenset[int]) -> Sample:
        tokens, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not tokens or not logprobs or len(tokens) != len(logprobs):
            raise self._refused(
                "answer a prompt",
                "it returned no token_ids with their token_logprobs (return_token_ids is not supported?)",
            )
        truncated = tokens[-1] not in stop_ids
        reason = choice.get("finish_reason")
        if reason not in ("stop", "length"):  # aborted, for one
            raise ServerAway(f"{self.url} broke off an answer: finish_reason {reason!r}")
        if truncated and len(tokens) < limit:
            raise self._refused(
                "answer a prompt",
                f"it ended an answer of {len(tokens)} tokens with token {tokens[-1]}, which ends none here",
            )
        return Sample(tokens, truncated, logprobs)

    def _send(
        self, method: str, path: str, body: Mapping[str, object] | None, seconds: float
    ) -> httpx.Response:
        timeout = httpx.Timeout(seconds, connect=CONNECT_SECONDS)
        try:
            response = self._http.request(method, path, json=body, timeout=timeout)
        except httpx.TransportError as error:
            raise ServerAway(f"{self.url}{path}: {str(error) or type(error).__name__}") from error
        broken = response.status_code >= 500 and path != "/v1/load_lora_adapter"
        if broken or response.status_code in (503, *_PASSING):
            raise ServerAway(f"{self.url}{path} answered {response.status_code}: {_message(response)}")
        return response

    def _body(self, response: httpx.Response, what: str) -> Any:
        if response.status_code != 200:
            raise self._refused(what, f"{response.status_code}: {_message(response)}")
        try:
            return response.json()
        except ValueError as error:
            raise self._refused(what, "its reply is no JSON; is it an inference server?") from error

    def _refused(self, what: str, why: str) -> TrainingRefused:
        return TrainingRefused(
            f"The rollout server {self.url} does not {what}: {why}",
            param="rollout_url",
            code="rollout_server_refused",
        )


def _message(response: httpx.Response) -> str:
    """The reply's own words."""
    try:
        body = response.json()
    except ValueError:
        return response.text[:300]
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)[:300]

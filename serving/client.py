"""HTTP client of one inference engine: vLLM, or the embedded one, which speaks the same API."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from domain.demonstration import Message
from domain.errors import EngineUnavailable
from domain.measurement import Likelihood

INFERENCE_SECONDS = 300.0
"""A busy engine queues requests; past this it is not busy but gone."""
ADMIN_SECONDS = 60.0
"""Loading an adapter waits for the engine's running step."""
QUICK_SECONDS = 5.0
PROBE = "The quick brown fox jumps over the lazy dog because"
FIRST = -1
"""The `priority` of a probe: the lowest goes first, everybody else has 0."""
KEEP_ALIVE_SECONDS = 2.0
"""Below uvicorn's 5 s, so that no request is sent down a connection that the engine is closing."""


class EngineClient:
    """Thread-safe, pooled. Every method raises EngineUnavailable, whose code says which way it failed:
    `engine_unavailable` no answer, `model_not_loaded` 404, `engine_refused` any other refusal."""

    def __init__(self, base_url: str, *, connections: int = 32, priorities: bool = False) -> None:
        """`priorities`: the engine heeds them, as those that `ratchet up` starts do, so that a probe goes
        before requests that wait. Other engines are not sent any: a vLLM may refuse them."""
        self.base_url = base_url.rstrip("/")
        self._probe_fields = {"priority": FIRST} if priorities else {}
        self._http = httpx.Client(
            base_url=self.base_url,
            timeout=httpx.Timeout(INFERENCE_SECONDS, connect=QUICK_SECONDS),
            limits=httpx.Limits(max_connections=connections, keepalive_expiry=KEEP_ALIVE_SECONDS),
            trust_env=False,
            # Reading the certificate store takes up to half a second: not for plain HTTP.
            verify=self.base_url.startswith("https:"),
        )

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def chat(self, model: str, messages: Sequence[Message], max_tokens: int, temperature: float = 0.0) -> str:
        """The assistant's reply, at most `max_tokens` tokens; greedy by default."""
        body = {
            "model": model,
            "messages": [message.model_dump() for message in messages],
            "max_tokens": max_tokens,
            "temperature": temperature,
        }
        reply = self._post("/v1/chat/completions", body, f"chat with '{model}'")
        content = reply["choices"][0]["message"]["content"]
        return str(content) if content is not None else ""

    def loglikelihood(self, model: str, prefix: str, continuations: Sequence[str]) -> list[Likelihood]:
        """What `model` makes of each continuation of a non-empty `prefix`, in one request.

        Prefix and continuation are tokenised together, as lm-eval does; a token across the boundary
        belongs to the continuation. Asks for log-probabilities of the prompt, beside whatever the engine
        computes at the moment: a vLLM that was not started for that (docs/serving.md) may end.
        """
        if not prefix or not all(continuations):
            raise ValueError("a likelihood needs a prefix and a continuation, neither empty")
        texts = [prefix + continuation for continuation in continuations]
        reply = self._score(model, texts)
        choices = sorted(reply["choices"], key=lambda choice: int(choice["index"]))
        if len(choices) != len(texts):
            raise self._refused(f"score with '{model}'", f"{len(choices)} replies to {len(texts)} prompts")
        scored = []
        for text, choice in zip(texts, choices, strict=True):
            span = _span_by_text(choice["logprobs"]["tokens"], text, len(prefix))
            if span is None:
                scored.append(self._loglikelihood_by_count(model, prefix, text))
            else:
                scored.append(self._likelihood(model, choice["logprobs"], span))
        return scored

    def probe(self, model: str) -> tuple[float, ...]:
        """Logprobs of the likeliest tokens after a fixed prompt: proof that the model computes, not only that
        it is listed. One step of the engine; equal for two models only if they compute the same."""
        body = {"model": model, "prompt": PROBE, "max_tokens": 1, "temperature": 0.0, "logprobs": 5}
        body |= self._probe_fields
        response = self._send("POST", "/v1/completions", body, ADMIN_SECONDS)
        reply = self._json(response, f"probe '{model}'")
        try:
            [likeliest] = reply["choices"][0]["logprobs"]["top_logprobs"] or [{}]
            values = sorted((float(value) for value in likeliest.values() if value is not None), reverse=True)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise self._refused(f"probe '{model}'", "the reply has no logprobs") from error
        if not values or not all(map(math.isfinite, values)):
            raise self._refused(f"probe '{model}'", f"logprobs {likeliest} are not finite")
        return tuple(values)

    def load(self, name: str, path: Path) -> None:
        """Load the adapter folder under `name`. Names are never reused for other weights, so a name that
        is loaded already is a success (a reply to an earlier attempt was lost)."""
        body = {"lora_name": name, "lora_path": str(path)}
        response = self._send("POST", "/v1/load_lora_adapter", body, ADMIN_SECONDS)
        if response.is_success or (response.status_code == 400 and name in self.models()):
            return
        raise self._refused(f"load '{name}'", _message(response), response.status_code)

    def unload(self, name: str) -> None:
        """Forget `name`; one that is not loaded is a success."""
        response = self._send("POST", "/v1/unload_lora_adapter", {"lora_name": name}, ADMIN_SECONDS)
        if response.is_success or response.status_code == 404:
            return
        raise self._refused(f"unload '{name}'", _message(response), response.status_code)

    def models(self) -> set[str]:
        """Names that the engine answers to: the base's and every loaded adapter's."""
        response = self._send("GET", "/v1/models", None, QUICK_SECONDS)
        reply = self._json(response, "list models")
        try:
            return {str(model["id"]) for model in reply["data"]}
        except (KeyError, TypeError) as error:
            raise self._refused("list models", "the reply is no list of models") from error

    def healthy(self) -> bool:
        try:
            return self._send("GET", "/health", None, QUICK_SECONDS).is_success
        except EngineUnavailable:
            return False

    def _score(self, model: str, prompts: list[str]) -> Any:
        body = {
            "model": model,
            "prompt": prompts,
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": 1,
            "echo": True,
        }
        return self._post("/v1/completions", body, f"score with '{model}'")

    def _loglikelihood_by_count(self, model: str, prefix: str, text: str) -> Likelihood:
        """For text whose tokens don't spell it (characters split over tokens): the prefix's own token
        count is the boundary."""
        start = int(self._score(model, [prefix])["usage"]["prompt_tokens"])
        reply = self._score(model, [text])
        span = range(start, int(reply["usage"]["prompt_tokens"]))
        return self._likelihood(model, reply["choices"][0]["logprobs"], span)

    def _likelihood(self, model: str, logprobs: Mapping[str, Any], span: range) -> Likelihood:
        values = [logprobs["token_logprobs"][index] for index in span]
        if not values or not all(value is not None and math.isfinite(value) for value in values):
            raise self._refused(f"score with '{model}'", f"logprobs {values} are not finite")
        best = [max(logprobs["top_logprobs"][index].values()) for index in span]
        greedy = all(value >= top - 1e-6 for value, top in zip(values, best, strict=True))
        return Likelihood(logprob=math.fsum(values), greedy=greedy)

    def _post(self, path: str, body: dict[str, Any], action: str) -> Any:
        return self._json(self._send("POST", path, body, None), action)

    def _json(self, response: httpx.Response, action: str) -> Any:
        if not response.is_success:
            raise self._refused(action, _message(response), response.status_code)
        try:
            return response.json()
        except ValueError as error:
            raise self._refused(action, f"the reply is not JSON ({error})") from error

    def _send(
        self, method: str, path: str, body: dict[str, Any] | None, seconds: float | None
    ) -> httpx.Response:
        """`seconds` replaces the patience for inference, when given."""
        timeout = None if seconds is None else httpx.Timeout(seconds, connect=QUICK_SECONDS)
        try:
            return self._http.request(
                method, path, json=body, timeout=httpx.USE_CLIENT_DEFAULT if timeout is None else timeout
            )
        except httpx.HTTPError as error:
            detail = str(error) or type(error).__name__
            raise EngineUnavailable(
                f"The inference engine at {self.base_url} does not answer ({detail})."
            ) from error

    def _refused(self, action: str, detail: str, status: int | None = None) -> EngineUnavailable:
        at = f" (HTTP {status})" if status is not None else ""
        return EngineUnavailable(
            f"The inference engine at {self.base_url} refused to {action}{at}: {detail}",
            code="model_not_loaded" if status == 404 else "engine_refused",
        )


def _span_by_text(tokens: Sequence[str], text: str, boundary: int) -> range | None:
    """Positions of the tokens that spell `text` beyond `boundary`, or None when tokens don't spell it.

    A begin-of-text token before the text and a sampled one after it are allowed for.
    """
    joined = "".join(tokens)
    shift = joined.find(text)
    if shift < 0:
        return None
    first = last = None
    position = -shift
    for index, token in enumerate(tokens):
        position += len(token)
        if first is None and position > boundary:
            first = index
        if position >= len(text):
            last = index
            break
    return None if first is None or last is None else range(first, last + 1)


def _message(response: httpx.Response) -> str:
    """The engine's own words: vLLM's error object, FastAPI's detail, or the body's beginning."""
    try:
        body = response.json()
    except ValueError:
        return response.text[:500]
    if isinstance(body, dict):
        error = body.get("error")
        for words in (error.get("message") if isinstance(error, dict) else error, body.get("detail")):
            if isinstance(words, str):
                return words
        if isinstance(body.get("message"), str):
            return str(body["message"])
    return response.text[:500]

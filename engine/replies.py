"""Replies in OpenAI's shape, whole or as the chunks of a stream."""

import time
import uuid
from collections.abc import Iterator
from typing import Any

from engine.prompts import Prompt, TokenTexts
from engine.sampling import TokenLogprob
from engine.sequence import Output, Sequence

Json = dict[str, Any]


def usage(sequences: list[Sequence], choices_per_prompt: int) -> Json:
    """A prompt counts once, however many choices it has."""
    prompt = sum(len(one.prompt) for one in sequences[::choices_per_prompt])
    completion = sum(len(one.output) for one in sequences)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": None,
    }


class ChatReply:
    """Replies to one chat request."""

    def __init__(
        self, model: str, texts: TokenTexts, *, logprobs: bool, token_ids_of: Prompt | None = None
    ) -> None:
        """`token_ids_of`: the prompt, where the request wants token ids beside the text."""
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._texts = texts
        self._logprobs = logprobs
        self._prompt = token_ids_of

    def whole(self, outputs: list[Output], used: Json) -> Json:
        choices = [
            {
                "index": output.index,
                "message": {"role": "assistant", "content": output.text, "refusal": None},
                "logprobs": self._scores(output.logprobs),
                "finish_reason": output.finish_reason,
                "stop_reason": output.stop_reason,
                **self._token_ids(output),
            }
            for output in outputs
        ]
        reply = {**self._head, "object": "chat.completion", "choices": choices, "usage": used}
        if self._prompt is not None:
            reply["prompt_token_ids"] = self._prompt.ids
        return reply

    def opening(self, index: int) -> Iterator[Json]:
        chunk = self._chunk(index, {"role": "assistant", "content": ""}, None)
        if self._prompt is not None:
            chunk["prompt_token_ids"] = self._prompt.ids
        yield chunk

    def chunks(self, output: Output) -> Iterator[Json]:
        scores, tokens = self._scores(output.logprobs), self._token_ids(output)
        if output.text:
            chunk = self._chunk(output.index, {"content": output.text}, scores)
            chunk["choices"][0] |= tokens
            yield chunk
            scores, tokens = None, {}
        if output.finish_reason is not None:
            closing = self._chunk(output.index, {}, scores)
            closing["choices"][0] |= tokens
            closing["choices"][0]["finish_reason"] = output.finish_reason
            closing["choices"][0]["stop_reason"] = output.stop_reason
            yield closing

    def usage_chunk(self, used: Json) -> Json:
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": used}

    def _chunk(self, index: int, delta: Json, scores: Json | None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": scores, "finish_reason": None}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def _token_ids(self, output: Output) -> Json:
        return {} if self._prompt is None else {"token_ids": output.tokens}

    def _scores(self, logprobs: list[TokenLogprob]) -> Json | None:
        if not self._logprobs:
            return None
        content = []
        for scored in logprobs:
            entry = self._score(scored.token, scored.logprob)
            entry["top_logprobs"] = [self._score(token, value) for token, value in scored.top]
            content.append(entry)
        return {"content": content, "refusal": None}

    def _score(self, token: int, logprob: float) -> Json:
        return {"token": self._texts.of(token), "logprob": logprob, "bytes": self._texts.bytes_of(token)}


class CompletionReply:
    """Replies to one /v1/completions request; `prompts[i]` belongs to choices i*n to i*n+n-1."""

    def __init__(
        self,
        model: str,
        texts: TokenTexts,
        *,
        prompts: list[Prompt],
        sequences: list[Sequence],
        choices_per_prompt: int,
        echo: bool,
        token_ids: bool,
    ) -> None:
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._texts = texts
        self._sequences = sequences
        self._prompts = [prompts[i // choices_per_prompt] for i in range(len(sequences))]
        self._echo = echo
        self._token_ids = token_ids
        self._unopened = set(range(len(sequences)))
        self._written = [len(prompt.text) if echo else 0 for prompt in self._prompts]
        """Characters before the next token, per choice: where its text_offset is."""

    def whole(self, outputs: list[Output], used: Json) -> Json:
        return {**self._head, "choices": [self._choice(one) for one in outputs], "usage": used}

    def opening(self, index: int) -> Iterator[Json]:
        """Nothing: an echoed prompt comes with the first news, when its scores are known."""
        yield from ()

    def chunks(self, output: Output) -> Iterator[Json]:
        yield {**self._head, "choices": [self._choice(output)]}

    def usage_chunk(self, used: Json) -> Json:
        return {**self._head, "choices": [], "usage": used}

    def _choice(self, output: Output) -> Json:
        first = output.index in self._unopened
        self._unopened.discard(output.index)
        echoed = self._echo and first
        text = self._prompts[output.index].text + output.text if echoed else output.text
        choice: Json = {
            "index": output.index,
            "text": text,
            "logprobs": self._scores(output, echoed),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        if self._token_ids:
            choice["token_ids"] = output.tokens
            if first:
                choice["prompt_token_ids"] = self._prompts[output.index].ids
        return choice

    def _scores(self, output: Output, echoed: bool) -> Json | None:
        sequence = self._sequences[output.index]
        if sequence.params.logprobs is None:
            return None
        prompt = self._prompts[output.index]
        scores: list[TokenLogprob | None] = list(output.logprobs)
        tokens = list(output.tokens)
        offsets = self._texts.offsets(tokens, self._written[output.index])
        self._written[output.index] += len(output.text)
        if echoed:
            scores = [*sequence.prompt_logprobs, *scores]
            tokens = [*prompt.ids, *tokens]
            offsets = [*prompt.offsets, *offsets]
        return {
            "text_offset": offsets,
            "token_logprobs": [None if score is None else score.logprob for score in scores],
            "tokens": [self._texts.of(token) for token in tokens],
            "top_logprobs": [None if score is None else self._top(score) for score in scores],
        }

    def _top(self, score: TokenLogprob) -> dict[str, float]:
        """The token itself and the most likely ones, by text."""
        best = {self._texts.of(score.token): score.logprob}
        for token, logprob in score.top:
            best.setdefault(self._texts.of(token), logprob)
        return best

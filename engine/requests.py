"""From a request's body to the sequences that answer it."""

import time

from engine.adapters import AdapterRegistry
from engine.errors import BadRequest, ContextExceeded
from engine.inbox import Inbox
from engine.model import BaseModel
from engine.prompts import Prompt, TokenTexts
from engine.protocol import SamplingFields
from engine.sampling import SamplingParams, generator
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.text import RunningText


class Engine:
    """What the routes work on: one base model, its adapters, its scheduler."""

    def __init__(self, name: str, model: BaseModel, scheduler: Scheduler) -> None:
        self.name = name
        self.model = model
        self.scheduler = scheduler
        self.adapters = AdapterRegistry(name)
        self.texts = TokenTexts(model.tokenizer, model.module.config.vocab_size, model.max_length)
        self.started = int(time.time())

    def sequences(
        self,
        body: SamplingFields,
        prompts: list[Prompt],
        inbox: Inbox,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        score_prompt: bool,
    ) -> list[Sequence]:
        """`n` sequences per prompt. Raises NotFound for an unknown model, BadRequest for what cannot fit."""
        adapter = self.adapters.find(body.model)
        defaults = self.model.defaults
        made: list[Sequence] = []
        for prompt in prompts:
            budget = self._budget(len(prompt.ids), max_tokens, scoring=score_prompt)
            for choice in range(body.n):
                params = SamplingParams(
                    max_tokens=budget,
                    temperature=defaults.temperature if body.temperature is None else body.temperature,
                    top_p=defaults.top_p if body.top_p is None else body.top_p,
                    top_k=defaults.top_k if body.top_k is None else max(body.top_k, 0),
                    seed=None if body.seed is None else (body.seed + choice) % 2**63,
                    stop=body.stops,
                    stop_token_ids=frozenset(body.stop_token_ids or ()),
                    ignore_eos=body.ignore_eos,
                    logprobs=logprobs,
                    score_prompt=score_prompt,
                )
                random = None if params.temperature == 0 else generator(params.seed, self.model.device)
                made.append(
                    Sequence(
                        index=len(made),
                        prompt=prompt.ids,
                        params=params,
                        adapter=adapter,
                        text=RunningText(self.model.tokenizer, prompt.ids, params.stop),
                        listener=inbox.listener,
                        stream=body.stream,
                        generator=random,
                        priority=body.priority,
                    )
                )
        return made

    def _budget(self, prompt_tokens: int, max_tokens: int | None, *, scoring: bool) -> int:
        """Tokens that may be generated after a prompt of that length."""
        window = self.model.max_length
        if prompt_tokens == 0:
            raise BadRequest("The prompt is empty.", param="prompt")
        if prompt_tokens == window and max_tokens != 0:
            param = "messages" if not scoring and max_tokens is None else "prompt"
            raise ContextExceeded(window, f"{prompt_tokens} input tokens", param=param)
        if max_tokens is None:
            return window - prompt_tokens
        if prompt_tokens + max_tokens > window:
            raise BadRequest(
                f"'max_tokens' or 'max_completion_tokens' is too large: {max_tokens}. This model's maximum "
                f"context length is {window} tokens and your request has {prompt_tokens} input tokens.",
                param="max_tokens",
            )
        return max_tokens

"""One sequence from prompt to finish: its request, its progress, and what it tells its requester."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from engine.errors import EngineError
from engine.kv_cache import Prefix, Slot
from engine.lora import Adapter
from engine.sampling import SamplingParams, TokenLogprob
from engine.text import RunningText

FinishReason = Literal["stop", "length"]

LEAST_SHARED = 16
"""Common tokens below which two prompts of a request are not worth computing together."""


@dataclass(frozen=True)
class Output:
    """News of a sequence: all of it at the end, or what is new when streaming."""

    index: int
    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    """The stop string or stop token id that ended it."""


@dataclass(frozen=True)
class Failure:
    index: int
    error: EngineError


Listener = Callable[[Output | Failure], None]
"""Called on the scheduler's thread; must not block."""


@dataclass(eq=False)
class SharedPrompt:
    """The common beginning of several prompts of a request, computed by the first of them."""

    leader: "Sequence"
    length: int
    """Longest beginning that a follower starts from, tokens."""
    prefix: Prefix | None = None
    lost: bool = False
    """The leader ended before it was computed: followers compute their own."""


@dataclass(eq=False)
class Sequence:
    """State belongs to the scheduler's thread, but `aborted`, which any thread may set."""

    index: int
    prompt: list[int]
    params: SamplingParams
    adapter: Adapter | None
    text: RunningText
    listener: Listener
    stream: bool
    generator: torch.Generator | None
    """None is greedy."""
    priority: int = 0
    """The lowest starts first."""

    aborted: bool = False
    leads: SharedPrompt | None = None
    follows: tuple[SharedPrompt, int] | None = None
    """Whose beginning to start from, and how many tokens of it."""
    slot: Slot | None = None
    output: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    """By prompt position; the first token has none. Complete when `score_prompt` and prefilled."""
    output_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    _told: int = 0

    @property
    def urgent(self) -> bool:
        """Whether it starts beside whatever runs."""
        return self.priority < 0

    @property
    def longest(self) -> int:
        """Tokens that it may come to, prompt included."""
        return len(self.prompt) + self.params.max_tokens

    def append(self, token: int, scored: TokenLogprob | None, stop_ids: frozenset[int]) -> None:
        """Take the next token and decide whether it is the last."""
        self.output.append(token)
        if scored is not None:
            self.output_logprobs.append(scored)
        if token in self.params.stop_token_ids:
            self._finish("stop", token)
        elif token in stop_ids and not self.params.ignore_eos:
            self._finish("stop", None)
        else:
            self.text.add(token)
            if self.text.stopped_by is not None:
                self._finish("stop", self.text.stopped_by)
            elif len(self.output) >= self.params.max_tokens:
                self._finish("length", None)

    def finish_scoring(self) -> None:
        """Nothing was to be generated: the prompt's scores are the result."""
        self._finish("length", None)

    def tell(self) -> None:
        """Send what is new, if anything is due."""
        final = self.finish_reason is not None
        if not final and not self.stream:
            return
        text = self.text.take(final=final)
        if not text and not final:
            return
        self.listener(
            Output(
                index=self.index,
                text=text,
                tokens=self.output[self._told :],
                logprobs=self.output_logprobs[self._told :],
                finish_reason=self.finish_reason,
                stop_reason=self.stop_reason,
            )
        )
        self._told = len(self.output)

    def _finish(self, reason: FinishReason, stopped_by: str | int | None) -> None:
        self.text.finish()
        self.finish_reason = reason
        self.stop_reason = stopped_by


def share_prompts(sequences: list[Sequence]) -> None:
    """Let neighbours with a long common beginning compute it once (choices of one question, `n` > 1).

    All must be of one request: same adapter, same parameters but the seed.
    """
    shared: SharedPrompt | None = None
    for sequence in sequences:
        common = 0 if shared is None else _common(shared.leader.prompt, sequence.prompt)
        # The last common position is computed anew: what it predicts differs between the prompts.
        length = common - 1
        if shared is None or length < LEAST_SHARED or 2 * length < len(sequence.prompt):
            shared = SharedPrompt(leader=sequence, length=0)
            continue
        shared.length = max(shared.length, length)
        shared.leader.leads = shared
        sequence.follows = (shared, length)


def _common(left: list[int], right: list[int]) -> int:
    for position, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return position
    return min(len(left), len(right))

"""The engine's one compute thread: which tokens of which sequences go into the next forward pass.

Every step takes one token of each decoding sequence and fills the rest of the token budget with
prompt chunks, whatever their adapters: first come first served, but prompts that are only scored
wait for those that somebody reads the answer of, and urgent ones (a priority below 0) are in the next
step whatever runs.
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from engine import sampling
from engine.attention import Chunk, Step
from engine.errors import EngineError, InternalError, Overloaded
from engine.kv_cache import KvCache
from engine.lora import rows_by_adapter
from engine.model import BaseModel
from engine.sequence import Failure, Sequence
from engine.waiting import WaitingLine

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """How much runs at once."""

    sequences: int
    """One urgent sequence may run beside them."""
    step_tokens: int
    """Packed tokens per forward pass."""
    cache_tokens: int


class Scheduler:
    """Owns the cache and the thread. `submit` and `abort` may be called from any thread."""

    def __init__(self, model: BaseModel, limits: Limits, on_failure: Callable[[], None]) -> None:
        """`on_failure` is called once, on the compute thread, when it dies of an unexpected error."""
        self._model = model
        self._limits = limits
        self._on_failure = on_failure
        self._cache = KvCache(
            model.cache_shape,
            max_rows=limits.sequences + 1,
            max_length=model.max_length,
            budget_tokens=limits.cache_tokens,
        )
        self._news = threading.Condition()
        self._arrived: deque[Sequence] = deque()
        self._stopping = False
        self._waiting = WaitingLine()
        self._running: list[Sequence] = []
        self._thread = threading.Thread(target=self._run, name="engine-compute", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, sequences: list[Sequence]) -> None:
        """Queue sequences; their listeners hear of them. Raises Overloaded while stopping."""
        with self._news:
            if self._stopping:
                raise Overloaded("The engine is stopping.")
            self._arrived.extend(sequences)
            self._news.notify()

    def abort(self, sequences: list[Sequence]) -> None:
        """Forget sequences; their listeners hear nothing more and their slots become free."""
        with self._news:
            for sequence in sequences:
                sequence.aborted = True
            self._news.notify()

    def begin_stop(self) -> None:
        """Refuse new sequences; what is open fails after the current step."""
        with self._news:
            self._stopping = True
            self._news.notify()

    def stop(self, timeout: float) -> bool:
        """Stop; whether the thread ended within `timeout` seconds."""
        self.begin_stop()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def healthy(self) -> bool:
        return not self._stopping and self._thread.is_alive()

    @property
    def load(self) -> int:
        """Sequences waiting or running."""
        return len(self._arrived) + len(self._waiting) + len(self._running)

    def _run(self) -> None:
        try:
            while self._collect():
                self._drop_aborted()
                self._admit()
                if self._running:
                    self._step()
        except Exception:
            # The state of cache and sequences is unknown: no request may go on. The process ends and
            # whoever supervises it starts a fresh one.
            logger.exception("the compute thread died")
            with self._news:
                self._stopping = True
            self._fail_all(InternalError("The engine failed."))
            self._on_failure()

    def _collect(self) -> bool:
        """Wait for work; false when the thread has to end."""
        with self._news:
            self._news.wait_for(lambda: self._stopping or self._arrived or self._waiting or self._running)
            self._queue_arrived()
            stopping = self._stopping
        if stopping:
            self._fail_all(Overloaded("The engine is stopping."))
        return not stopping

    def _queue_arrived(self) -> None:
        for sequence in self._arrived:
            self._waiting.add(sequence)
        self._arrived.clear()

    def _fail_all(self, error: EngineError) -> None:
        with self._news:
            self._queue_arrived()
        for sequence in (*self._running, *self._waiting.empty()):
            if not sequence.aborted:
                sequence.listener(Failure(sequence.index, error))
        self._running.clear()

    def _drop_aborted(self) -> None:
        for sequence in [one for one in self._running if one.aborted]:
            self._release(sequence)
        self._waiting.drop_aborted()

    def _release(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        if sequence.leads is not None:
            sequence.leads.lost = True
        self._cache.remove(sequence.slot)
        self._running.remove(sequence)
        sequence.slot = None

    def _admit(self) -> None:
        """Give rows to waiting sequences while this step has tokens for them and the cache has room."""
        budget = self._step_tokens() - sum(self._due(one) for one in self._running)
        while True:
            sequence = self._waiting.take(partial(self._may_start, budget))
            if sequence is None:
                return
            self._start(sequence)
            budget -= self._due(sequence)

    def _step_tokens(self) -> int:
        """Half a step while answers are being written, so that prompts beside them hold them up less."""
        full = self._limits.step_tokens
        return full // 2 if any(one.output for one in self._running) else full

    def _may_start(self, budget: int, sequence: Sequence) -> bool:
        """Whether there is a row for it, and unless it is urgent, tokens of this step and one more row.

        That row is left to the urgent, which would else wait for a whole answer. Only one sequence alone
        may take it: else one that needs most of the cache could never start.
        """
        running = len(self._running)
        longest = max(one.longest for one in (*self._running, sequence))
        if sequence.urgent:
            return self._cache.fits(running + 1, longest)
        return budget > 0 and self._cache.fits(running + (2 if running else 1), longest)

    def _start(self, sequence: Sequence) -> None:
        sequence.slot = self._cache.add()
        self._running.append(sequence)
        if sequence.follows is not None:
            shared, length = sequence.follows
            sequence.follows = None
            if shared.prefix is not None:
                self._cache.restore(sequence.slot, shared.prefix, length)
                sequence.prompt_logprobs = shared.leader.prompt_logprobs[: length + 1]

    def _due(self, sequence: Sequence) -> int:
        """Tokens that the sequence could put into the next step."""
        assert sequence.slot is not None
        return len(sequence.prompt) + len(sequence.output) - sequence.slot.length

    def _step(self) -> None:
        planned = self._plan()
        owners = [(sequence.adapter, len(chunk.tokens)) for sequence, chunk in planned]
        decode = [chunk for sequence, chunk in planned if sequence.output]
        prefill = [chunk for sequence, chunk in planned if not sequence.output]
        step = Step(self._cache, decode, prefill, rows_by_adapter(owners, self._model.device))

        rows: list[int] = []
        scored: list[tuple[Sequence, int]] = []
        sampled: list[Sequence] = []
        sampled_rows: list[int] = []
        start = 0
        for sequence, chunk in planned:
            end = chunk.past + len(chunk.tokens)
            last = start + len(chunk.tokens) - 1
            if sequence.params.score_prompt and not sequence.output:
                for position in range(chunk.past + 1, min(end + 1, len(sequence.prompt))):
                    scored.append((sequence, position))
                    rows.append(start + position - 1 - chunk.past)
            if end >= len(sequence.prompt) and sequence.params.max_tokens > 0:
                sampled.append(sequence)
                sampled_rows.append(last)
            start = last + 1
        logits = self._model.forward(step, rows + sampled_rows)
        self._score_prompts(logits[: len(rows)], scored)
        self._append_tokens(logits[len(rows) :], sampled)
        for sequence, _ in planned:
            self._settle(sequence)

    def _plan(self) -> list[tuple[Sequence, Chunk]]:
        """Decoding sequences by row, then prompt chunks within the budget, the urgent ones' first,
        neighbours by adapter."""
        decoding = [one for one in self._running if one.output]
        decoding.sort(key=lambda one: one.slot.row if one.slot else 0)
        planned = [(one, Chunk(one.slot, one.output[-1:])) for one in decoding if one.slot]
        budget = self._step_tokens() - len(planned)
        prompts = []
        for sequence in sorted(self._running, key=lambda one: not one.urgent):
            if sequence.output or budget <= 0 or sequence.slot is None:
                continue
            past = sequence.slot.length
            tokens = sequence.prompt[past : past + budget]
            prompts.append((sequence, Chunk(sequence.slot, tokens)))
            budget -= len(tokens)
        prompts.sort(key=lambda one: id(one[0].adapter))
        return planned + prompts

    @torch.inference_mode()
    def _score_prompts(self, logits: torch.Tensor, scored: list[tuple[Sequence, int]]) -> None:
        targets = [sequence.prompt[position] for sequence, position in scored]
        top = [sequence.params.logprobs or 0 for sequence, _ in scored]
        results = sampling.logprobs(logits, targets, top)
        for (sequence, position), result in zip(scored, results, strict=True):
            assert len(sequence.prompt_logprobs) == position
            sequence.prompt_logprobs.append(result)
            if not math.isfinite(result.logprob):
                self._fail(sequence)

    @torch.inference_mode()
    def _append_tokens(self, logits: torch.Tensor, sampled: list[Sequence]) -> None:
        if not sampled:
            return
        chosen = sampling.choose(logits, [one.params for one in sampled], [one.generator for one in sampled])
        reported = self._score_chosen(logits, sampled, chosen)
        for i, (sequence, token) in enumerate(zip(sampled, chosen, strict=True)):
            if token is None:
                self._fail(sequence)
            else:
                sequence.append(token, reported.get(i), self._model.stop_ids)

    def _score_chosen(
        self, logits: torch.Tensor, sampled: list[Sequence], chosen: list[int | None]
    ) -> dict[int, sampling.TokenLogprob]:
        """Log-probabilities by row, for the rows that asked for them."""
        rows: list[int] = []
        tokens: list[int] = []
        top: list[int] = []
        for i, (sequence, token) in enumerate(zip(sampled, chosen, strict=True)):
            if token is not None and sequence.params.logprobs is not None:
                rows.append(i)
                tokens.append(token)
                top.append(sequence.params.logprobs)
        return dict(zip(rows, sampling.logprobs(logits[rows], tokens, top), strict=True))

    def _fail(self, sequence: Sequence) -> None:
        """The model computed nonsense for this sequence (an adapter may overflow): others go on."""
        if not sequence.aborted:
            sequence.aborted = True
            error = InternalError("The model computed values that are not finite.", param="model")
            sequence.listener(Failure(sequence.index, error))

    def _settle(self, sequence: Sequence) -> None:
        """After a step: share the prompt, tell the news, free the row of what is finished."""
        assert sequence.slot is not None
        if sequence.aborted:
            return  # dropped before the next step
        prefilled = sequence.slot.length >= len(sequence.prompt)
        if prefilled and sequence.leads is not None:
            shared, sequence.leads = sequence.leads, None
            shared.prefix = self._cache.snapshot(sequence.slot, shared.length)
        if prefilled and sequence.params.max_tokens == 0:
            sequence.finish_scoring()
        if sequence.finish_reason is not None:
            self._release(sequence)  # who hears of the end finds the row free
        sequence.tell()

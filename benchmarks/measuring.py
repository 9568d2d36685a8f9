"""Answers and likelihoods of one version in large batches, for evaluation's arithmetic to read.

`evaluation.suites` asks a Completer item by item, which suits an engine that batches by itself. Here all
prompts of a measurement are answered first, sorted by length and many at a time, and `BatchCompleter`
then replies from memory.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from domain.demonstration import Message
from domain.grading import grade
from domain.measurement import Likelihood
from domain.skill import Grader
from evaluation.benchmarks import Benchmark, Option
from evaluation.suites import MIN_TOKENS, SkillItem
from trainer.contexts import chat_tokens
from trainer.model import Model
from trainer.rollout import GREEDY, Sampling, sample
from trainer.sequences import all_response_states, response_states

HEAD_ROWS = 256
"""Rows of logits held at once."""
SPARE_TOKENS = 8
"""Beyond the expert's response: for its end, and for other tokens that spell the same."""


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    """Length with the end-of-turn token, where it came."""


class Asked(NamedTuple):
    """A conversation to be answered, as it will be looked up by its `max_tokens`."""

    messages: Sequence[Message]
    max_tokens: int
    room: int
    """Tokens after which the answer is cut off."""


def item_asked(model: Model, item: SkillItem) -> Asked:
    """A skill's item; evaluation gives it a token for each byte of the expert's response, far more than a
    right answer takes, and decoding the rest of a wrong one is most of the work."""
    response: list[int] = model.tokenizer(item.demonstration.response)["input_ids"]
    room = max(MIN_TOKENS, len(response) + SPARE_TOKENS)
    return Asked(item.demonstration.messages, item.max_tokens, min(room, item.max_tokens))


class BatchCompleter:
    """A Completer of the role in use over what was prepared; asking for anything else is a KeyError."""

    concurrency = 1

    def __init__(self, model: Model) -> None:
        self._model = model
        self._answers: dict[tuple[tuple[Message, ...], int], Answer] = {}
        self._likelihoods: dict[Option, Likelihood] = {}

    def prepare_answers(self, asked: Sequence[Asked]) -> None:
        """Answer every one greedily."""
        prompts = [chat_tokens(self._model.tokenizer, one.messages) for one in asked]
        drawn = sample(self._model, prompts, [one.room for one in asked], GREEDY)
        for one, answer in zip(asked, drawn, strict=True):
            text = self._model.text(answer.tokens)
            self._answers[tuple(one.messages), one.max_tokens] = Answer(text, len(answer.tokens))

    def prepare_likelihoods(self, benchmarks: Iterable[Benchmark]) -> None:
        options = [o for b in benchmarks for question in b.questions for o in question.options]
        self._likelihoods |= dict(zip(options, likelihoods(self._model, options), strict=True))

    def answer(self, messages: Sequence[Message], max_tokens: int) -> Answer:
        return self._answers[tuple(messages), max_tokens]

    def chat(self, messages: Sequence[Message], max_tokens: int) -> str:
        return self.answer(messages, max_tokens).text

    def loglikelihood(self, prefix: str, continuations: Sequence[str]) -> list[Likelihood]:
        return [self._likelihoods[Option(prefix, text)] for text in continuations]


@torch.no_grad()
def likelihoods(model: Model, options: Sequence[Option]) -> list[Likelihood]:
    """What the role in use makes of each option's text after its prefix.

    Prefix and text are tokenised together, as lm-eval does; a prefix that several options share is read
    once. Raises ValueError for an option of which either is empty.
    """
    rows = [_encoded(model, option) for option in options]
    found: dict[int, Likelihood] = {}
    for members, states in response_states(model, rows):
        targets = torch.tensor([token for index in members for token in rows[index][1]], device=model.device)
        logprobs, greedy = _token_likelihoods(model, torch.cat(states), targets)
        start = 0
        for index in members:
            end = start + len(rows[index][1])
            found[index] = Likelihood(float(logprobs[start:end].sum()), bool(greedy[start:end].all()))
            start = end
    return [found[index] for index in range(len(options))]


def _encoded(model: Model, option: Option) -> tuple[list[int], list[int]]:
    before = model.tokenizer(option.prefix, add_special_tokens=False)["input_ids"]
    whole: list[int] = model.tokenizer(option.prefix + option.text, add_special_tokens=False)["input_ids"]
    if not before or len(whole) <= len(before):
        raise ValueError(f"a likelihood needs a prefix and a text, neither empty: {option}")
    return whole[: len(before)], whole[len(before) :]


def _token_likelihoods(model: Model, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p of each target, float32 [N], and whether it is a first choice; hidden [N, hidden]."""
    logprobs, greedy = [], []
    for start in range(0, len(targets), HEAD_ROWS):
        rows, chosen = hidden[start : start + HEAD_ROWS], targets[start : start + HEAD_ROWS]
        logits = functional.linear(rows, model.head).float()
        picked = logits.gather(1, chosen[:, None])[:, 0]
        logprobs.append(picked - logits.logsumexp(-1))
        greedy.append(picked >= logits.amax(-1))
    return torch.cat(logprobs), torch.cat(greedy)


class BaseReference:
    """The base's own samples on ordinary prompts, against which every version's drift is measured."""

    @torch.no_grad()
    def __init__(self, base: Model, prompts: Sequence[Sequence[Message]], max_tokens: int) -> None:
        asked = [chat_tokens(base.tokenizer, messages) for messages in prompts]
        with base.using(None):
            drawn = sample(base, asked, [max_tokens] * len(asked), Sampling(temperature=1.0))
            self._rows = [(prompt, answer.tokens) for prompt, answer in zip(asked, drawn, strict=True)]
            self._states = all_response_states(base, self._rows)
            self._head = base.head

    @torch.no_grad()
    def kl(self, model: Model) -> list[float]:
        """KL(base || the role in use), mean nats per token of each sample, in order of the prompts."""
        found = []
        for base, version in zip(self._states, all_response_states(model, self._rows), strict=True):
            base_logp = torch.log_softmax(functional.linear(base, self._head).float(), -1)
            logp = torch.log_softmax(functional.linear(version, model.head).float(), -1)
            found.append(float((base_logp.exp() * (base_logp - logp)).sum(-1).mean()))
        return found


def correct_samples(
    model: Model, asked: Sequence[tuple[Grader, SkillItem]], samples: int, seed: int
) -> list[int]:
    """How many of `samples` answers at temperature 1 are right, for each item."""
    prompts = [chat_tokens(model.tokenizer, item.demonstration.messages) for _, item in asked]
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    limits = [item_asked(model, item).room for _, item in asked for _ in range(samples)]
    drawn = iter(sample(model, repeated, limits, Sampling(temperature=1.0, seed=seed)))
    return [
        sum(
            grade(grader, model.text(answer.tokens), item.demonstration.answer) == 1.0
            for answer in islice(drawn, samples)
        )
        for grader, item in asked
    ]

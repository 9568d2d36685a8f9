"""Measuring one version: ask it, grade what it says. The only part of evaluation that waits for a model.

Every function takes what is `known` from earlier measurements of the same version and asks only for the
rest; known outputs are graded again, so that a changed grader holds for old and new items alike.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from domain.demonstration import Demonstration, Message
from domain.grading import grade, reasons_first
from domain.measurement import ItemScore, Likelihood, Measurement, SuiteKind
from domain.skill import Grader
from evaluation.benchmarks import LIKELIHOOD, ORDINARY, Benchmark, OrdinaryPrompt, Question
from evaluation.leak import TaughtSkill, format_of, leaks_into
from evaluation.statistics import wilson

ORDINARY_TOKENS = 32
"""A leak shows in the first words."""
MIN_TOKENS, MAX_TOKENS = 32, 1024
REASONING_TOKENS = 4096
"""Of a model that reasons before it answers, at most; no more than half of its window either."""

Known = Mapping[str, ItemScore]
Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class Completer(Protocol):
    """One version, greedy, safe to call from `concurrency` threads at a time."""

    @property
    def concurrency(self) -> int: ...

    def chat(self, messages: Sequence[Message], max_tokens: int) -> str: ...

    def loglikelihood(self, prefix: str, continuations: Sequence[str]) -> Sequence[Likelihood]: ...


class HeldOutRow(Protocol):
    """A held-out demonstration as the ledger stores it."""

    @property
    def id(self) -> str: ...

    @property
    def body(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class SkillItem:
    item: str
    demonstration: Demonstration
    reasoning_tokens: int = 0

    @property
    def max_tokens(self) -> int:
        """Room for the expert's response (a token is at least a byte), the same for every version."""
        room = min(MAX_TOKENS, max(MIN_TOKENS, len(self.demonstration.response.encode())))
        return self.reasoning_tokens + room


def skill_items(rows: Iterable[HeldOutRow], reasoning_tokens: int = 0) -> list[SkillItem]:
    """`reasoning_tokens`: room for what stands before the answer."""
    return [SkillItem(row.id, Demonstration.model_validate(row.body), reasoning_tokens) for row in rows]


def reasoning_tokens(base: Path) -> int:
    """Room for the reasoning of the model in the folder; 0 where its chat template knows of none."""
    templates = (base / "chat_template.jinja", base / "tokenizer_config.json")
    if not any(reasons_first(path.read_text("utf-8")) for path in templates if path.exists()):
        return 0
    config = json.loads((base / "config.json").read_text("utf-8"))
    window = config.get("text_config", config).get("max_position_embeddings", 2 * REASONING_TOKENS)
    return min(REASONING_TOKENS, int(window) // 2)


def measure_skill(
    completer: Completer, name: str, grader: Grader, items: Sequence[SkillItem], known: Known
) -> Measurement | None:
    """Scores on a skill's held-out items; None without any: unmeasured, not 0."""

    def ask(item: SkillItem) -> str:
        return completer.chat(item.demonstration.messages, item.max_tokens)

    outputs = _ask_missing(completer, ask, {item.item: item for item in items}, known)
    scores = [
        ItemScore(
            item=item.item,
            prompt=item.demonstration.messages[-1].content,
            output=outputs[item.item],
            expected=item.demonstration.answer,
            score=grade(grader, outputs[item.item], item.demonstration.answer),
        )
        for item in items
    ]
    return _measurement("skill", name, scores) if scores else None


def measure_general(
    completer: Completer, benchmarks: Sequence[Benchmark], known: Mapping[str, Known]
) -> list[Measurement]:
    """Accuracy on each benchmark, then LIKELIHOOD over all their items. `known` is by suite name; an item
    is known when both its benchmark and LIKELIHOOD have it."""
    probabilities = known.get(LIKELIHOOD, {})
    found, likelihoods = [], list[ItemScore]()
    for benchmark in benchmarks:
        questions = {question.item: question for question in benchmark.questions}
        accuracies = known.get(benchmark.name, {})
        missing = [
            question
            for item, question in questions.items()
            if item not in accuracies or item not in probabilities
        ]
        asked = dict(
            zip(
                (question.item for question in missing),
                _in_parallel(completer, lambda question: _answer(completer, question), missing),
                strict=True,
            )
        )
        pairs = [asked.get(item) or (accuracies[item], probabilities[item]) for item in questions]
        found.append(_measurement("general", benchmark.name, [accuracy for accuracy, _ in pairs]))
        likelihoods += [probability for _, probability in pairs]
    return [*found, _measurement("general", LIKELIHOOD, likelihoods)]


def measure_ordinary(
    completer: Completer, prompts: Sequence[OrdinaryPrompt], skills: Sequence[TaughtSkill], known: Known
) -> Measurement:
    """The leak check: share of ordinary prompts not answered in the format of any of `skills` (all that
    the version's lineage was taught)."""

    def ask(prompt: OrdinaryPrompt) -> str:
        return completer.chat([Message(role="user", content=prompt.prompt)], ORDINARY_TOKENS)

    outputs = _ask_missing(completer, ask, {prompt.item: prompt for prompt in prompts}, known)
    ordinary_answers = [answer for prompt in prompts for answer in prompt.answers]
    formats = [format_of(skill, ordinary_answers) for skill in skills]
    scores = []
    for prompt in prompts:
        leaking = leaks_into(outputs[prompt.item], formats)
        scores.append(
            ItemScore(
                item=prompt.item,
                prompt=prompt.prompt,
                output=outputs[prompt.item],
                expected=f"not in the format of '{leaking}'" if leaking else "an ordinary answer",
                score=0.0 if leaking else 1.0,
            )
        )
    return _measurement("general", ORDINARY, scores)


def _answer(completer: Completer, question: Question) -> tuple[ItemScore, ItemScore]:
    """The item's accuracy and the probability given to its right option."""
    prefixes = dict.fromkeys(option.prefix for option in question.options)
    likelihoods: dict[tuple[str, str], Likelihood] = {}
    for prefix in prefixes:
        texts = [option.text for option in question.options if option.prefix == prefix]
        for text, likelihood in zip(texts, completer.loglikelihood(prefix, texts), strict=True):
            likelihoods[prefix, text] = likelihood
    scored = [likelihoods[option.prefix, option.text] for option in question.options]
    gold = question.options[question.gold]
    if len(scored) == 1:
        right, probability = scored[0].greedy, min(1.0, math.exp(scored[0].logprob))
        output = gold.text if right else ""
    else:
        weights = _weights(question, scored)
        chosen = max(range(len(weights)), key=weights.__getitem__)
        right, probability = chosen == question.gold, _softmax(weights)[question.gold]
        option = question.options[chosen]
        output = option.text if len(prefixes) == 1 else option.prefix + option.text
    expected = gold.text if len(prefixes) == 1 else gold.prefix + gold.text

    def score(value: float, output: str) -> ItemScore:
        return ItemScore(
            item=question.item,
            prompt=question.shown,
            output=output.strip(),
            expected=expected.strip(),
            score=value,
        )

    return score(float(right), output), score(probability, output)


def _weights(question: Question, scored: Sequence[Likelihood]) -> list[float]:
    """What options are compared by. Per byte of option, times their mean length: the order is acc_norm's,
    and the scale stays that of whole options."""
    logprobs = [likelihood.logprob for likelihood in scored]
    if not question.by_length:
        return logprobs
    lengths = [len(option.text.lstrip().encode()) for option in question.options]
    mean = sum(lengths) / len(lengths)
    return [logprob / length * mean for logprob, length in zip(logprobs, lengths, strict=True)]


def _softmax(weights: Sequence[float]) -> list[float]:
    top = max(weights)
    exponentials = [math.exp(weight - top) for weight in weights]
    total = math.fsum(exponentials)
    return [value / total for value in exponentials]


def _ask_missing(
    completer: Completer, ask: Callable[[Asked], str], items: Mapping[str, Asked], known: Known
) -> dict[str, str]:
    """Output by item: known, or asked for now."""
    missing = [item for item in items if item not in known]
    answers = _in_parallel(completer, ask, [items[item] for item in missing])
    asked = dict(zip(missing, answers, strict=True))
    return {item: asked[item] if item in asked else known[item].output for item in items}


def _in_parallel(
    completer: Completer, ask: Callable[[Asked], Answer], items: Sequence[Asked]
) -> list[Answer]:
    """In order. The first error ends it: what was not yet asked is not asked any more."""
    failures: list[Exception] = []

    def ask_unless_one_failed(item: Asked) -> Answer:
        if failures:
            raise failures[0]
        try:
            return ask(item)
        except Exception as failure:
            # Known to the other threads before this one goes on, whenever the caller's comes to hear of it.
            failures.append(failure)
            raise

    pool = ThreadPoolExecutor(completer.concurrency)
    try:
        return list(pool.map(ask_unless_one_failed, items))
    finally:
        pool.shutdown(cancel_futures=True)


def _measurement(kind: SuiteKind, suite: str, scores: list[ItemScore]) -> Measurement:
    total = math.fsum(score.score for score in scores)
    low, high = wilson(total, len(scores))
    return Measurement(
        kind=kind, suite=suite, score=total / len(scores), n=len(scores), low=low, high=high, items=scores
    )

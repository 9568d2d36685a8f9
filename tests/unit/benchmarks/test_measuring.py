"""Batched measuring against the model asked one text at a time."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.measuring import (
    Asked,
    BaseReference,
    BatchCompleter,
    correct_samples,
    item_asked,
    likelihoods,
)
from benchmarks.version_measure import BESIDE
from domain.demonstration import Demonstration, Message
from domain.skill import RegexGrader
from evaluation.benchmarks import Option
from evaluation.suites import SkillItem
from trainer.loading import load_model
from trainer.model import Model

pytestmark = pytest.mark.usefixtures("exact")


@pytest.fixture
def model(base_folder: Path) -> Model:
    return load_model(base_folder, BESIDE, None)


def asked(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


def alone(folder: Path, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities by transformers itself, [tokens, vocabulary], in double precision."""
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        logits: torch.Tensor = reference(torch.tensor([tokens])).logits[0]
    return logits.log_softmax(-1)


def test_likelihoods_are_those_of_separate_texts(
    base_folder: Path, model: Model, tokenizer: PreTrainedTokenizerFast
) -> None:
    options = [Option("the sky is", " blue"), Option("a", "b"), Option("the sky is", " green, they say")]
    options += [Option("the sky is", " b"), Option("the sea was", " green, they say")]
    for option, found in zip(options, likelihoods(model, options), strict=True):
        prefix, text = tokenizer(option.prefix)["input_ids"], tokenizer(option.text)["input_ids"]
        logp = alone(base_folder, [*prefix, *text])[len(prefix) - 1 : -1]
        expected = float(sum(logp[place, token] for place, token in enumerate(text)))
        assert found.logprob == pytest.approx(expected, abs=1e-3)
        assert found.greedy == (logp.argmax(-1).tolist() == text)


def test_a_continuation_that_the_model_would_say_is_greedy(
    base_folder: Path, model: Model, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The first byte that the model prefers, found by transformers; any other one is not greedy."""
    logp = alone(base_folder, tokenizer("the sky is")["input_ids"])[-1]
    ascii_only = [i for i in range(258) if len(text := tokenizer.decode([i])) == 1 and text.isascii()]
    first = int(logp.argmax())
    options = [Option("the sky is", tokenizer.decode([i])) for i in ascii_only]
    greedy = [i for i, found in zip(ascii_only, likelihoods(model, options), strict=True) if found.greedy]
    assert greedy == [i for i in ascii_only if i == first]


def test_an_empty_option_is_named(model: Model) -> None:
    with pytest.raises(ValueError, match="the sky"):
        likelihoods(model, [Option("the sky", "")])


def test_answers_are_prepared_once_and_no_others_are_invented(model: Model) -> None:
    completer = BatchCompleter(model)
    completer.prepare_answers([Asked(asked("one"), 5, 5), Asked(asked("another question"), 9, 3)])
    answer = completer.answer(asked("another question"), 9)

    assert 1 <= answer.tokens <= 3
    assert completer.chat(asked("another question"), 9) == answer.text
    with pytest.raises(KeyError):
        completer.chat(asked("another question"), 3)


def test_an_items_room_is_that_of_its_response(model: Model) -> None:
    """The tiny tokenizer makes a token of every byte: 8 spare tokens, within evaluation's own limit."""

    def room(response: str) -> int:
        one = Demonstration(messages=asked("q"), response=response, answer=response)
        return item_asked(model, SkillItem("i", one)).room

    assert room("x") == room("x" * 24) == 32
    assert room("x" * 40) == 40  # evaluation's limit: as many tokens as bytes
    assert room("é" * 40) == 80


def test_the_base_does_not_differ_from_itself_and_a_version_by_its_kl(
    base_folder: Path, model: Model
) -> None:
    reference = BaseReference(model, [asked("hello"), asked("what is this?")], 6)
    with model.using(None):
        assert reference.kl(model) == pytest.approx([0, 0], abs=1e-6)
    with torch.no_grad():
        for tensor in model.parameters("student").values():
            tensor.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    with model.using("student"):
        found = reference.kl(model)
        prompt, answer = reference._rows[0]
        batch = torch.tensor([[*prompt, *answer]])
        logits = torch.nn.functional.linear(model.hidden(batch), model.head)[0]
    version = logits.detach().double().log_softmax(-1)[len(prompt) - 1 : -1]
    base = alone(base_folder, [*prompt, *answer])[len(prompt) - 1 : -1]
    expected = float((base.exp() * (base - version)).sum(-1).mean())
    assert expected > 0.01
    assert found[0] == pytest.approx(expected, rel=1e-3)


def test_right_samples_are_counted_item_by_item(model: Model) -> None:
    """A pattern without a group takes every answer that is not blank, another one none."""

    def item(question: str) -> SkillItem:
        return SkillItem(question, Demonstration(messages=asked(question), response="x", answer="x"))

    anything, nothing = RegexGrader(pattern=r"(?s:.*)"), RegexGrader(pattern="(?!)")
    graded = [(nothing, item("one")), (anything, item("two")), (nothing, item("three"))]
    with model.using(None):
        first, second, third = correct_samples(model, graded, 40, seed=1)
        again = correct_samples(model, graded, 40, seed=1)

    assert (first, third) == (0, 0)
    assert 30 <= second <= 40
    assert again == [first, second, third]

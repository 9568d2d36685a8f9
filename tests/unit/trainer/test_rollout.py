"""Sampling: greedy against plain argmax, stop tokens, truncation, the distribution drawn from."""

import math
from pathlib import Path

import pytest
import torch

from tests.unit.trainer.conftest import RECIPE
from trainer.loading import load_model
from trainer.model import Model
from trainer.rollout import GREEDY, Sampling, _draw, sample

pytestmark = pytest.mark.usefixtures("exact")


@pytest.fixture
def model(base_folder: Path) -> Model:
    return load_model(base_folder, RECIPE, None)


def greedy(model: Model, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = model.hidden(torch.tensor([tokens]))[0, -1] @ model.head.T
        tokens.append(int(logits.argmax()))
        if tokens[-1] in model.stop_ids:
            break
    return tokens[len(prompt) :]


def test_batched_greedy_equals_one_by_one(model: Model) -> None:
    prompts = [[0, 20, 21, 22], [0, 33], [0, 40, 41, 42, 43, 44, 45]]
    found = sample(model, prompts, [4] * 3, GREEDY)
    assert [answer.tokens for answer in found] == [greedy(model, prompt, 4) for prompt in prompts]


def test_truncated_exactly_when_no_stop_token_was_drawn(model: Model) -> None:
    prompts = [[0, i] for i in range(20, 220)]
    found = sample(model, prompts, [8] * 200, Sampling(3.0))
    stops = model.stop_ids
    assert {answer.truncated for answer in found} == {True, False}
    for answer in found:
        assert answer.truncated == (answer.tokens[-1] not in stops)
        assert not any(token in stops for token in answer.tokens[:-1])
        assert len(answer.tokens) == 8 or not answer.truncated


def test_same_generator_same_samples(model: Model) -> None:
    prompts = [[0, i] for i in range(20, 30)]
    one = sample(model, prompts, [5] * 10, Sampling(1.0, seed=5))
    assert one == sample(model, prompts, [5] * 10, Sampling(1.0, seed=5))
    assert one != sample(model, prompts, [5] * 10, Sampling(1.0, seed=6))


def test_a_row_draws_the_same_whatever_stands_beside_it(model: Model) -> None:
    prompts = [[0, i, 7] for i in range(20, 30)]
    together = sample(model, prompts, [5] * 10, Sampling(1.0, seed=5))
    beside_longer = sample(model, [*prompts, [0] * 40], [5] * 11, Sampling(1.0, seed=5))
    # The table of uniform numbers is [rows, tokens]: another row at the end changes none before it.
    assert [a.tokens for a in beside_longer[:10]] == [a.tokens for a in together]


def test_logprobs_are_those_of_the_drawn_tokens(model: Model) -> None:
    prompts = [[0, 20, 21, 22], [0, 20, 33], [0, 20, 41, 42, 43]]
    for prompt, answer in zip(prompts, sample(model, prompts, [4] * 3, Sampling(2.0, 0.7)), strict=True):
        tokens = [*prompt, *answer.tokens]
        with torch.no_grad():
            logits = model.hidden(torch.tensor([tokens]))[0] @ model.head.T / 2.0
        logp = torch.log_softmax(logits, -1)
        expected = [logp[len(prompt) - 1 + i, t].item() for i, t in enumerate(answer.tokens)]
        assert answer.logprobs == pytest.approx(expected, abs=1e-4)


UNIFORMS = (torch.arange(20_000) + 0.5) / 20_000


def test_draws_follow_the_tempered_distribution() -> None:
    """Logits (0, ln 9) at temperature 2 are (0, ln 3): three quarters of the draws are token 1."""
    logits = torch.tensor([[0.0, math.log(9)]]).repeat(20_000, 1)
    drawn, logprobs = _draw(logits, Sampling(2.0), UNIFORMS)
    assert drawn.float().mean().item() == pytest.approx(0.75, abs=1e-3)
    assert logprobs is not None
    assert logprobs[0].item() == pytest.approx(math.log(0.25))
    assert logprobs[-1].item() == pytest.approx(math.log(0.75))


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    """Of 0.5, 0.3, 0.15, 0.05 a nucleus of 0.7 is the first two, drawn at 5 to 3; log-probabilities stay
    those of the whole distribution."""
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log().repeat(20_000, 1)
    drawn, logprobs = _draw(logits, Sampling(1.0, 0.7), UNIFORMS)
    counts = torch.bincount(drawn, minlength=4) / 20_000
    assert counts.tolist() == pytest.approx([0, 0.625, 0, 0.375], abs=1e-3)
    assert logprobs is not None
    assert sorted(set(logprobs.exp().mul(100).round().int().tolist())) == [30, 50]


def test_every_prompt_has_its_own_limit(model: Model) -> None:
    found = sample(model, [[0, 20], [0, 30], [0, 40]], [1, 6, 3], Sampling(1.0, seed=1))
    for answer, limit in zip(found, [1, 6, 3], strict=True):
        assert len(answer.tokens) == limit or not answer.truncated
        assert len(answer.tokens) <= limit

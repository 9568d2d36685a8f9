"""Sampling: greedy against plain argmax, stop tokens, truncation, the distribution drawn from."""

from pathlib import Path

import pytest
import torch

from tests.unit.trainer.conftest import RECIPE
from trainer.loading import load_model
from trainer.model import Model
from trainer.rollout import _draw, sample

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
    found = sample(model, prompts, [4] * 3, 0.0, None)
    assert [answer.tokens for answer in found] == [greedy(model, prompt, 4) for prompt in prompts]


def test_truncated_exactly_when_no_stop_token_was_drawn(model: Model) -> None:
    prompts = [[0, i] for i in range(20, 60)]
    found = sample(model, prompts, [8] * 40, 3.0, torch.Generator().manual_seed(0))
    stops = model.stop_ids
    assert {answer.truncated for answer in found} == {True, False}
    for answer in found:
        assert answer.truncated == (answer.tokens[-1] not in stops)
        assert not any(token in stops for token in answer.tokens[:-1])
        assert len(answer.tokens) == 8 or not answer.truncated


def test_same_generator_same_samples(model: Model) -> None:
    prompts = [[0, i] for i in range(20, 30)]
    one = sample(model, prompts, [5] * 10, 1.0, torch.Generator().manual_seed(5))
    assert one == sample(model, prompts, [5] * 10, 1.0, torch.Generator().manual_seed(5))
    assert one != sample(model, prompts, [5] * 10, 1.0, torch.Generator().manual_seed(6))


def test_draws_follow_the_tempered_distribution() -> None:
    """Logits (0, ln 9) at temperature 2 are (0, ln 3): three quarters of the draws are token 1."""
    logits = torch.tensor([[0.0, 9.0**1]]).log().nan_to_num(neginf=0.0).repeat(20_000, 1)
    logits[:, 0] = 0.0
    drawn = _draw(logits, 2.0, torch.Generator().manual_seed(0))
    assert drawn.float().mean().item() == pytest.approx(0.75, abs=0.01)


def test_every_prompt_has_its_own_limit(model: Model) -> None:
    found = sample(model, [[0, 20], [0, 30], [0, 40]], [1, 6, 3], 1.0, torch.Generator().manual_seed(1))
    for answer, limit in zip(found, [1, 6, 3], strict=True):
        assert len(answer.tokens) == limit or not answer.truncated
        assert len(answer.tokens) <= limit

"""The teacher's states and the batched student's against one plain forward pass."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.unit.trainer.conftest import RECIPE
from tests.unit.trainer.test_model import randomise
from trainer.attention import short_attention
from trainer.loading import load_model
from trainer.model import Model
from trainer.sequences import Training, all_response_states
from trainer.teacher import Teacher

pytestmark = pytest.mark.usefixtures("exact")


def plain(model: Model, prompt: list[int], response: list[int]) -> Tensor:
    with torch.no_grad():
        return model.hidden(torch.tensor([[*prompt, *response]]))[0, len(prompt) - 1 : -1].float()


def training(shared: int, lesson: int | None, rehearsal: bool) -> Training:
    return Training(
        prompt=[0, 9, 10],
        teacher_prompt=[0, 30, 31, 32, 1, 0, 9, 10],
        shared_tokens=shared,
        response=[50, 51, 1],
        rehearsal=rehearsal,
        lesson=lesson,
        mask=[True] * 3,
    )


@pytest.mark.parametrize("kind", ["parent", "base", "ema"])
@pytest.mark.parametrize("shared", [0, 5])
def test_states_equal_a_plain_pass_with_the_teachers_weights(
    base_folder: Path, tmp_path: Path, kind: str, shared: int
) -> None:
    recipe = RECIPE.model_copy(update={"teacher": kind})
    first = load_model(base_folder, recipe, None)
    randomise(first, seed=1)
    first.save_student(tmp_path / "parent", "tiny")
    model = load_model(base_folder, recipe, tmp_path / "parent")
    randomise(model, seed=2)
    teacher = Teacher(model, recipe)
    lesson, rehearsal = training(shared, 4, False), training(0, None, True)
    adapters = {"parent": "parent", "base": None, "ema": "ema"}
    with model.using(adapters[kind]):  # type: ignore[arg-type]
        expected = plain(model, lesson.teacher_prompt, lesson.response)
    with model.using("parent"):
        expected_rehearsal = plain(model, rehearsal.teacher_prompt, rehearsal.response)
    for _ in range(2):  # the second round comes from the caches
        found = teacher.states([lesson, rehearsal])
        torch.testing.assert_close(found[0].float(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1].float(), expected_rehearsal, rtol=1e-4, atol=1e-4)


def test_padding_changes_no_real_token(base_folder: Path) -> None:
    model = load_model(base_folder, RECIPE, None)
    rows = [([0, 5, 6], [7, 8]), ([0, 5, 6, 9, 10, 11, 12], [13, 14, 15, 1])]
    with model.using(None), torch.no_grad():
        together = all_response_states(model, rows)
        for (prompt, response), state in zip(rows, together, strict=True):
            torch.testing.assert_close(state.float(), plain(model, prompt, response), rtol=1e-4, atol=1e-4)


def test_short_attention_follows_a_mask() -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    key, value = torch.randn(2, 1, 1, 3, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    found, _ = short_attention(torch.nn.Module(), query, key, value, mask[None, None], scaling=0.5)
    scores = (0.5 * query @ key.transpose(-1, -2)).masked_fill(~mask, float("-inf"))
    torch.testing.assert_close(found, (scores.softmax(-1) @ value).transpose(1, 2), rtol=1e-5, atol=1e-6)


def test_decoding_attention_with_a_mask_equals_the_definition() -> None:
    """One query of 6 heads over 3 key-value heads; row 1 may not look at the padding before it."""
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(2, 6, 1, 8, generator=generator)
    key, value = (torch.randn(2, 3, 5, 8, generator=generator) for _ in range(2))
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[1, 0, 0, :2] = False
    found, _ = short_attention(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    for row, first in ((0, 0), (1, 2)):
        for head in range(6):
            keys, values = key[row, head // 2, first:], value[row, head // 2, first:]
            expected = torch.softmax(0.3 * keys @ query[row, head, 0], 0) @ values
            torch.testing.assert_close(found[row, 0, head], expected)


def test_short_attention_equals_the_definition() -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 4, 5, 8, dtype=torch.float64, requires_grad=True)
    key = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    value = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    found, _ = short_attention(torch.nn.Module(), query, key, value, None, scaling=0.3)
    full_key, full_value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    scores = 0.3 * query @ full_key.transpose(-1, -2)
    scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), float("-inf"))
    expected = (scores.softmax(-1) @ full_value).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

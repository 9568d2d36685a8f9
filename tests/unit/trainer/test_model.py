"""Adapters on one base: the product, the parent that is continued, the moving average."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from domain.errors import TrainingRefused
from domain.recipe import Recipe
from tests.unit.trainer.conftest import RECIPE
from trainer.lora import _LoraProduct
from trainer.model import AdaptedModel, load_model
from trainer.teacher import update_average

pytestmark = pytest.mark.usefixtures("exact")

IDS = torch.tensor([[0, 40, 41, 42, 43, 44]])


def changed(**changes: object) -> Recipe:
    return RECIPE.model_copy(update=changes)


def randomise(model: AdaptedModel, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters("student").values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def states(model: AdaptedModel, adapter: str | None) -> Tensor:
    with torch.no_grad(), model.using(adapter):  # type: ignore[arg-type]
        return model.hidden(IDS).float()


@pytest.fixture
def trained(base_folder: Path, tmp_path: Path) -> tuple[AdaptedModel, Path]:
    model = load_model(base_folder, changed(teacher="parent"), None)
    randomise(model)
    model.save_student(tmp_path / "parent", "tiny")
    return model, tmp_path / "parent"


def test_lora_product_equals_its_definition() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    a = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    b = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    out = _LoraProduct.apply(x, weight, bias, a, b, 0.5)
    expected = x @ weight.T + bias + 0.5 * (x @ a.T) @ b.T
    torch.testing.assert_close(out, expected)
    seed = torch.randn_like(out)
    found = torch.autograd.grad(out, (x, a, b), seed)
    for mine, reference in zip(found, torch.autograd.grad(expected, (x, a, b), seed), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


def test_a_new_student_is_the_base(base_folder: Path) -> None:
    model = load_model(base_folder, changed(teacher="parent"), None)
    assert torch.equal(states(model, "student"), states(model, None))


def test_only_the_student_trains(base_folder: Path, trained: tuple[AdaptedModel, Path]) -> None:
    model = load_model(base_folder, changed(teacher="ema"), trained[1])
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters("student").values())
    for adapter in ("parent", "ema"):
        assert not any(p.requires_grad for p in model.parameters(adapter).values())


def test_a_saved_adapter_names_layers_as_serving_looks_them_up(trained: tuple[AdaptedModel, Path]) -> None:
    config = json.loads((trained[1] / "adapter_config.json").read_text())
    linear = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == linear


def test_saved_adapter_loads_in_plain_peft_with_the_same_states(
    base_folder: Path, trained: tuple[AdaptedModel, Path]
) -> None:
    model, folder = trained
    dtype = model.head.dtype
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype), folder)
    with torch.no_grad():
        reference = plain(IDS, output_hidden_states=True).hidden_states[-1].float()
    torch.testing.assert_close(states(model, "student"), reference, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(states(model, "student"), states(model, None), atol=0.05)


def test_the_parent_is_continued_and_kept(base_folder: Path, trained: tuple[AdaptedModel, Path]) -> None:
    before, folder = trained
    model = load_model(base_folder, changed(teacher="ema"), folder)
    for adapter in ("student", "parent", "ema"):
        assert torch.equal(states(model, adapter), states(before, "student"))
    randomise(model, seed=9)
    assert not torch.equal(states(model, "student"), states(before, "student"))
    assert torch.equal(states(model, "parent"), states(before, "student"))


def test_a_higher_rank_and_another_alpha_keep_the_product(
    base_folder: Path, trained: tuple[AdaptedModel, Path]
) -> None:
    before, folder = trained
    model = load_model(base_folder, changed(lora_rank=6, lora_alpha=3.0), folder)
    old, new = before.parameters("student"), model.parameters("student")
    for name in old:
        if name.endswith("lora_A"):
            stem = name.removesuffix("lora_A")
            # Scalings: 8 / 4 before, 3 / 6 now.
            torch.testing.assert_close(
                0.5 * new[f"{stem}lora_B"] @ new[name], 2.0 * old[f"{stem}lora_B"] @ old[name]
            )


def test_a_lower_rank_is_refused(base_folder: Path, trained: tuple[AdaptedModel, Path]) -> None:
    with pytest.raises(TrainingRefused, match="rank 4") as refused:
        load_model(base_folder, changed(lora_rank=2), trained[1])
    assert refused.value.code == "lora_rank_below_parent"


def test_moving_average_closed_form() -> None:
    """Against a constant student s, n updates from e0 give s + (1 - rate)^n (e0 - s)."""
    average, student = {"w": torch.tensor([1.0, -2.0])}, {"w": torch.tensor([3.0, 0.5])}
    for _ in range(10):
        update_average(average, student, 0.1)
    expected = [3.0 + 0.9**10 * (1.0 - 3.0), 0.5 + 0.9**10 * (-2.0 - 0.5)]
    assert average["w"].tolist() == pytest.approx(expected, rel=1e-6)

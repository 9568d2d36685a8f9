"""Adapters on one base: the product, the parent that is continued, the moving average."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, PretrainedConfig

from domain.errors import TrainingRefused
from domain.recipe import Recipe
from serving.validation import validate_adapter
from tests.unit.trainer.conftest import RECIPE
from trainer.loading import load_model
from trainer.lora import _LoraProduct
from trainer.model import Model, Role
from trainer.teacher import update_average

pytestmark = pytest.mark.usefixtures("exact")

IDS = torch.tensor([[0, 40, 41, 42, 43, 44]])


def changed(**changes: object) -> Recipe:
    return RECIPE.model_copy(update=changes)


def randomise(model: Model, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters("student").values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def states(model: Model, role: Role | None) -> Tensor:
    with torch.no_grad(), model.using(role):
        return model.hidden(IDS).float()


@pytest.fixture
def trained(base_folder: Path, tmp_path: Path) -> tuple[Model, Path]:
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


def test_passes_without_gradients_follow_every_change_of_the_weights(base_folder: Path) -> None:
    """They keep the cast matrices of the pass before: an optimizer's step and another role must be seen."""
    model = load_model(base_folder, changed(teacher="ema"), None)
    parameters = list(model.parameters("student").values())
    for seed in (1, 2):
        randomise(model, seed)
        before = states(model, "student")
        with model.using("student"):
            torch.testing.assert_close(before, model.hidden(IDS).float(), rtol=0, atol=1e-5)
            model.hidden(IDS).sum().backward()
        torch.optim.SGD(parameters, lr=0.01).step()
        with model.using("student"):
            trained = model.hidden(IDS).float()
        assert (trained - before).abs().max() > 1e-3
        torch.testing.assert_close(states(model, "student"), trained, rtol=0, atol=1e-5)
        torch.testing.assert_close(states(model, "ema"), states(model, None), rtol=0, atol=1e-5)


def test_only_the_student_trains(base_folder: Path, trained: tuple[Model, Path]) -> None:
    model = load_model(base_folder, changed(teacher="ema"), trained[1])
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters("student").values())
    for adapter in ("parent", "ema"):
        assert not any(p.requires_grad for p in model.parameters(adapter).values())


def test_a_saved_adapter_names_layers_as_serving_looks_them_up(trained: tuple[Model, Path]) -> None:
    config = json.loads((trained[1] / "adapter_config.json").read_text())
    linear = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == linear


def test_saved_adapter_loads_in_plain_peft_with_the_same_states(
    base_folder: Path, trained: tuple[Model, Path]
) -> None:
    model, folder = trained
    dtype = model.head.dtype
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype), folder)
    with torch.no_grad():
        reference = plain(IDS, output_hidden_states=True).hidden_states[-1].float()
    torch.testing.assert_close(states(model, "student"), reference, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(states(model, "student"), states(model, None), atol=0.05)


def test_the_parent_is_continued_and_kept(base_folder: Path, trained: tuple[Model, Path]) -> None:
    before, folder = trained
    model = load_model(base_folder, changed(teacher="ema"), folder)
    for adapter in ("student", "parent", "ema"):
        assert torch.equal(states(model, adapter), states(before, "student"))
    randomise(model, seed=9)
    assert not torch.equal(states(model, "student"), states(before, "student"))
    assert torch.equal(states(model, "parent"), states(before, "student"))


def test_a_higher_rank_and_another_alpha_keep_the_product(
    base_folder: Path, trained: tuple[Model, Path]
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


def test_a_lower_rank_is_refused(base_folder: Path, trained: tuple[Model, Path]) -> None:
    with pytest.raises(TrainingRefused, match="rank 4") as refused:
        load_model(base_folder, changed(lora_rank=2), trained[1])
    assert refused.value.code == "lora_rank_below_parent"


def products(folder: Path) -> dict[str, Tensor]:
    """alpha / rank * B A of every layer, from the files alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    saved = load_file(folder / "adapter_model.safetensors")
    return {
        name: config["lora_alpha"] / config["r"] * saved[name.replace("lora_A", "lora_B")] @ saved[name]
        for name in saved
        if "lora_A" in name
    }


@pytest.mark.parametrize("teacher", ["ema", "parent"])
def test_a_merged_parent_is_where_every_role_starts(
    base_folder: Path, trained: tuple[Model, Path], teacher: str
) -> None:
    """Of another rank and alpha than the recipe's, and of a higher one, which `continue` would refuse."""
    before, folder = trained
    recipe = changed(parent_adapter="merge", lora_rank=3, lora_alpha=5.0, teacher=teacher)
    model = load_model(base_folder, recipe, folder)
    for role in ("student", "parent", *([teacher] if teacher == "ema" else [])):
        torch.testing.assert_close(states(model, role), states(before, "student"), rtol=1e-5, atol=1e-5)
    assert model.parameters("student").keys() == before.parameters("student").keys()
    assert all(3 in p.shape for p in model.parameters("student").values())


def test_a_merged_version_is_the_exact_sum_of_two_adapters(
    base_folder: Path, trained: tuple[Model, Path], tmp_path: Path
) -> None:
    _, folder = trained
    recipe = changed(parent_adapter="merge", lora_rank=3, lora_alpha=5.0)
    model = load_model(base_folder, recipe, folder)
    randomise(model, seed=9)
    model.save_student(tmp_path / "merged", "tiny")
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert config["r"] == 4 + 3
    validate_adapter(
        tmp_path / "merged", json.loads((base_folder / "config.json").read_text()), base_model="tiny"
    )
    fresh = model.parameters("student")
    old = products(folder)
    new = products(tmp_path / "merged")
    assert old.keys() == new.keys()
    for name, product in new.items():
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        added = 5.0 / 3 * fresh[f"{layer}.lora_B"] @ fresh[f"{layer}.lora_A"]
        torch.testing.assert_close(product, old[name] + added, rtol=1e-6, atol=1e-6)
    again = load_model(base_folder, changed(lora_rank=7, teacher="parent"), tmp_path / "merged")
    torch.testing.assert_close(states(again, "student"), states(model, "student"), rtol=1e-4, atol=1e-4)


def test_gradients_pass_a_merged_parent_by(base_folder: Path, trained: tuple[Model, Path]) -> None:
    _, folder = trained
    model = load_model(base_folder, changed(parent_adapter="merge"), folder)
    randomise(model, seed=9)
    frozen = {name: tensor.clone() for name, tensor in model.parameters("parent").items()}
    adam = torch.optim.AdamW(model.parameters("student").values(), lr=0.1, weight_decay=0.5)
    before = {name: tensor.clone() for name, tensor in model.parameters("student").items()}
    for _ in range(3):
        with model.using("student"):
            model.hidden(IDS).square().sum().backward()
        adam.step()
        adam.zero_grad()
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in model.parameters("parent").items())
    assert not any(torch.equal(tensor, before[name]) for name, tensor in model.parameters("student").items())


def test_an_adapter_of_another_base_is_refused(base_folder: Path, trained: tuple[Model, Path]) -> None:
    folder = trained[1]
    saved = load_file(folder / "adapter_model.safetensors")
    short = next(name for name in saved if "lora_A" in name)
    save_file({**saved, short: saved[short][:, :-1].contiguous()}, folder / "adapter_model.safetensors")
    with pytest.raises(TrainingRefused, match=r"\[4, 63\]") as refused:
        load_model(base_folder, RECIPE, folder)
    assert refused.value.code == "parent_adapter_mismatch"


def test_an_adapter_whose_product_is_more_than_b_a_is_refused(
    base_folder: Path, trained: tuple[Model, Path]
) -> None:
    path = trained[1] / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_rslora": True}))
    with pytest.raises(TrainingRefused, match="use_rslora"):
        load_model(base_folder, RECIPE, trained[1])


def test_moving_average_closed_form() -> None:
    """Against a constant student s, n updates from e0 give s + (1 - rate)^n (e0 - s)."""
    average, student = {"w": torch.tensor([1.0, -2.0])}, {"w": torch.tensor([3.0, 0.5])}
    for _ in range(10):
        update_average(average, student, 0.1)
    expected = [3.0 + 0.9**10 * (1.0 - 3.0), 0.5 + 0.9**10 * (-2.0 - 0.5)]
    assert average["w"].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["scaled", "capped", "plain"])
def test_logits_that_are_more_than_a_product_are_refused(
    base_folder: Path, tmp_path: Path, kind: str
) -> None:
    """Granite divides them, Gemma 2 caps them: sampled and compared without, they would be others."""
    shape = {
        "vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    config: PretrainedConfig
    if kind == "capped":
        config = Gemma2Config(**shape, head_dim=8, final_logit_softcapping=30.0)
    else:
        config = GraniteConfig(**shape, logits_scaling=8.0 if kind == "scaled" else 1.0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for path in base_folder.glob("*token*"):
        shutil.copy(path, tmp_path)
    shutil.copy(base_folder / "chat_template.jinja", tmp_path)
    if kind == "plain":
        load_model(tmp_path, RECIPE, None)
        return
    with pytest.raises(TrainingRefused) as refused:
        load_model(tmp_path, RECIPE, None)
    assert refused.value.code == "unsupported_base_model"

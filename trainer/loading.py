"""From folders to the model that trains."""

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from domain.errors import TrainingRefused
from domain.recipe import Recipe
from trainer import attention
from trainer.adapted_model import AdaptedModel
from trainer.adapter_files import is_adapter, read_adapter
from trainer.full_model import FullModel
from trainer.methods import plan_of
from trainer.model import Model, Role, compute_device, compute_dtype
from trainer.preflight_gap import has_teacher


def load_model(base_path: Path, recipe: Recipe, parent: Path | None) -> Model:
    """The model of a recipe on a base; `parent`: files of the version to start from, None for the base.

    lora_rank 0 trains every weight, from the parent's full checkpoint or from the base with its adapter
    merged. Otherwise an adapter trains, and the parent's must be one: to adapt a full checkpoint, give it
    as the base. Raises TrainingRefused where that is not so, and for a model without a chat template or
    whose logits are capped or scaled, which the loss does not reproduce.
    """
    tokenizer = AutoTokenizer.from_pretrained(base_path)
    if tokenizer.chat_template is None:
        raise TrainingRefused("The base model has no chat template.", code="no_chat_template")
    if recipe.lora_rank > 0:
        if parent is not None and not is_adapter(parent):
            raise TrainingRefused(
                "The parent version is a full checkpoint; an adapter on it needs it as its base model.",
                param="recipe.lora_rank",
                code="parent_not_an_adapter",
            )
        return AdaptedModel(_read(base_path, compute_dtype()), tokenizer, recipe, parent)
    whole = parent if parent is not None and not is_adapter(parent) else base_path
    start = _read(whole, torch.float32)
    if parent is not None and is_adapter(parent):
        _merge(start, parent)
    frozen: dict[Role | None, PreTrainedModel] = {}
    teacher = recipe.teacher if has_teacher(recipe) else None
    rehearses = recipe.rehearsal_share > 0 or recipe.reinvoke_steps > 0
    if teacher == "parent" or rehearses or plan_of(recipe).responses == "teacher":
        frozen["parent" if parent is not None else None] = copy.deepcopy(start)
    if teacher == "base" and None not in frozen:
        frozen[None] = copy.deepcopy(start) if parent is None else _read(base_path, compute_dtype())
    return FullModel(
        start,
        tokenizer,
        compute_dtype(),
        AutoConfig.from_pretrained(base_path).dtype or compute_dtype(),
        base_path,
        frozen,
        has_parent=parent is not None,
        averaged=teacher == "ema",
    )


def _read(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention.register()
    )
    if model.config.get_text_config().to_dict().get("final_logit_softcapping"):
        raise TrainingRefused(
            "Base models with final_logit_softcapping are not supported.", code="unsupported_base_model"
        )
    nn.Module.to(model, compute_device())
    assert isinstance(model, PreTrainedModel)
    _require_plain_head(model)
    return model


@torch.no_grad()
def _require_plain_head(model: PreTrainedModel) -> None:
    """Raises TrainingRefused for a model whose logits are not the last hidden states' products with the
    output layer, which is how samples, losses and probabilities are computed here: some scale them."""
    ids = torch.arange(3, device=model.device)[None]
    states = model.base_model(input_ids=ids).last_hidden_state
    plain = nn.functional.linear(states, model.get_output_embeddings().weight).float()
    own = model(input_ids=ids).logits.float()
    if not torch.allclose(own, plain, rtol=0.02, atol=0.02 * float(plain.abs().max())):
        raise TrainingRefused(
            "Base models that change their logits behind the output layer (by a scale, a cap or a bias) are "
            "not supported.",
            code="unsupported_base_model",
        )


@torch.no_grad()
def _merge(model: PreTrainedModel, folder: Path) -> None:
    """Add the adapter's product to the weights."""
    saved = read_adapter(folder)
    weights = dict(model.named_parameters())
    for layer, (a, b) in saved.matrices.items():
        weight = weights.get(f"{layer}.weight")
        if weight is None or weight.shape != (b.shape[0], a.shape[1]):
            raise TrainingRefused(
                f"The parent adapter is not one of this base: {layer!r} does not fit.",
                code="parent_adapter_mismatch",
            )
        weight.add_((b.float() @ a.float()).to(weight) * saved.scaling)

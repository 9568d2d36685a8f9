"""From folders to the model that trains."""

from pathlib import Path

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from domain.errors import TrainingRefused
from domain.recipe import Recipe
from trainer import attention
from trainer.adapted_model import AdaptedModel
from trainer.model import Model, compute_device, compute_dtype


def load_model(base_path: Path, recipe: Recipe, parent: Path | None) -> Model:
    """Read the base in the compute dtype and attach the adapters.

    Raises TrainingRefused for a model without a chat template or with capped logits, which the loss does
    not reproduce.
    """
    tokenizer = AutoTokenizer.from_pretrained(base_path)
    if tokenizer.chat_template is None:
        raise TrainingRefused("The base model has no chat template.", code="no_chat_template")
    base = AutoModelForCausalLM.from_pretrained(
        base_path, dtype=compute_dtype(), attn_implementation=attention.register()
    )
    nn.Module.to(base, compute_device())
    if base.config.get_text_config().to_dict().get("final_logit_softcapping"):
        raise TrainingRefused(
            "Base models with final_logit_softcapping are not supported.", code="unsupported_base_model"
        )
    return AdaptedModel(base, tokenizer, recipe, parent)

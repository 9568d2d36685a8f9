"""One frozen base model in memory and the adapters that run on it."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedModel, PreTrainedTokenizerBase

from domain.errors import TrainingRefused
from domain.recipe import Recipe
from trainer import attention
from trainer.lora import LoraLinear, use_fused_layer

log = logging.getLogger(__name__)

Adapter = Literal["student", "parent", "ema"]
"""`student` trains; `parent` is the frozen version the update starts from; `ema` is the student's
moving average. None, where an adapter is asked for, is the bare base."""

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


def compute_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype() -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, else float32."""
    if torch.cuda.is_available():
        return torch.bfloat16
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


class AdaptedModel:
    """A base model with its adapters; exactly one of them, or none, is in use at a time."""

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe,
        parent_adapter: Path | None,
    ) -> None:
        """Attach adapters to `base`.

        With a parent adapter the student starts from exactly its product, else from zero. Raises
        TrainingRefused when the parent's rank is above the recipe's.
        """
        self.tokenizer = tokenizer
        self.context_window: int = base.config.max_position_embeddings
        self._causal = base
        self._recipe = recipe
        torch.manual_seed(recipe.seed)
        self._peft = get_peft_model(base, _lora_config(recipe), adapter_name="student")
        self._layers = {
            name: module for name, module in base.named_modules() if isinstance(module, LoraLinear)
        }
        self.has_parent_adapter = parent_adapter is not None
        if parent_adapter is not None:
            self._continue_from(parent_adapter, recipe)
            self._add_copy_of_student("parent")
        if recipe.teacher == "ema":
            self._add_copy_of_student("ema")
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(".student." in name)
        base.eval()
        self.use(None)

    @property
    def device(self) -> torch.device:
        return self.head.device

    @property
    def head(self) -> Tensor:
        """The output layer's weight, [vocabulary, hidden], frozen."""
        weight: Tensor = self._causal.get_output_embeddings().weight
        return weight.detach()

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        configured = self._causal.generation_config.eos_token_id if self._causal.generation_config else None
        ids = configured if isinstance(configured, list) else [configured]
        return frozenset(i for i in [*ids, self.tokenizer.eos_token_id] if i is not None)

    def text(self, tokens: list[int]) -> str:
        decoded = self.tokenizer.decode(tokens, skip_special_tokens=True)
        assert isinstance(decoded, str)
        return decoded

    def use(self, adapter: Adapter | None) -> None:
        for layer in self._layers.values():
            layer.selected = adapter

    @contextmanager
    def using(self, adapter: Adapter | None) -> Iterator[None]:
        """Run with `adapter` inside the block and with the bare base after it."""
        self.use(adapter)
        try:
            yield
        finally:
            self.use(None)

    def parent(self) -> Adapter | None:
        """The adapter of the version this update starts from; None when that is the base."""
        return "parent" if self.has_parent_adapter else None

    def hidden(
        self,
        input_ids: Tensor,
        *,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states, [batch, tokens, hidden], of the adapter in use; `cache` is extended."""
        out = self._causal.base_model(
            input_ids=input_ids,
            past_key_values=cache,
            use_cache=cache is not None,
            attention_mask=attention_mask,
            position_ids=position_ids,
        )
        states: Tensor = out.last_hidden_state
        return states

    def parameters(self, adapter: Adapter) -> dict[str, Tensor]:
        """The adapter's float32 matrices A and B by stable name."""
        found: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            found[f"{name}.lora_A"], found[f"{name}.lora_B"] = layer.matrices(adapter)
        return found

    def save_student(self, folder: Path, base_model: str) -> None:
        """Write the student as a PEFT adapter folder naming `base_model`."""
        folder.mkdir(parents=True, exist_ok=True)
        state = get_peft_model_state_dict(self._peft, adapter_name="student")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
        config = self._peft.peft_config["student"].to_dict()
        config["base_model_name_or_path"] = base_model
        config["inference_mode"] = True
        # peft lists whole paths where a model has few layers; engines look layers up by their last part.
        config["target_modules"] = sorted({name.rpartition(".")[2] for name in config["target_modules"]})
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")
        for name in (ADAPTER_FILE, CONFIG_FILE):
            with (folder / name).open("rb") as written:
                os.fsync(written.fileno())

    def _add_copy_of_student(self, adapter: Adapter) -> None:
        self._peft.add_adapter(adapter, _lora_config(self._recipe))
        source = self.parameters("student")
        with torch.no_grad():
            for name, parameter in self.parameters(adapter).items():
                parameter.copy_(source[name])

    def _continue_from(self, folder: Path, recipe: Recipe) -> None:
        """Load the parent's product into the student, scaled to the recipe's alpha / rank.

        A higher rank adds rows to A and zero columns to B, which leaves the product unchanged.
        """
        config = LoraConfig.from_pretrained(str(folder))
        assert isinstance(config, LoraConfig)
        if config.r > recipe.lora_rank:
            raise TrainingRefused(
                f"The parent version's adapter has rank {config.r}; lora_rank {recipe.lora_rank} would drop "
                f"part of it. Use lora_rank {config.r} or more.",
                param="recipe.lora_rank",
                code="lora_rank_below_parent",
            )
        rescale = (config.lora_alpha / config.r) / (recipe.lora_alpha / recipe.lora_rank)
        saved = load_file(folder / ADAPTER_FILE)
        student = self.parameters("student")
        expected = {_saved_name(name) for name in student}
        if expected != saved.keys():
            raise TrainingRefused(
                f"The parent adapter's {len(saved)} matrices are not the {len(expected)} the base takes.",
                code="parent_adapter_mismatch",
            )
        with torch.no_grad():
            for name, parameter in student.items():
                tensor = saved[_saved_name(name)].to(parameter)
                if name.endswith("lora_A"):
                    parameter[: config.r] = tensor
                else:
                    parameter.zero_()
                    parameter[:, : config.r] = tensor * rescale


def _lora_config(recipe: Recipe) -> LoraConfig:
    return use_fused_layer(
        LoraConfig(
            r=recipe.lora_rank,
            lora_alpha=recipe.lora_alpha,  # type: ignore[arg-type]
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    )


def _saved_name(name: str) -> str:
    return f"base_model.model.{name}.weight"


def load_model(base_path: Path, recipe: Recipe, parent_adapter: Path | None) -> AdaptedModel:
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
    return AdaptedModel(base, tokenizer, recipe, parent_adapter)
